"""Where parts lie and which kernel attends changes no logit; what cannot be had is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import Pair, assert_close

import hf_bridge
from hf_bridge import placement
from hf_bridge.__main__ import main
from hf_bridge.generate import generate
from minigpt import GPT, quant

BLOCK = "transformer.h.1"
ON_DISK = {"": "cpu", BLOCK: "disk", "transformer.ln_f": "disk"}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what lacks without a GPU")


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, ON_DISK], ids=str)
@torch.no_grad()
def test_every_placement_and_kernel_gives_the_same_logits_and_tokens(
    pair: Pair, device_map: Any, kernel: str
) -> None:
    model = placement.load(
        pair.folder, dtype=torch.float64, device_map=device_map, attn_implementation=kernel
    )
    assert model.hf.config._attn_implementation == kernel
    ids = pair.ids(B=2).to(model.device)
    assert_close(model(ids).cpu(), pair.expected(ids.cpu()))
    cache = model.new_cache(2)
    pieces = [model(ids[:, :9], cache=cache), model(ids[:, 9:], cache=cache)]
    assert_close(torch.cat(pieces, dim=1).cpu(), pair.expected(ids.cpu()))
    expected = hf_bridge.GPT.from_pretrained(pair.folder, dtype=torch.float64)
    rows = [generate(m, ids.to(m.device), temperature=0.0) for m in (model, expected)]
    assert torch.equal(rows[0].cpu(), rows[1])


def test_a_part_on_disk_takes_no_memory_before_and_after_its_turn(pair: Pair) -> None:
    model = placement.load(pair.folder, device_map=ON_DISK)
    offloaded = {n for n, p in model.hf.named_parameters() if p.device.type == "meta"}
    assert offloaded == {
        n for n, _ in model.hf.named_parameters() if n.startswith((f"{BLOCK}.", "transformer.ln_f"))
    }
    model(pair.ids(T=5))
    assert {n for n, p in model.hf.named_parameters() if p.device.type == "meta"} == offloaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_part_on_disk_has_the_dtype_that_was_asked(pair: Pair, dtype: torch.dtype) -> None:
    ids = pair.ids(T=5)
    offloaded = placement.load(pair.folder, dtype=dtype, device_map=ON_DISK)
    expected = hf_bridge.GPT.from_pretrained(pair.folder, dtype=dtype)
    assert torch.equal(offloaded(ids), expected(ids))
    assert offloaded(ids).dtype == dtype


def test_a_window_slides_over_parts_on_disk(pair: Pair) -> None:
    how = {"dtype": torch.float64, "sliding_window": 5, "attention_sinks": 2}
    ids = pair.ids(B=2)
    expected = GPT.from_pretrained(pair.folder, **how)
    assert_close(placement.load(pair.folder, device_map=ON_DISK, **how)(ids), expected(ids))


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Path:
    """The chat model in int8: any shape will do."""
    folder = tmp_path_factory.mktemp("codes")
    quant.save(quant.quantize(GPT.from_pretrained(chat_model), "int8"), folder)
    return folder


@torch.no_grad()
def test_a_quantized_model_lies_on_one_device(codes: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    expected = hf_bridge.GPT.from_pretrained(codes)(ids)
    model = placement.load(codes, device_map="auto", attn_implementation="eager")
    assert model.hf.config._attn_implementation == "eager"
    assert (model(ids.to(model.device)).cpu() - expected).abs().max() < 1e-3  # int8
    with pytest.raises(
        ValueError,
        match="a quantized model lies on one device: device_map must be cpu, cuda or auto, "
        "got cpu and disk",
    ):
        placement.load(codes, device_map=ON_DISK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"device_map": {"": "cpu", "h.1": "disk", "transformer.h.9": "cpu"}},
            "device_map must name parts from transformer.wte, transformer.h.0 … to lm_head, or '' "
            "for the rest, got 'h.1', 'transformer.h.9'",
        ),
        (
            {"device_map": {"transformer.wte": "cpu", "transformer.wpe": "cpu", "lm_head": "cpu"}},
            "device_map leaves out transformer.h.0, ",
        ),
        (
            {"device_map": "disk"},
            "transformer.wte must stay in memory: only blocks and ln_f can be on disk",
        ),
        (
            {"device_map": "tpu"},
            "device_map must say auto, cpu, cuda, cuda:N or disk, got 'tpu'",
        ),
        (
            {"device_map": {"": 3.5}},
            "device_map must say auto, cpu, cuda, cuda:N or disk, got 3.5",
        ),
        (
            {"attn_implementation": "flash"},
            "attn_implementation must be one of sdpa, eager, flash_attention_2, got 'flash'",
        ),
        (
            {"attn_implementation": "eager", "sliding_window": 4},
            "a sliding window is for attn_implementation sdpa, got eager",
        ),
        ({"sliding_window": 0}, "window must be at least 1 (a token sees itself), got 0"),
    ],
)
def test_what_is_no_placement_is_refused_with_what_is_one(
    pair: Pair, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        placement.load(pair.folder, **settings)
    assert message in str(error.value)


@needs_no_gpu
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--device-map", "cuda"],
            "device_map cuda cannot be had, there is no GPU: use cpu or auto",
        ),
        (
            ["--device-map", json.dumps({"": "cpu", BLOCK: "cuda:1"})],
            "device_map cuda:1 cannot be had, there is no GPU: use cpu or auto",
        ),
        (
            ["--attn-implementation", "flash_attention_2"],
            "attn_implementation flash_attention_2 needs a CUDA GPU and the package flash-attn: "
            "use sdpa or eager",
        ),
        (
            ["--device-map", "{cpu}"],
            "--device-map is not valid JSON: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
    ],
)
def test_what_cannot_be_had_here_is_one_line_with_what_can(
    chat_model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["generate", "--model", str(chat_model), "--prompt", "x", *flags]) == 2
    assert capsys.readouterr() == ("", f"generate: {message}\n")


@needs_no_gpu
def test_with_a_gpu_flash_attention_still_needs_half_precision(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flash = {"attn_implementation": "flash_attention_2"}
    with pytest.raises(ValueError, match="flash_attention_2 needs the package flash-attn: use sdp"):
        placement.load(pair.folder, **flash)
    monkeypatch.setattr(placement, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(ValueError, match=r"float16 or bfloat16, got torch\.float32"):
        placement.load(pair.folder, dtype=torch.float32, **flash)


@pytest.mark.parametrize(
    "flags",
    [
        ["--device-map", "cpu"],
        ["--device-map", "auto", "--attn-implementation", "eager"],
        ["--device-map", json.dumps(ON_DISK)],
    ],
    ids=" ".join,
)
def test_the_command_prints_the_same_text_wherever_parts_lie(
    chat_model: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    words = ["generate", "--model", str(chat_model), "--prompt", "la caché", "--seed", "1"]
    assert main([*words, "--max-new-tokens", "8"]) == 0
    expected = capsys.readouterr()
    assert main([*words, "--max-new-tokens", "8", *flags]) == 0
    assert capsys.readouterr() == expected


def test_quantizing_is_done_on_one_device(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", "--model", str(chat_model), "--bits", "8", "--output", str(tmp_path / "q")]
    for place in ("auto", json.dumps(ON_DISK)):
        assert main([*words, "--device-map", place]) == 2
        message = (
            f"quantize: --device-map must be cpu or cuda: all is quantized there, got {place!r}\n"
        )
        assert capsys.readouterr().err == message
    assert not (tmp_path / "q").exists()
    assert main([*words, "--device-map", "cpu"]) == 0
    assert hf_bridge.GPT.from_pretrained(tmp_path / "q").hf.is_quantized
