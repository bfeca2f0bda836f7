"""Step 16: the tensors inside are the model's own, on both sides, and looking changes nothing."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from parity import TOLERANCE, Pair, assert_close

import hf_bridge
import hf_bridge.__main__
import minigpt.__main__
from hf_bridge import picture as hf_picture
from hf_bridge import trace as hf_trace
from minigpt import GPT, Tokenizer, picture, trace
from minigpt.attention import attend_fused

WINDOWS = [(None, 0), (5, 0), (5, 2), (1, 0), (100, 0)]


def both(pair: Pair, window: int | None = None, sinks: int = 0) -> tuple[GPT, hf_bridge.GPT]:
    options = {"dtype": torch.float64, "sliding_window": window, "attention_sinks": sinks}
    return (
        GPT.from_pretrained(pair.folder, **options),
        hf_bridge.GPT.from_pretrained(pair.folder, **options),
    )


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
def test_every_tensor_inside_is_transformers_own(
    pair: Pair, window: int | None, sinks: int
) -> None:
    ours, theirs = both(pair, window, sinks)
    ids = pair.ids(B=2, T=19)
    a, b = trace.trace(ours, ids), hf_trace.trace(theirs, ids)
    assert list(a) == list(b)
    for name in a:
        assert a[name].shape == b[name].shape, name
        hidden = a[name].isneginf()
        assert torch.equal(hidden, b[name].isneginf()), name
        assert_close(a[name].masked_fill(hidden, 0), b[name].masked_fill(hidden, 0))


def test_names_and_shapes_are_these(pair: Pair) -> None:
    seen = trace.trace(pair.ours, pair.ids(B=2, T=7))
    outer = {"wte", "wpe", "embeddings", "ln_f", "logits"}
    attention = ("q", "k", "v", "scores", "pattern", "heads", "c_proj")
    inner = {f"attn.{part}" for part in attention} | {
        f"mlp.{p}" for p in ("c_fc", "gelu", "c_proj")
    }
    inner |= {"ln_1", "residual_1", "ln_2", "residual_2"}
    assert set(seen) == outer | {f"h.{i}.{name}" for i in range(3) for name in inner}
    shapes = {  # B = 2, T = 7, C = 48, H = 4, D = 12
        **dict.fromkeys(("q", "k", "v", "heads"), (2, 4, 7, 12)),
        **dict.fromkeys(("scores", "pattern"), (2, 4, 7, 7)),
        **dict.fromkeys(("c_fc", "gelu"), (2, 7, 192)),
        "logits": (2, 7, 97),
    }
    for name, tensor in seen.items():
        assert tensor.shape == shapes.get(name.split(".")[-1], (2, 7, 48)), name


def test_the_parts_fit_together(pair: Pair) -> None:
    seen, H = trace.trace(pair.ours, pair.ids(B=2, T=9)), pair.ours.config.n_head
    assert_close(seen["wte"] + seen["wpe"], seen["embeddings"])
    stream = seen["embeddings"]
    for i in range(pair.ours.config.n_layer):
        part = {name.removeprefix(f"h.{i}."): tensor for name, tensor in seen.items()}
        pattern = part["attn.pattern"]
        ones = torch.ones(2, H, 9, dtype=torch.float64)
        assert_close(pattern.sum(-1), ones)
        assert (pattern.triu(1) == 0).all()
        assert_close(part["attn.scores"].softmax(-1), pattern)
        assert_close(pattern @ part["attn.v"], part["attn.heads"])
        assert_close(stream + part["attn.c_proj"], part["residual_1"])
        stream = part["residual_1"] + part["mlp.c_proj"]
        assert_close(stream, part["residual_2"])
    assert_close(seen["logits"], pair.ours(pair.ids(B=2, T=9)))


@pytest.mark.parametrize("side", [0, 1], ids=["minigpt", "hf_bridge"])
@pytest.mark.parametrize("fails", [False, True])
def test_looking_leaves_the_model_as_it_was(pair: Pair, side: int, fails: bool) -> None:
    model, ids = both(pair, window=4)[side], pair.ids(T=6)
    look = (trace, hf_trace)[side].trace
    before = model(ids)
    if fails:
        last = list(model.modules())[-1]

        def fail(*_: object) -> None:
            raise RuntimeError("in the middle")

        handle = last.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            look(model, ids)
        handle.remove()
    else:
        look(model, ids)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert getattr(module, "attend", attend_fused) is attend_fused
    if side:
        assert model.hf.config._attn_implementation == "sdpa_window_4_0"
        assert hf_trace.NAME not in hf_trace.ALL_ATTENTION_FUNCTIONS
    assert torch.equal(model(ids), before)


def test_a_trace_notices_a_wrong_tensor_where_it_is_made(pair: Pair) -> None:
    ours, theirs = both(pair)
    with torch.no_grad():
        ours.h[1].ln_2.weight += 1e-3
    a, b = trace.trace(ours, pair.ids()), hf_trace.trace(theirs, pair.ids())
    wrong = [n for n in a if (a[n] - b[n]).nan_to_num().abs().max() > TOLERANCE]
    assert wrong[0] == "h.1.ln_2"
    assert wrong[-1] == "logits"


@pytest.mark.parametrize("shown", [picture, hf_picture], ids=["minigpt", "hf_bridge"])
def test_a_table_has_a_line_per_tensor(shown: object, pair: Pair) -> None:
    seen = trace.trace(pair.ours, pair.ids(T=5))
    lines = shown.table({**seen, "broken": torch.full((2,), math.nan)}).splitlines()
    assert [line.split()[0] for line in lines] == ["name", *seen, "broken"]
    assert lines[1].split()[1:6] == ["1", "x", "5", "x", "48"]
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[2:] == ["nan"] * 4


@pytest.mark.parametrize("side", ["minigpt", "hf_bridge"])
def test_the_command_prints_the_table_and_draws(
    side: str, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main = (minigpt.__main__ if side == "minigpt" else hf_bridge.__main__).main
    path = tmp_path / "heads.png"
    line = ["trace", "--model", str(chat_model), "¿Qué $x$ 😀?", "--sliding-window", "3"]
    assert main([*line, "--attention", "1", "--output", str(path)]) == 0
    out, told = capsys.readouterr()
    assert out.startswith("name ") and "\nlogits " in out
    assert told == f"wrote {path}\n"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["heads.png"]
    assert main([*line, "--attention", "2", "--output", str(path)]) == 2
    assert "--attention must be a layer from 0 to 1, got 2" in capsys.readouterr().err
    assert main([*line, "--output", str(path)]) == 2
    assert capsys.readouterr() == (
        "",
        "trace: --output is the drawing's file: tell the layer too, --attention LAYER\n",
    )


def test_labels_show_spaces_and_parts_of_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" la\n😀")
    words = picture.labels(tokenizer, ids)
    assert words[0].startswith("·") and "↵" in words
    assert words[-1] == f"#{ids[-1]}"


def test_a_picture_wants_a_word_per_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there must be a word for each of 3 tokens, got 2"):
        picture.draw(torch.zeros(2, 3, 3), ["a", "b"], tmp_path / "x.png")


@pytest.mark.parametrize("name", ["", "heads", "heads.jpg", "folder.png"])
def test_a_picture_is_a_png_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"must be a file that ends in \.png, got '.*" + name):
        picture.draw(torch.ones(1, 1, 1), ["a"], tmp_path / name)


def test_a_word_that_the_font_lacks_or_that_is_too_long_can_be_read() -> None:
    assert picture._legible(["·ñ↵", "日x", "\x00", "-" * 16]) == [
        "·ñ↵",
        "U+65E5x",
        "U+0000",
        "-" * 16,
    ]
    assert picture._legible(["-" * 17]) == ["-" * 15 + "…"]


@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (3, 2), (12, 40), (25, 200)])
def test_a_picture_of_any_size_is_quiet_and_fits_a_screen(
    heads: int, tokens: int, tmp_path: Path
) -> None:
    pattern = torch.ones(heads, tokens, tokens).tril().softmax(-1).tril()
    words = ["日$x^", "·a", "#176", "↵"] * tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a missing letter, of a layout that finds no room
        picture.draw(pattern, words[:tokens], tmp_path / "x.png", title="$a")
    header = (tmp_path / "x.png").read_bytes()[16:24]
    assert max(int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")) <= 2400


def test_both_sides_show_a_trace_alike() -> None:
    a, b = (
        Path(m.__file__ or "").read_text("utf-8").split("\n", 1)[1] for m in (picture, hf_picture)
    )
    assert a.replace("minigpt", "hf_bridge") == b
