"""The real program in a pseudo-terminal, driven as a person would."""

import codecs
import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from chatbot.commands import rate
from chatbot.conversation import Conversation
from chatbot.engines import TUTOR, open_engine
from chatbot.settings import Settings
from chatbot.terminal import Terminal

pty = pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")
ROOT = Path(__file__).parent.parent


class Screen:
    """A running chat: type into it, wait for what it shows."""

    def __init__(self, *arguments: str, term: str = "dumb"):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "NO_COLOR": "1", "LC_ALL": "C.UTF-8", "TERM": term}
        command = [sys.executable, "-m", "chatbot", *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment,
            start_new_session=True, preexec_fn=lambda: os.environ and _own_terminal(),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # "…" may come in pieces

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """What was shown since the last wait, up to the pattern."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += self.decoder.decode(os.read(self.master, 65536))
                except OSError:  # the program has gone
                    assert re.search(pattern, self.seen), self.seen
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def ask(self, text: str, pattern: str) -> str:
        """Type a line at the prompt and wait for an answer, then for the next prompt."""
        self.type(text + "\n")
        shown = self.wait(pattern)
        self.wait("> $")
        return shown

    def end(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self.master)
        return code


def _own_terminal() -> None:
    """Make the pseudo-terminal the child's own, so that Ctrl-C in it is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests begun with & inherit that it is ignored


@pytest.mark.slow
def test_a_conversation_from_greeting_to_goodbye(chat_model: Path, tmp_path: Path) -> None:
    screen = Screen(
        "--model", str(chat_model), "--seed", "1", "--temperature", "1", "--max-new-tokens", "5"
    )
    greeting = screen.wait("> $")
    assert "engine minigpt · context of 128 tokens" in greeting
    assert "may be wrong" in greeting
    assert re.search(r"first token \d+\.\d\d s", screen.ask("hola", r"context \d+/128"))
    screen.ask("otra vez", r"context \d+/128, \d+ cached")
    assert screen.ask("/help", "/exit").count("\n/") >= 12
    assert "turn 2:" in screen.ask("/context", "kept free for a reply")
    screen.ask("/set top_p 0.5", "top_p 0.5")
    assert "temperature" not in screen.ask("/set top_p", "top_p 0.5")
    screen.ask("/set top_p 7", r"top_p must be in \(0, 1\], got 7")
    screen.ask("/set nonsense 7", "unknown setting nonsense: choose from temperature")
    screen.ask("/nonsense", "unknown command /nonsense")
    screen.ask("/SEED off", "seed off")
    screen.ask("/seed 4", "seed 4")
    screen.ask("/tokens hola", r"\d+ tokens, 4 characters")
    screen.ask(f"/save {tmp_path}/c.json", "Saved to")
    screen.ask(f"/export {tmp_path}/c.md", "Saved to")
    screen.ask("/undo", "Taken back: otra vez")
    screen.ask("/system Be brief.", "System prompt: Be brief.")
    screen.ask(f"/load {tmp_path}/c.json", "Loaded 2 turns")
    screen.ask("/load", "/load wants FILE")
    screen.ask("/regen", r"context \d+/128")
    screen.ask("//help", r"context \d+/128")
    screen.ask("/stats", r"prompt: \d+ tokens, \d+ of them from the cache")
    screen.ask("palabra " * 60, "tokens, but .* fit: shorten it")
    screen.ask("/clear", "A new conversation.")
    screen.type('"""first line\n')
    screen.wait("… ")
    screen.type('second line"""\n')
    screen.wait(r"context \d+/128")
    screen.wait("> $")
    screen.type("\x04")
    screen.wait("Bye.")
    assert screen.end() == 0


@pytest.mark.slow
def test_ctrl_c_stops_a_reply_and_keeps_it_and_leaves_at_the_prompt(
    tmp_path: Path, tokenizer
) -> None:
    import torch

    from minigpt import GPT, GPTConfig

    # Slow enough to be interrupted, and without an end token that it could draw.
    config = GPTConfig(vocab_size=300, n_positions=1000, n_embd=768, n_layer=6, n_head=12)
    GPT(config, generator=torch.Generator().manual_seed(0)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    screen = Screen("--model", str(tmp_path), "--max-new-tokens", "900", "--seed", "2")
    screen.wait("> $")
    screen.type("hola\n")
    screen.wait("hola\r\n.{3}")
    screen.type("\x03")
    shown = screen.wait(r"stopped; what came is kept(.|\n)*context \d+/1000")
    assert shown
    screen.wait("> $")
    screen.ask("/context", r"turn 1: \d+ tokens")
    for _ in range(5):  # one that comes just before the prompt reads waits for the next key
        screen.type("\x03")
        with suppress(AssertionError):
            screen.wait("Ctrl-C again, or Ctrl-D, leaves.", seconds=10)
            break
    for _ in range(5):
        screen.type("\x03")
        with suppress(subprocess.TimeoutExpired):
            screen.process.wait(timeout=60)  # a further one would kill a program that is leaving
            break
    assert screen.end() == 130


@pytest.mark.slow
def test_pasted_lines_are_one_message(chat_model: Path) -> None:
    readline = pytest.importorskip("readline", reason="not every Python has it")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit knows no bracketed paste")
    screen = Screen("--model", str(chat_model), "--max-new-tokens", "3", term="xterm")
    screen.wait("> $")
    screen.type("\x1b[200~first line\nsecond line\x1b[201~")  # as a terminal sends what is pasted
    screen.ask("", r"context \d+/128")
    screen.ask("/undo", "Taken back: first line\r\nsecond line")
    screen.type("\x04")
    screen.wait("Bye.")
    assert screen.end() == 0


def talk(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, *typed: str | type[BaseException]
) -> tuple[int, str]:
    """What a conversation ends with and shows, if this is typed; exceptions stand for keys."""
    keys = iter(typed)

    def type_next(prompt: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", type_next)
    engine = open_engine("minigpt", chat_model)
    out = io.StringIO()
    conversation = Conversation(engine, Settings(temperature=0, max_new_tokens=4))
    return Terminal(conversation, "en", out=out).run("minigpt"), out.getvalue()


def test_a_reply_on_a_narrow_screen_is_broken_between_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Screenful(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("NO_COLOR", "1")
    engine, out = open_engine("minigpt", TUTOR), Screenful()
    conversation = Conversation(engine, Settings(temperature=0, max_new_tokens=60))
    Terminal(conversation, "es", out=out).answer("¿Qué es la atención?")
    said = conversation.turns[-1].assistant
    lines = out.getvalue().split("\n")
    assert len(said) > 60 and "\n" not in said
    assert " ".join(lines).startswith(said)
    assert max(map(len, lines)) <= 30


def test_a_ctrl_c_that_comes_a_moment_late_does_not_end_the_conversation(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [KeyboardInterrupt, "hola", KeyboardInterrupt, KeyboardInterrupt]
    code, shown = talk(chat_model, monkeypatch, *keys)
    assert code == 130
    assert shown.count("Ctrl-C again, or Ctrl-D, leaves.") == 2
    assert "context" in shown.split("Ctrl-C again")[1]


def test_what_the_model_refuses_is_told_and_the_conversation_goes_on(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("the model's chat template refuses these messages: no system")

    monkeypatch.setattr("minigpt.engine.Engine.render", refuse)
    code, shown = talk(chat_model, monkeypatch, "/system Be brief.", "hola", EOFError)
    assert code == 0
    assert shown.count("refuses these messages: no system\n") == 2


@pytest.mark.parametrize(
    ("speed", "shown"), [(0.04, "0.0"), (0.4, "0.4"), (9.96, "10.0"), (130.4, "130")]
)
def test_a_slow_model_has_a_speed_too(speed: float, shown: str) -> None:
    assert rate(speed) == shown


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError, ValueError])
def test_a_model_that_fails_does_not_take_the_conversation_with_it(
    chat_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: type[Exception],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("a logit is no number")

    monkeypatch.setattr("minigpt.engine.Engine.encode", fail)
    kept = tmp_path / "c.json"
    code, shown = talk(chat_model, monkeypatch, "/tokens a", f"/save {kept}", EOFError)
    assert code == 0
    assert "a logit is no number\n" in shown
    assert kept.is_file()


def test_a_path_of_a_user_that_there_is_not_is_a_message(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown = talk(chat_model, monkeypatch, "/save ~no-such-user/c.json", EOFError)
    assert code == 0
    assert "No such file or directory" in shown


def test_a_system_prompt_can_be_taken_away(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shown = talk(chat_model, monkeypatch, "/system Be brief.", "/system off", EOFError)
    assert "System prompt: Be brief." in shown
    assert "There is no system prompt." in shown


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["hola"], 1),
        (["/set temperature 1", "hola"], 0),
        (["/set temperature 1", "/seed 1", "hola"], 1),
        (["hola", "/set temperature 3", "/seed 5"], 0),  # repeatable from now on, but another
    ],
)
def test_a_reply_that_can_only_be_the_same_again_says_so(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], told: int
) -> None:
    _, shown = talk(chat_model, monkeypatch, *changes, "/regen", EOFError)
    assert shown.count("the same reply, as set") == told


def test_the_end_of_the_input_ends_a_message_of_several_lines_and_not_the_conversation(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown = talk(chat_model, monkeypatch, '"""first', "second", EOFError, "/undo", EOFError)
    assert code == 0
    assert "Taken back: first\nsecond\n" in shown


def test_a_broken_byte_in_a_command_is_told_as_text_that_can_be_written(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, shown = talk(chat_model, monkeypatch, "/caf\udce9 x", EOFError)
    assert b"unknown command /caf\xef\xbf\xbd:" in shown.encode()


def test_what_a_model_writes_cannot_steer_the_terminal(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatbot.reply.StopFilter.feed", lambda *_: "\x1b]0;title\x07")
    _, shown = talk(chat_model, monkeypatch, "hola", EOFError)
    assert "\ufffd]0;title\ufffd" in shown and "\x07" not in shown
