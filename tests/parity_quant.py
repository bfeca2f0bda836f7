"""Checks of quantization against bitsandbytes: used by the tests, and by the teeth on broken code.

Each check fails by AssertionError.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from parity import new_pair, small_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitsAndBytesConfig, GPT2LMHeadModel

import hf_bridge
from hf_bridge import quant as bridge
from minigpt import GPT, blockwise, int8, quant

SHAPES = [  # (out, in)
    (96, 32),
    (192, 64),
    (64, 256),
    (2304, 768),
    (7, 13),
    (5, 64),
    (1, 1),
    (65, 63),
    (3, 129),
    (256, 1),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SETTINGS: list[dict[str, Any]] = [
    {"kind": "nf4"},
    {"kind": "nf4", "double_quant": True},
    {"kind": "fp4"},
    {"kind": "fp4", "double_quant": True},
    {"kind": "int8"},
]


def matrices(shapes: list[tuple[int, int]] = SHAPES) -> Iterator[Tensor]:
    """Random matrices of seven kinds, in three precisions."""
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        normal = torch.randn(shape, generator=generator)
        scales = torch.randn(shape[0], 1, generator=generator)
        table = blockwise.TABLES["nf4"]
        middle = (table[:-1] + table[1:]) / 2  # halfway between two codes
        halves = middle[torch.randint(15, shape, generator=generator)]
        halves[..., 0] = 1.0
        halves[::2] *= scales[::2].exp()  # where x / max and x * (1 / max) take different sides
        for matrix in (
            normal,
            0.02 * normal,
            normal * scales.exp(),  # rows of different size
            (4 * normal).round() / 4,  # ties
            halves,
            normal * (normal > 0.5),  # mostly zero
            torch.ones(shape),  # sizes that do not differ
        ):
            for dtype in DTYPES:
                yield matrix.to(dtype)


def check_4bit(kind: str, shapes: list[tuple[int, int]] = SHAPES) -> int:
    """Codes, sizes, nested sizes and the numbers they stand for, bit for bit; how many matrices."""
    count = 0
    for weight in matrices(shapes):
        packed, absmax = blockwise.quantize_4bit(weight, kind)
        theirs, state = bnb.quantize_4bit(weight, quant_type=kind)
        assert torch.equal(packed, theirs)
        assert torch.equal(absmax, state.absmax)
        _check_values(weight, packed, absmax, kind, theirs, state)
        codes, outer, offset = blockwise.quantize_absmax(absmax)
        theirs, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
        assert torch.equal(codes, state.absmax)
        assert torch.equal(outer, state.state2.absmax)
        assert torch.equal(offset, state.offset)
        _check_values(
            weight, packed, blockwise.dequantize_absmax(codes, outer, offset), kind, theirs, state
        )
        count += 1
    return count


def _check_values(
    weight: Tensor, packed: Tensor, absmax: Tensor, kind: str, theirs: Tensor, state: Any
) -> None:
    rows, columns = weight.shape
    if rows > 1 and columns % 64 and columns % 2 == 0:
        return  # what bitsandbytes unpacks wrongly
    values = blockwise.dequantize_4bit(packed, absmax, weight.shape, kind).to(weight.dtype)
    assert torch.equal(values, bnb.dequantize_4bit(theirs, state))


def check_int8_codes(shapes: list[tuple[int, int]] = SHAPES) -> int:
    """Codes and scales of weights, and the numbers they stand for, bit for bit."""
    count = 0
    for weight in matrices(shapes):
        codes, absmax = int8.quantize_rows(weight)
        theirs, scale, _ = bnb.int8_vectorwise_quant(weight.half())
        assert torch.equal(codes, theirs)
        assert torch.equal(absmax, scale)
        values = int8.dequantize_rows(codes, absmax)
        assert torch.equal(values, bnb.int8_vectorwise_dequant(theirs, scale))
        count += 1
    return count


def check_int8_forward(threshold: float = 6.0) -> None:
    """Products with outliers in some columns agree with bitsandbytes' kernels, relatively."""
    generator = torch.Generator().manual_seed(1)
    for rows, inputs, outputs in ((1, 64, 48), (7, 64, 64), (20, 192, 33), (3, 13, 5)):
        x = torch.randn(rows, inputs, generator=generator)
        x[rows // 2, 3] = 9.0
        x[0, inputs // 2] = -6.0  # just an outlier
        x[0, inputs // 2 + 1] = 5.99
        if rows > 1:
            x[-1, 3] = 5.0  # no outlier, but in an outlier's column, and its row's largest
        weight = torch.randn(outputs, inputs, generator=generator)
        bias = torch.randn(outputs, generator=generator)
        codes, scale = int8.quantize_rows(weight)
        ours = int8.linear(x, codes, scale, bias, threshold)
        x_codes, x_scale, outliers = bnb.int8_vectorwise_quant(x.half(), threshold=threshold)
        theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            x, x_codes, codes, x_scale, scale, outliers, bias
        )
        difference = (ours - theirs).abs().max() / theirs.abs().max()
        assert difference <= 1e-6, f"{difference:.2g} of the largest number"


class Checkpoint:
    """A float32 checkpoint whose shapes bitsandbytes computes rightly."""

    def __init__(self, folder: Path):
        config = small_config(n_embd=64, n_head=4)
        self.folder = new_pair(folder, config).folder
        self.ids = torch.randint(
            config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(2)
        )

    def ours(self, **settings: Any) -> GPT:
        """The checkpoint in float32, quantized."""
        return quant.quantize(GPT.from_pretrained(self.folder, dtype=torch.float32), **settings)

    def theirs(self, *, kind: str, double_quant: bool = False) -> GPT2LMHeadModel:
        """The same by transformers, its 4-bit layers kept from repacking themselves."""
        four = kind != "int8"
        settings = BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type=kind if four else "fp4",
            bnb_4bit_use_double_quant=double_quant,
        )
        return guarded(
            GPT2LMHeadModel.from_pretrained(
                self.folder, dtype=torch.float32, quantization_config=settings
            )
        )


def guarded(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Without the flag a 4-bit layer computes in bfloat16 on CPUs that have AVX512-BF16."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.no_grad()
def check_logits(checkpoint: Checkpoint, **settings: Any) -> None:
    """A whole quantized model against transformers with bitsandbytes, and against the bridge."""
    ours = checkpoint.ours(**settings)(checkpoint.ids)
    mask = torch.ones_like(checkpoint.ids)
    theirs = checkpoint.theirs(**settings)(checkpoint.ids, attention_mask=mask).logits
    twin = hf_bridge.GPT.from_pretrained(checkpoint.folder, dtype=torch.float32)
    bridged = bridge.quantize(twin, **settings)(checkpoint.ids)
    limit = 1e-3 if settings["kind"] == "int8" else 1e-6
    for other in (theirs, bridged):
        difference = (ours - other).abs().max().item()
        assert difference <= limit * max(1, other.abs().max().item()), difference


def check_files(checkpoint: Checkpoint, folder: Path, **settings: Any) -> None:
    """What both sides write is the same, tensor for tensor; transformers loads ours whole."""
    quant.save(checkpoint.ours(**settings), folder / "ours")
    checkpoint.theirs(**settings).save_pretrained(folder / "theirs")
    ours, theirs = (load_file(folder / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    loaded, report = GPT2LMHeadModel.from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(report.values()), report
    mask = torch.ones_like(checkpoint.ids)
    with torch.no_grad():
        expected = checkpoint.theirs(**settings)(checkpoint.ids, attention_mask=mask).logits
        assert torch.equal(guarded(loaded)(checkpoint.ids, attention_mask=mask).logits, expected)
