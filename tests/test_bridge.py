"""Swap the import and the line still runs: hf_bridge answers as minigpt does, ways and all."""

import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from parity import Pair, assert_close, in_pieces
from test_weights import test_damage_is_named as damages

import hf_bridge
import hf_bridge.engine
import hf_bridge.tokenizer
import minigpt
import minigpt.engine
import minigpt.tokenizer
from hf_bridge.__main__ import main as hf_main
from minigpt.__main__ import main

SIDES = [minigpt, hf_bridge]
WINDOWS = [(None, 0), (1, 0), (2, 0), (5, 0), (5, 2), (60, 0)]
OPTIONS = [
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.3},
    {"temperature": 3.0, "eos_token_id": 5, "max_new_tokens": 30},
    {"prefill_chunk_size": 6},
]


@pytest.fixture(scope="module")
def both(pair: Pair) -> Callable[..., list]:
    """both(window, sinks): the pair's checkpoint in float64, opened once by each side."""

    @cache
    def load(window: int | None = None, sinks: int = 0) -> list:
        options = {"sliding_window": window, "attention_sinks": sinks, "dtype": torch.float64}
        return [side.GPT.from_pretrained(pair.folder, **options) for side in SIDES]

    return load


@torch.no_grad()
@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
def test_both_give_the_same_logits_through_every_cache(
    both: Callable[..., list], pair: Pair, window: int | None, sinks: int
) -> None:
    ours, theirs = both(window, sinks)
    ids = pair.ids(B=2)
    want = ours(ids)
    assert_close(theirs(ids), want)
    for pieces in ((24,), (9, 1, 14), (1,) * 24):
        assert_close(in_pieces(ours, ids, pieces, ours.new_cache(2)), want)
        assert_close(in_pieces(theirs, ids, pieces, theirs.new_cache(2)), want)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (5, 0), (5, 2)])
@pytest.mark.parametrize("options", OPTIONS)
def test_both_draw_the_same_tokens_for_unequal_rows_and_in_a_stream(
    both: Callable[..., list], pair: Pair, window: int | None, sinks: int, options: dict
) -> None:
    models, ids = both(window, sinks), pair.ids(B=3, T=20)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :7] = 0, 0
    for attention_mask in (None, mask):
        rows = [
            side.generate(
                model,
                ids,
                attention_mask=attention_mask,
                generator=torch.Generator().manual_seed(3),
                **options,
            )
            for side, model in zip(SIDES, models)
        ]
        assert rows[0].tolist() == rows[1].tolist()
    streams = [
        side.stream(model, ids[:1], generator=torch.Generator().manual_seed(3), **options)
        for side, model in zip(SIDES, models)
    ]
    assert list(streams[0]) == list(streams[1])


def test_a_closed_stream_has_drawn_nothing_ahead(both: Callable[..., list], pair: Pair) -> None:
    _, theirs = both()
    cache, ids = theirs.new_cache(), pair.ids(T=5)
    state = torch.random.get_rng_state()
    tokens = hf_bridge.stream(
        theirs, ids, cache=cache, generator=torch.Generator().manual_seed(0), max_new_tokens=50
    )
    first = [next(tokens), next(tokens), next(tokens)]
    tokens.close()
    assert len(first) == 3
    assert cache.length == 5 + 2  # all but the last token, and not one more
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_error_in_the_thread_reaches_the_reader(
    both: Callable[..., list], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, theirs = both()

    def broken(*_arguments, **_options):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(theirs.hf, "forward", broken)
    with pytest.raises(RuntimeError, match="no more memory"):
        list(hf_bridge.stream(theirs, pair.ids(T=5)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -1.0}, "temperature must be a number of 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be a number of 0 or more, got nan"),
        ({"top_k": -1}, r"top_k must be a whole number of 0 \(off\) or more, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0, got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 60}, "needs room for 65 tokens, but the context holds 64"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_any_forward(
    both: Callable[..., list],
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    side: ModuleType,
    options: dict,
    sentence: str,
) -> None:
    model = both()[SIDES.index(side)]
    monkeypatch.setattr(torch.nn.Embedding, "forward", None)  # a forward would fail otherwise
    for function in (side.generate, side.stream):
        with pytest.raises(ValueError, match=sentence):
            function(model, pair.ids(T=5), **options)


def test_both_engines_render_reuse_and_reply_alike(chat_model: Path) -> None:
    engines = [minigpt.engine.Engine, hf_bridge.engine.Engine]
    messages = [{"role": "user", "content": "Hola <|endoftext|> caché"}]
    seen = []
    for engine in [kind.from_pretrained(chat_model) for kind in engines]:
        prompt = engine.render(messages)
        reply = list(engine.stream(prompt, max_new_tokens=8, seed=1))
        stopped = engine.stream([*prompt, *reply[:3]], max_new_tokens=8, seed=2)
        begun, reused = [next(stopped), next(stopped)], engine.reused
        stopped.close()
        again = list(engine.stream([*prompt, 3, 4, 5], max_new_tokens=8, seed=3))
        seen.append((prompt, reply, begun, reused, again, engine.reused, engine.stop))
    assert seen[0] == seen[1]
    assert seen[0][3] >= len(seen[0][0])  # the second prompt found the first one in the cache
    assert seen[0][5] == len(seen[0][0])


def test_both_decoders_show_the_same_text_for_any_bytes(chat_model: Path) -> None:
    ours = minigpt.tokenizer.Tokenizer.from_pretrained(chat_model)
    theirs = hf_bridge.tokenizer.Tokenizer.from_pretrained(chat_model)
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(len(ours)) for _ in range(30)]
        shown = []
        for decoder in (
            minigpt.tokenizer.StreamDecoder(ours),
            hf_bridge.tokenizer.StreamDecoder(theirs),
        ):
            shown.append("".join(map(decoder.feed, ids)) + decoder.flush())
        assert shown[0] == shown[1] == ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt", "la caché", "--seed", "1", "--max_new_tokens", "8"],
        ["generate", "--prompt", "x", "--temperature", "0", "--sliding-window", "4"],
        ["generate", "--prompt", "x", "--top-p", "2"],
        ["generate", "--prompt", "x", "--max-new-tokens", "900"],
        ["tokenize", "¿Qué es <|endoftext|>?"],
    ],
)
def test_both_command_lines_print_and_refuse_alike(
    chat_model: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    outcomes = []
    for command in (main, hf_main):
        code = command([*words, "--model", str(chat_model)])
        outcomes.append((code, *capsys.readouterr()))
    assert outcomes[0] == outcomes[1]
    assert "".join(outcomes[0][1:]).strip()


@pytest.mark.parametrize("damage", [row[0] for row in damages.pytestmark[0].args[1]])
def test_both_say_the_same_of_damaged_weights(pair: Pair, tmp_path: Path, damage) -> None:
    folder = shutil.copytree(pair.folder, tmp_path / "model")
    damage(folder)
    sentences = []
    for side in SIDES:
        with pytest.raises(side.WeightsError) as error:
            side.GPT.from_pretrained(folder)
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1]


@pytest.mark.parametrize(
    "published",
    [None, "no JSON", "[]", '{"model_type": "bert"}', '{"n_head": 7}', '{"n_layer": 0}'],
)
def test_both_say_the_same_of_a_config_that_is_none(
    pair: Pair, tmp_path: Path, published: str | None
) -> None:
    folder = shutil.copytree(pair.folder, tmp_path / "model")
    (folder / "config.json").unlink()
    if published is not None:
        (folder / "config.json").write_text(published)
    sentences = []
    for side in SIDES:
        with pytest.raises(ValueError, match=r"config\.json") as error:
            side.GPT.from_pretrained(folder)
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1]


def test_what_the_bridge_saves_minigpt_loads_whole(pair: Pair, tmp_path: Path) -> None:
    theirs = hf_bridge.GPT.from_pretrained(pair.folder, sliding_window=5, attention_sinks=1)
    theirs.save_pretrained(tmp_path)
    assert "window" not in (tmp_path / "config.json").read_text()  # a way to run, not the model
    ours = minigpt.GPT.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert_close(ours(pair.ids()), pair.ours(pair.ids()))
