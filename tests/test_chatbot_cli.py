"""The program itself: one reply, a pipe, and one clear line for whatever is wrong."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chatbot.__main__ import main
from chatbot.conversation import Conversation
from chatbot.reply import Reply

ROOT = Path(__file__).parent.parent


def run(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "chatbot", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, timeout=120)


def test_one_reply_is_printed(chat_model: Path) -> None:
    done = run("--model", chat_model, "-p", "hola", "--max-new-tokens", 8, "--seed", 1)
    assert (done.returncode, done.stderr.startswith(b"chatbot: cut after 8")) == (0, True)
    again = run("--model", chat_model, "-p", "hola", "--max_new_tokens=8", "--seed", "1")
    assert done.stdout.strip() == again.stdout.strip() != b""


def test_piped_text_is_answered_once(chat_model: Path) -> None:
    flags = ("--model", chat_model, "--temperature", 0, "--max-new-tokens", 8)
    piped = run(*flags, stdin="¿qué?\n".encode())
    assert (piped.returncode, piped.stderr.count(b"\n")) == (0, 1)  # it was cut
    assert piped.stdout == run(*flags, "-p", "¿qué?").stdout


def test_a_reader_that_leaves_early_is_no_error(chat_model: Path) -> None:
    command = f"{sys.executable} -m chatbot --model {chat_model} -p hola --seed 1 | true"
    done = subprocess.run(command, shell=True, capture_output=True, cwd=ROOT, timeout=120)
    assert done.stderr == b""


@pytest.mark.slow
def test_transformers_is_imported_by_its_own_engine_only(chat_model: Path) -> None:
    code = (
        "import sys; from chatbot.__main__ import main;"
        f"main(['--model', {str(chat_model)!r}, '--engine', sys.argv[1], '-p', 'hola',"
        " '--max-new-tokens', '3', '--temperature', '0']);"
        "print(*sorted(sys.modules.keys() & {'transformers', 'peft', 'gradio', 'minigpt'}))"
    )
    replies = {}
    for engine, expected in (("minigpt", "minigpt"), ("hf", "transformers")):
        done = subprocess.run(
            [sys.executable, "-c", code, engine], capture_output=True, text=True, cwd=ROOT
        )
        *reply, modules = done.stdout.splitlines()
        replies[engine] = reply
        assert modules == expected
    assert replies["minigpt"] == replies["hf"]


@pytest.mark.parametrize(
    ("flags", "stdin", "message"),
    [
        (["-p", ""], b"", "the message is empty: write something"),
        ([], b"  \n", "the message is empty: write something"),
        ([], "áé".encode() + b"\xff", "the text is not valid UTF-8 (at character 2)"),
        ([], b"ab\xff", "the text is not valid UTF-8 (at character 2): save or send it as UTF-8"),
        (["-p", "x", "--temperature", "-1"], b"", "temperature must be a number of 0 or more"),
        (["-p", "x", "--temperature", "nan"], b"", "temperature must be a number of 0 or more"),
        (["-p", "x", "--top-p", "1.5"], b"", "top_p must be in (0, 1], got 1.5"),
        (["-p", "x", "--top_p", "0", "--lang", "es"], b"", "top_p debe estar en (0, 1], y es 0"),
        (["-p", "x", "--attention-sinks", "2"], b"", "sinks need a window"),
        (["-p", "x", "--seed", str(2**63)], b"", "a whole number from 0 to 2**63 - 1, or off"),
        (["-p", "palabra " * 200], b"", "the message has"),
        (["-p", "x", "--system", "palabra " * 200], b"", "the system prompt has"),
        (["-p", "x", "--model", "./none"], b"", "no directory './none': check the path"),
        (["-p", "x", "--model", "tests"], b"", "config.json is missing"),
        (["-p", "x", "--model", "no-model"], b"", "not in the cache, and the hub cannot"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_exit_code_2(
    chat_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    stdin: bytes,
    message: str,
) -> None:
    class Piped:
        buffer = type("Buffer", (), {"read": staticmethod(lambda: stdin)})

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Piped())
    model = [] if "--model" in flags else ["--model", str(chat_model)]
    monkeypatch.setenv("LC_ALL", "C")
    assert main([*model, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_closed_standard_input_is_an_empty_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["--lang", "en"]) == 2
    assert capsys.readouterr().err == "chatbot: the message is empty: write something\n"


@pytest.mark.parametrize("flags", [["-p", "hola"], []])
def test_a_closed_standard_output_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", None)
    assert main([*flags, "--lang", "en"]) == 2
    assert capsys.readouterr().err == (
        "chatbot: standard output is closed: send it to a terminal, a file or a pipe\n"
    )


def test_advice_of_the_model_that_cannot_be_followed_names_its_file(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chat_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"temperature": -3}')
    assert main(["-p", "x", "--model", str(tmp_path), "--lang", "es"]) == 2
    assert capsys.readouterr().err == (
        f"chatbot: {tmp_path}, generation_config.json: "
        "temperature debe ser un número de 0 o más, y es -3\n"
    )


def test_a_failure_of_the_system_is_exit_code_1(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("download broke off")

    monkeypatch.setattr("chatbot.__main__.open_engine", fail)
    assert main(["-p", "x"]) == 1
    assert capsys.readouterr().err == "chatbot: download broke off\n"
    with pytest.raises(OSError, match="broke off"):
        main(["-p", "x", "--debug"])


def test_a_reply_that_was_cut_says_so_beside_it(
    chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(chat_model), "-p", "Hello", "--max-new-tokens", "3", "--seed", "0"]
    assert main(flags) == 0
    assert capsys.readouterr().err == (
        "chatbot: cut after 3 tokens (--max-new-tokens N allows more)\n"
    )


def test_a_text_keeps_its_underscores(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = Conversation.reply

    def reply(conversation: Conversation, text: str) -> Reply:
        asked.append(text)
        return real(conversation, text)

    monkeypatch.setattr(Conversation, "reply", reply)
    text = "--top_p is what, and max_new_tokens?"
    assert main(["--model", str(chat_model), "--max_new_tokens=2", "-p", text]) == 0
    assert asked == [text]


def test_a_model_whose_weights_are_no_numbers_is_one_line(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FloatingPointError("the model's logits are no numbers")

    monkeypatch.setattr("minigpt.engine.Engine.stream", fail)
    assert main(["--model", str(chat_model), "-p", "x"]) == 1
    assert capsys.readouterr().err == "chatbot: the model's logits are no numbers\n"
