"""What bench prints is what was measured: each comparison, its verdict, and each refusal."""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_bridge
import minigpt
from bench import environment, memory, parity, quality, report, speed
from bench.__main__ import main
from bench.chart import Chart
from bench.held_out import Case
from bench.report import Record, Table
from chatbot.tutor.corpus import FOLLOW_UPS, LANGUAGES, read
from minigpt import quant

# --- report -------------------------------------------------------------------------------------


def record(**changes: Any) -> Record:
    table = Table("Part", ["engine", "x"], [["a", 0.00012345], ["b", 41.25], ["c", 1234.5]])
    return Record("Speed of light", [table], ["A note."], {"cores": 2}, **changes)


def test_markdown_holds_tables_notes_and_environment() -> None:
    assert report.markdown(record()).splitlines() == [
        "## Speed of light", "",
        "### Part", "",
        "| engine | x |", "|---|---|", "| a | 0.000123 |", "| b | 41.2 |", "| c | 1234 |", "",
        "A note.", "",
        "cores 2",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [3, 40])
def test_a_chart_is_drawn_beside_the_page_and_its_numbers_kept(tmp_path: Path, count: int) -> None:
    values = [1.0, None, *range(2, count)]
    chart = Chart(
        "Speed", [f"case {i}" for i in range(count)], {"a": values, "b": values}, log=True
    )
    page, data, picture = report.write(Record("Speed", [], chart=chart), "speed", tmp_path)
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert picture.read_bytes().startswith(b"\x89PNG") and width > height > 300
    assert json.loads(data.read_text())["chart"]["series"]["b"] == values
    assert page.read_text().startswith("## Speed")
    assert len(report.write(Record("Speed", []), "other", tmp_path)) == 2


def test_json_holds_every_digit(tmp_path: Path) -> None:
    page, data = report.write(record(passed=True), "speed", tmp_path / "a" / "b")
    assert page.read_text("utf-8") == report.markdown(record())
    written = json.loads(data.read_text("utf-8"))
    assert written["tables"][0]["rows"][0] == ["a", 0.00012345]
    assert (written["title"], written["passed"]) == ("Speed of light", True)
    assert written["environment"] == {"cores": 2}


def test_what_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    broken = Record("Speed", [Table("", ["x"], [[math.nan]])])
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(broken, "speed", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_page_goes_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("é\n<!-- speed -->\nold\n<!-- /speed -->\nend <!-- memory -->\n", "utf-8")
    for _ in range(2):  # a second time it replaces the first
        report.insert(record(), "speed", document)
    page = report.markdown(record())
    assert document.read_text("utf-8") == (
        f"é\n<!-- speed -->\n{page}<!-- /speed -->\nend <!-- memory -->\n"
    )


@pytest.mark.parametrize(
    "text", ["", "<!-- speed -->", "<!-- /speed -->", "<!-- /speed --> <!-- speed -->"]
)
def test_a_document_without_markers_stays_as_it_is(tmp_path: Path, text: str) -> None:
    document = tmp_path / "README.md"
    document.write_text(text)
    with pytest.raises(ValueError, match=r"must hold <!-- speed --> and <!-- /speed -->, between"):
        report.insert(record(), "speed", document)
    assert document.read_text() == text


# --- environment --------------------------------------------------------------------------------


def test_the_environment_names_machine_versions_and_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "parity", "--model", "a b"])
    found = environment.environment()
    assert found["command"] == "python -m bench parity --model 'a b'"
    assert found["torch"] == torch.__version__
    assert {"commit", "processor", "cores", "gpu", "python", "transformers"} <= found.keys()
    with environment.threads(1):
        assert environment.environment()["threads"] == 1
    assert environment.environment()["threads"] == found["threads"]


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment.environment()["commit"] == "unknown"


def test_weights_are_known_by_their_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert environment.sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_peak_memory_counts_what_was_held() -> None:
    before = environment.peak_memory()
    held = torch.ones(64 << 20)  # 256 MiB
    assert environment.peak_memory() >= max(before, held.nbytes)


# --- parity -------------------------------------------------------------------------------------


def test_both_sides_agree_in_every_tensor_and_precision(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "--model", str(chat_model), "--output", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    written = json.loads((tmp_path / "parity.json").read_text("utf-8"))
    verdicts, every = written["tables"]
    assert [row[0] for row in verdicts["rows"]] == ["float64", "float32", "bfloat16"]
    assert {row[-1] for row in verdicts["rows"]} == {"equal"}
    for _, worst, name, tolerance, _ in verdicts["rows"]:
        assert worst <= tolerance
        assert name in [row[0] for row in every["rows"]]
    assert len(every["rows"]) == 5 + 2 * 14
    assert ["logits", "2 x 64 x 300"] in [row[:2] for row in every["rows"]]
    assert environment.sha256(chat_model / "model.safetensors") in page
    assert "the two agree." in page and "· torch " in page
    assert page.strip() == (tmp_path / "parity.md").read_text("utf-8").strip()


def exact_gelu(patch: pytest.MonkeyPatch, model: minigpt.GPT) -> None:
    for block in model.h:
        patch.setattr(block.mlp, "forward", lambda x, m=block.mlp: m.c_proj(F.gelu(m.c_fc(x))))


def another_epsilon(patch: pytest.MonkeyPatch, model: minigpt.GPT) -> None:
    model.h[1].ln_2.eps = 1e-6


def a_weight_that_is_no_number(patch: pytest.MonkeyPatch, model: minigpt.GPT) -> None:
    model.h[1].mlp.c_fc.bias.data[0] = math.nan


@pytest.mark.parametrize(
    ("mistake", "where", "difference"),
    [
        (exact_gelu, "h.0.mlp.gelu", None),
        (another_epsilon, "h.1.ln_2", None),
        (a_weight_that_is_no_number, "h.1.mlp.c_fc", "no number"),
    ],
)
def test_a_mistake_differs_where_it_was_made_and_exits_1(
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: Callable[[pytest.MonkeyPatch, minigpt.GPT], None],
    where: str,
    difference: str | None,
) -> None:
    load = minigpt.GPT.from_pretrained

    def wrong(*arguments: Any, **options: Any) -> minigpt.GPT:
        model = load(*arguments, **options)
        mistake(monkeypatch, model)
        return model

    monkeypatch.setattr(minigpt.GPT, "from_pretrained", wrong)
    flags = ["--model", str(chat_model), "--output", str(tmp_path)]
    assert main(["parity", *flags, "--dtype", "float64"]) == 1
    assert "**the two differ.**" in capsys.readouterr().out
    written = json.loads((tmp_path / "parity.json").read_text("utf-8"))
    verdicts, every = written["tables"]
    assert (written["passed"], verdicts["rows"][0][-1]) == (False, "DIFFERS")
    tolerance = parity.TOLERANCES["float64"]
    first = next(row for row in every["rows"] if row[2] == "no number" or row[2] > tolerance)
    assert first[0] == where
    assert difference is None or first[2] == verdicts["rows"][0][1] == difference


@pytest.mark.parametrize(
    ("kind", "allowed"), [("nf4", [1e-9, 1e-4, 0.05]), ("int8", [1e-3, 1e-3, 0.2])]
)
def test_a_quantized_model_is_compared_by_its_codes(
    tmp_path: Path, kind: str, allowed: list[float]
) -> None:
    config = minigpt.GPTConfig(
        vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=2, eos_token_id=None
    )
    model = minigpt.GPT(config, generator=torch.Generator().manual_seed(0)).eval()
    quant.save(quant.quantize(model, kind), tmp_path)
    found = parity.measure(tmp_path)
    assert found.passed, found.tables[0].rows
    assert [row[3] for row in found.tables[0].rows] == allowed
    plain = minigpt.GPT(config, generator=torch.Generator().manual_seed(0)).eval()
    ids = torch.arange(32)[None]
    assert not torch.allclose(plain(ids), model(ids), atol=1e-4)  # it is another model


def test_what_one_side_lacks_or_hides_is_no_number() -> None:
    a, hidden = torch.ones(2, 2), torch.tensor([[1.0, -math.inf], [1.0, 1.0]])
    ours = {"same": a, "ours": a, "shape": a, "mask": hidden, "nan": a * math.nan}
    theirs = {"same": a, "theirs": a, "shape": a[:1], "mask": a, "nan": a * math.nan}
    found = {name: parity.shown(d) for name, d in parity.differences(ours, theirs).items()}
    assert found.pop("same") == 0
    assert set(found) == {"ours", "theirs", "shape", "mask", "nan"}
    assert set(found.values()) == {"no number"}
    assert parity.differences({"x": hidden}, {"x": hidden}) == {"x": 0}


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 5, 64])
def test_caches_take_what_the_formula_says(chat_model: Path, window: int) -> None:
    # HF leaves the newest key out and keeps [-(W - 1):], which at W = 1 is [-0:], all of them.
    for side, slots in ((minigpt, window), (hf_bridge, window - 1 or 128)):
        whole = side.GPT.from_pretrained(chat_model, dtype=torch.float32)
        slid = side.GPT.from_pretrained(chat_model, dtype=torch.float32, sliding_window=window)
        a_token = 4 * 2 * whole.config.n_layer * whole.config.n_embd  # keys and values, float32
        assert memory.held(whole) == a_token * whole.config.n_positions
        assert memory.held(slid) == a_token * slots


def test_memory_shows_both_sides(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def process(*arguments: Any) -> int:
        asked.append(arguments)
        return 123_000_000

    monkeypatch.setattr(memory, "process", process)
    assert main(["memory", "--model", str(chat_model), "--sliding-window", "16"]) == 0
    page = capsys.readouterr().out
    model = minigpt.GPT.from_pretrained(chat_model, dtype=torch.float32)
    weights = memory.megabytes(sum(p.nbytes for p in model.parameters()))
    assert f"| weights | {weights} | {weights} |" in page
    assert "| cache, 128 tokens | 0.066 | 0.066 |" in page
    assert "| cache, window of 16 | 0.008 | 0.008 |" in page
    assert "| whole process | 123 | 123 |" in page
    assert asked == [(side, chat_model.resolve(), 64, 32) for side in ("minigpt", "hf_bridge")]


def test_a_whole_process_tells_its_peak(chat_model: Path) -> None:
    assert 50e6 < memory.process("minigpt", chat_model, 8, 4) < 2e9
    with pytest.raises(OSError, match=r"the process for nothing failed: .*No module named 'no"):
        memory.process("nothing", chat_model, 8, 4)


# --- speed --------------------------------------------------------------------------------------


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config.json of a model that takes no time; what is slow to measure is not measured."""
    sizes = {"vocab_size": 97, "n_positions": 80, "n_embd": 16, "n_layer": 1, "n_head": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**sizes, "bos_token_id": None, "eos_token_id": None}))
    monkeypatch.setattr(speed, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(speed, "start_to_first_token", lambda: "not measured")
    return path


def test_both_engines_get_a_speed_if_they_wrote_the_same(
    shape: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(shape), "--new-tokens", "4", "--runs", "2", "--threads", "1"]
    assert main(["speed", *flags]) == 0
    page = capsys.readouterr().out
    rows = [line.split(" | ") for line in page.splitlines() if " float32 |" in line]
    assert [row[0] for row in rows] == ["| minigpt float32", "| transformers generate float32"]
    assert all(float(row[1]) > 0 and row[-1] == "2 |" for row in rows)
    assert rows[1][3] == "1"  # HF beside itself
    assert "prefill 79 tokens/s" in page and "each token reads 0.0185 MB" in page


def test_an_engine_that_writes_other_tokens_gets_no_speed(
    shape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = speed.run_minigpt

    def wrong(*arguments: Any) -> tuple[list[int], list[float]]:
        tokens, times = right(*arguments)
        return [(token + 1) % 97 for token in tokens], times

    monkeypatch.setattr(speed, "run_minigpt", wrong)
    ours, theirs = speed.measure(None, config=shape, new_tokens=3, runs=1).tables[0].rows
    assert ours[:2] == ["minigpt float32", "other tokens than HF: no speed"]
    assert set(ours[2:]) == {"–"}
    assert theirs[1] > 0


def test_only_a_tie_may_be_broken_in_another_way() -> None:
    class Model(torch.nn.Module):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Any:
            logits = torch.tensor([1.0, 1.0 + 0.5 * speed.MARGIN, 1.0 - 1.5 * speed.MARGIN, -9.0])
            return type("Output", (), {"logits": logits.expand(1, ids.shape[1], 4)})

    ids, theirs = torch.zeros(1, 2, dtype=torch.int64), [1, 1, 1]
    assert speed.agree(Model(), ids, [1, 1, 1], theirs)
    assert speed.agree(Model(), ids, [1, 0, 3], theirs)  # after the tie they go their own ways
    assert not speed.agree(Model(), ids, [1, 2, 1], theirs)
    assert not speed.agree(Model(), ids, [3, 1, 1], theirs)
    assert not speed.agree(Model(), ids, [1, 1], theirs)


def test_the_weights_read_for_a_token_are_the_matrices() -> None:
    config = minigpt.GPTConfig(vocab_size=11, n_positions=8, n_embd=4, n_layer=3, n_head=2)
    model = minigpt.GPT(config)
    counted = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.wpe.weight.numel()
    assert speed.matrix_weights(config) == counted


# --- quality ------------------------------------------------------------------------------------

DIALOGUES = read()
JUDGE = quality.Judge(DIALOGUES)
TOPICS = list(DIALOGUES.topics)[::35]


def case(group: str, language: str = "es", **expected: Any) -> Case:
    return {"id": "x", "group": group, "language": language, "messages": [], **expected}


def say(topic: str, kind: str, language: str = "es") -> str:
    return DIALOGUES.topics[topic][f"{language} {kind}"][0]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_of_a_topic_is_judged_as_that_topic(language: str) -> None:
    for number, topic in enumerate(TOPICS):
        for kind in ("answer", *FOLLOW_UPS):
            reply = say(topic, kind, language)
            for group in ("named", "unnamed"):
                assert JUDGE.is_right(case(group, language, topic=topic), reply)
                other = case(group, language, topic=TOPICS[number - 1])
                assert not JUDGE.is_right(other, reply)
            for wanted in FOLLOW_UPS:
                asked = case("follow_up", language, topic=topic, kind=wanted)
                assert JUDGE.is_right(asked, reply) == (kind == wanted)


def test_a_small_slip_is_forgiven_and_a_mixture_is_not() -> None:
    a, b = (say(topic, "answer").split() for topic in TOPICS[:2])
    asked = case("named", topic=TOPICS[0])
    assert JUDGE.is_right(asked, " ".join(a[:-1]).upper())
    assert not JUDGE.is_right(asked, " ".join([*a[: len(a) // 2], *b[len(b) // 2 :], *b]))
    assert not JUDGE.is_right(asked, "")


@pytest.mark.parametrize("language", LANGUAGES)
def test_only_the_written_refusal_refuses(language: str) -> None:
    refusal = DIALOGUES.unknown[f"{language} reply"][0]
    asked = case("out_of_scope", language)
    assert JUDGE.is_right(asked, refusal)
    assert not JUDGE.is_right(asked, say(TOPICS[0], "answer", language))
    assert JUDGE.is_refusal(case("named", language, topic=TOPICS[0]), refusal)
    assert not JUDGE.is_right(case("named", language, topic=TOPICS[0]), refusal)


def test_memory_wants_all_words_whole_and_in_any_case() -> None:
    asked = case("memory", expect=["Ana", "17"])
    assert JUDGE.is_right(asked, "Te llamas ana y tienes 17 años.")
    for reply in ("Te llamas Ana.", "Te llamas Mariana y tienes 17.", "Ana, tienes 170."):
        assert not JUDGE.is_right(asked, reply)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("style", ["pirate", "brief", "formal", "child"])
def test_style_wants_the_manner_and_the_topic(style: str, language: str) -> None:
    pattern = DIALOGUES.styles[style][f"{language} pattern"][0]

    def styled(topic: str) -> str:
        kinds = ("answer", *FOLLOW_UPS)
        return pattern.format(**{kind: say(topic, kind, language) for kind in kinds})

    for number, topic in enumerate(TOPICS):
        asked = case("style", language, style=style, topic=topic)
        assert JUDGE.is_right(asked, styled(topic))
        assert not JUDGE.is_right(asked, styled(TOPICS[number - 1]))
        assert not JUDGE.is_right(asked, say(topic, "answer", language))


class Speaker:
    """An engine whose replies are a function of the messages."""

    name, context_length = "speaker", 512

    def __init__(self, answer: Callable[[list[dict[str, str]]], str]):
        self.answer, self.said = answer, ""

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        self.said = self.answer(messages)
        return [0]

    def stream(self, ids: Sequence[int], **options: Any) -> Iterator[int]:
        assert options["temperature"] == 0
        return iter([1])

    def decode(self, ids: Sequence[int]) -> str:
        return f" {self.said} "


def test_the_model_speaks_where_no_reply_is_written() -> None:
    engine = Speaker(lambda messages: str(len(messages)))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    asked = [*talk, {"role": "user", "content": "b"}]
    assert quality.converse(engine, case("memory") | {"messages": asked}) == "3"  # type: ignore[arg-type]
    assert talk[1]["content"] is None  # the case is as it was


def test_refusals_of_questions_in_scope_are_counted() -> None:
    refusal = {language: DIALOGUES.unknown[f"{language} reply"][0] for language in LANGUAGES}
    groups = ["named", "unnamed", "out_of_scope"]
    for language in LANGUAGES:
        engine = Speaker(lambda _, reply=refusal[language]: reply)
        found, failures = quality.measure(engine, JUDGE, groups, limit=3)  # type: ignore[arg-type]
        rows = {(row[0], row[1]): row[2:] for row in found.tables[0].rows}
        assert rows["out_of_scope", language] == [3, "100 %", "44–100 %", ">= 88 %", "yes"]
        assert rows["named", language] == [3, "0 %", "0–56 %", ">= 85 %", "no"]
        assert rows["in scope, refused", language] == [6, "100 %", "61–100 %", "<= 8 %", "no"]
        other = next(l for l in LANGUAGES if l != language)  # noqa: E741
        assert rows["out_of_scope", other][1] == "0 %"
        assert len(failures) == 4 * 3 + 3


def test_what_was_not_told_must_be_said_of_the_fact_that_was_asked() -> None:
    for language, (fact, sections) in product(LANGUAGES, DIALOGUES.memory.items()):
        asked = case("not_told", language, kind=fact)
        assert JUDGE.is_right(asked, sections[f"{language} unknown"][0])
        assert not JUDGE.is_right(asked, sections[f"{language} recall"][0])
        other = next(name for name in DIALOGUES.memory if name != fact)
        assert not JUDGE.is_right(asked, DIALOGUES.memory[other][f"{language} unknown"][0])
        assert not JUDGE.is_right(asked, DIALOGUES.unknown[f"{language} reply"][0])


def test_what_is_right_as_a_quote_alone_is_counted() -> None:
    """Whoever says the user's words again knows them, but not what they mean."""
    said = {language: DIALOGUES.repeat[f"{language} said"][0] for language in LANGUAGES}

    def answer(messages: list[dict[str, str]]) -> str:
        language = "es" if messages[-1]["content"] in spanish else "en"
        return said[language].replace("{text}", messages[0]["content"])

    cases = quality.unseen(["memory"], 5)[0]
    spanish = {c["messages"][-1]["content"] for c in cases if c["language"] == "es"}
    found, failures = quality.measure(Speaker(answer), JUDGE, ["memory"], limit=5)  # type: ignore[arg-type]
    assert f"instead of a fact: {10 - len(failures)}." in found.notes[-1] and len(failures) < 5


def test_a_share_below_its_aim_does_not_read_as_the_aim() -> None:
    assert [quality._share(*n) for n in ((84, 96), (88, 100), (8799, 10000), (0, 3))] == [
        "87.5 %",
        "88 %",
        "87.9 %",
        "0 %",
    ]


def test_a_group_named_twice_is_measured_once(
    chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(chat_model), "--limit", "1", "--group", "style", "--group", "style"]
    assert main(["quality", *flags]) == 0
    assert "| style | es | 1 | " in capsys.readouterr().out


def test_a_perfect_memory_meets_its_aim() -> None:
    cases = {c["messages"][-1]["content"]: c for c in quality.unseen(["memory"], 1)[0]}

    def answer(messages: list[dict[str, str]]) -> str:
        found = cases.get(messages[-1]["content"])
        return " ".join(found["expect"]) if found else "?"

    found, _ = quality.measure(Speaker(answer), JUDGE, ["memory"], limit=1)  # type: ignore[arg-type]
    assert [row[3] for row in found.tables[0].rows] == ["100 %", "100 %"]
    assert [row[6] for row in found.tables[0].rows] == ["yes", "yes"]


def test_quality_runs_a_real_model(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(chat_model), "--limit", "1", "--group", "named", "--failures"]
    threads = torch.get_num_threads()
    assert main(["quality", *flags]) == 0
    page = capsys.readouterr().out
    assert "| named | es | 1 | 0 % | 0–79 % | >= 85 % | no |" in page
    assert "named-en-001 " in page and "· threads 1 ·" in page
    assert torch.get_num_threads() == threads


# --- what the user gives ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parity", "--model", "./none"], "no directory './none': check the path"),
        (["parity", "--model", "tests"], "config.json is missing"),
        (["parity", "--model", "no-model"], "not in the cache, and the hub cannot be reached"),
        (["parity", "--dtype", "int3"],
         "dtype must be one of float64, float32, bfloat16, got 'int3'"),
        (["memory", "--model", "./none"], "no directory './none': check the path"),
        (["speed", "--model", "./none"], "no directory './none': check the path"),
        (["speed", "--model", "a", "--config", "b"], "give a model or the shape of a random one"),
        (["speed", "--new-tokens", "2"], "at least 3 new tokens and 1 run, got 2 and 5"),
        (["speed", "--config", "{shape}", "--new-tokens", "17"],
         "needs room for 81 tokens, but the context holds 80"),
        (["quality", "--group", "wisdom"], "group must be one of named, unnamed, memory"),
        (["quality", "--model", "./none"], "no directory './none': check the path"),
        (["speed", "--insert", "none.md"], "no document none.md"),
        (["speed", "--insert", "pyproject.toml"], "pyproject.toml must hold <!-- speed --> and"),
        (["speed", "--output", "pyproject.toml"], "pyproject.toml is a file: give a directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_exit_code_2(
    shape: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    arguments = [argument.replace("{shape}", str(shape)) for argument in arguments]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: ") and message in err


@pytest.mark.parametrize("flag", ["--new-tokens", "--runs", "--threads"])
@pytest.mark.parametrize("number", ["0", "-1", "1.5", "x", "nan"])
def test_a_count_is_a_whole_number(
    capsys: pytest.CaptureFixture[str], flag: str, number: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["speed", f"{flag}={number}"])
    assert ended.value.code == 2
    message = f"argument {flag}: must be a whole number of at least 1, got {number}"
    assert message in capsys.readouterr().err


def test_a_failure_of_the_system_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("download broke off")

    monkeypatch.setattr(parity, "measure", fail)
    assert main(["parity"]) == 1
    assert capsys.readouterr().err == "bench: download broke off\n"
    with pytest.raises(OSError, match="broke off"):
        main(["parity", "--debug"])


def test_what_was_measured_is_printed_also_if_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(parity, "measure", lambda *_, **__: record(passed=True))
    monkeypatch.setattr("bench.__main__.write", full)
    assert main(["parity", "--output", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "## Speed of light" in out
    assert err == "bench: no space left\n"
