"""The checks of quantization bite: each classic mistake, made on purpose, is caught by one.

A mistake changes a function of minigpt for the length of a test; bitsandbytes stays as it is.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity_quant import (
    Checkpoint,
    check_4bit,
    check_files,
    check_int8_codes,
    check_int8_forward,
    check_logits,
)
from torch import Tensor

from minigpt import blockwise, bnb_files, int8
from minigpt.quant_linear import Linear4bit, Linear8bit

Patch = pytest.MonkeyPatch
SMALL = [(96, 64), (7, 13), (65, 63)]  # (out, in): whole blocks, and blocks cut short
LARGE = [(768, 768)]  # 9216 blocks: enough sizes to tell the nearest code from a cell's
BLOCKS = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices as small as these are slower in two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("checkpoint"))


def nibbles_swapped(patch: Patch) -> None:
    quantize = blockwise.quantize_4bit

    def swapped(x: Tensor, kind: str = "nf4", block_size: int = BLOCKS) -> tuple[Tensor, Tensor]:
        packed, absmax = quantize(x, kind, block_size)
        return packed << 4 | packed >> 4, absmax

    patch.setattr(blockwise, "quantize_4bit", swapped)


def nibbles_swapped_in_reading(patch: Patch) -> None:
    dequantize = blockwise.dequantize_4bit
    patch.setattr(
        blockwise, "dequantize_4bit", lambda packed, *a: dequantize(packed << 4 | packed >> 4, *a)
    )


def a_half_rounds_up(patch: Patch) -> None:
    midpoints = blockwise.midpoints
    lowest = torch.tensor(-torch.inf)
    patch.setattr(blockwise, "midpoints", lambda table: midpoints(table).nextafter(lowest))


def divided_by_the_largest(patch: Patch) -> None:
    patch.setattr(blockwise, "_scale", partial(scale, of_blocks=torch.div))


def block_cut_short_by_the_reciprocal(patch: Patch) -> None:
    patch.setattr(blockwise, "_scale", partial(scale, of_tail=lambda x, largest: x * (1 / largest)))


def largest_without_its_sign(patch: Patch) -> None:
    patch.setattr(blockwise, "_scale", partial(scale, size=lambda x: x))


def scale(
    x: Tensor,
    block_size: int,
    *,
    of_blocks: Callable[[Tensor, Tensor], Tensor] = lambda x, largest: x * (1 / largest),
    of_tail: Callable[[Tensor, Tensor], Tensor] = torch.div,
    size: Callable[[Tensor], Tensor] = torch.abs,
) -> tuple[Tensor, Tensor]:
    """As blockwise._scale is; each mistake changes one part."""
    flat = x.flatten().float()
    full = len(flat) // block_size * block_size
    blocks, tail = flat[:full].view(-1, block_size), flat[full:]
    absmax = size(blocks).amax(dim=1).clamp(min=0)
    scaled = of_blocks(blocks, absmax.clamp(min=1e-38)[:, None]).flatten()
    if len(tail):
        largest = size(tail).amax().clamp(min=1e-38)
        absmax, scaled = (
            torch.cat([absmax, largest[None]]),
            torch.cat([scaled, of_tail(tail, largest)]),
        )
    return scaled.clamp(-1, 1), absmax


def table_of_fp4_sorted(patch: Patch) -> None:
    patch.setitem(blockwise.TABLES, "fp4", blockwise.TABLES["fp4"].sort().values)


def table_of_fp4_not_divided(patch: Patch) -> None:
    patch.setitem(blockwise.TABLES, "fp4", blockwise.TABLES["fp4"] * 12)


def offset_forgotten(patch: Patch) -> None:
    dequantize = blockwise.dequantize_absmax
    patch.setattr(
        blockwise,
        "dequantize_absmax",
        lambda codes, outer, offset: dequantize(codes, outer, torch.zeros_like(offset)),
    )


def offset_not_taken_off(patch: Patch) -> None:
    quantize = blockwise.quantize_absmax

    def whole(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, outer, _ = quantize(torch.cat([absmax, -absmax]))  # whose mean is zero
        return codes[: len(absmax)], outer[: -(-len(absmax) // 256)], absmax.mean()

    patch.setattr(blockwise, "quantize_absmax", whole)


def nested_blocks_as_small_as_the_others(patch: Patch) -> None:
    patch.setattr(blockwise, "NESTED_BLOCK", BLOCKS)


def nested_codes_that_are_the_nearest(patch: Patch) -> None:
    def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, outer, offset = right(absmax)
        inverse = (1 / outer).repeat_interleave(256)[: len(absmax)]
        scaled = ((absmax - offset) * inverse).nan_to_num(nan=-1).clamp(-1, 1)
        codes = torch.bucketize(scaled, blockwise.midpoints(blockwise.dynamic_map()))
        return codes.to(torch.uint8), outer, offset

    right = blockwise.quantize_absmax
    patch.setattr(blockwise, "quantize_absmax", quantize_absmax)


def square_matrix_transposed(patch: Patch) -> None:
    from_float = Linear4bit.from_float

    def transposed(weight: Tensor, bias: Tensor, **settings: Any) -> Linear4bit:
        square = weight.shape[0] == weight.shape[1]
        return from_float(weight.T.contiguous() if square else weight, bias, **settings)

    patch.setattr(Linear4bit, "from_float", transposed)


def computed_in_bfloat16(patch: Patch) -> None:
    def forward(self: Linear4bit, x: Tensor) -> Tensor:
        weight, bias = self.dequantize().bfloat16(), self.bias.bfloat16()
        return F.linear(x.bfloat16(), weight, bias).to(x.dtype)

    patch.setattr(Linear4bit, "forward", forward)


def bias_dropped(patch: Patch) -> None:
    linear = int8.linear
    patch.setattr(int8, "linear", lambda x, codes, absmax, bias, *a: linear(x, codes, absmax, *a))


def int8_scale_of_columns(patch: Patch) -> None:
    quantize = int8.quantize_rows

    def by_columns(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax = quantize(x.T)
        return codes.T.contiguous(), absmax

    patch.setattr(int8, "quantize_rows", by_columns)


def quantize_rows(
    x: Tensor, precise: bool = False, nearest: Callable[[Tensor], Tensor] = torch.round
) -> tuple[Tensor, Tensor]:
    """As int8.quantize_rows is; each mistake changes one part."""
    x = x if precise else x.half()
    absmax = x.abs().amax(dim=1).float()
    return nearest((x * (127 / absmax)[:, None]).nan_to_num(nan=0)).to(torch.int8), absmax


def int8_from_the_full_precision(patch: Patch) -> None:
    patch.setattr(int8, "quantize_rows", partial(quantize_rows, precise=True))


def int8_cut_off(patch: Patch) -> None:
    patch.setattr(int8, "quantize_rows", partial(quantize_rows, nearest=torch.trunc))


def int8_halves_away_from_zero(patch: Patch) -> None:
    def away(x: Tensor) -> Tensor:
        return (x.abs() + 0.5).floor() * x.sign()

    patch.setattr(int8, "quantize_rows", partial(quantize_rows, nearest=away))


def int8_divided_by_127(patch: Patch) -> None:
    patch.setattr(int8, "dequantize_rows", lambda codes, absmax: codes * (absmax / 127)[:, None])


def outlier_column_counted_twice(patch: Patch) -> None:
    linear = int8.linear

    def twice(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor, threshold: float) -> Tensor:
        columns = (x.half().abs() >= threshold).any(dim=0)
        outliers = F.linear(x[:, columns], int8.dequantize_rows(codes[:, columns], absmax))
        return linear(x, codes, absmax, bias, threshold) + outliers

    patch.setattr(int8, "linear", twice)


def outlier_column_left_out(patch: Patch) -> None:
    linear = int8.linear

    def without(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor, threshold: float) -> Tensor:
        columns = (x.half().abs() >= threshold).any(dim=0)
        return linear(x.masked_fill(columns, 0), codes, absmax, bias, threshold)

    patch.setattr(int8, "linear", without)


def outlier_column_left_out_of_the_scale(patch: Patch) -> None:
    linear = int8.linear

    def apart(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor, threshold: float) -> Tensor:
        columns = (x.half().abs() >= threshold).any(dim=0)
        outliers = F.linear(x[:, columns], int8.dequantize_rows(codes[:, columns], absmax))
        return linear(x.masked_fill(columns, 0), codes, absmax, bias, threshold) + outliers

    patch.setattr(int8, "linear", apart)


def outlier_only_above_the_threshold(patch: Patch) -> None:
    linear = int8.linear
    just_above = 1 + torch.finfo(torch.half).eps
    patch.setattr(
        int8,
        "linear",
        lambda x, c, a, bias, threshold: linear(x, c, a, bias, threshold * just_above),
    )


def outliers_ignored(patch: Patch) -> None:
    linear = int8.linear
    patch.setattr(int8, "linear", lambda x, c, a, bias, threshold: linear(x, c, a, bias, 0.0))


def step_with_all_its_digits(patch: Patch) -> None:
    patch.setattr(int8, "STEP", 1 / 127**2)


def shape_of_conv1d_in_the_file(patch: Patch) -> None:
    def dumps(state: dict[str, Any]) -> str:
        return json.dumps({**state, "shape": state["shape"][::-1]})

    patch.setattr(bnb_files, "json", SimpleNamespace(dumps=dumps, loads=json.loads))


def rows_scales_in_half_precision(patch: Patch) -> None:
    from_float = Linear8bit.from_float

    def rounded(weight: Tensor, bias: Tensor, *, threshold: float) -> Linear8bit:
        layer = from_float(weight, bias, threshold=threshold)
        layer.scale = layer.scale.bfloat16().float()
        return layer

    patch.setattr(Linear8bit, "from_float", rounded)


NF4, FP4 = (partial(check_4bit, kind, SMALL) for kind in ("nf4", "fp4"))
NESTED = partial(check_4bit, "nf4", LARGE)
CODES = partial(check_int8_codes, SMALL)
Check = Callable[..., object]
MISTAKES: list[tuple[Callable[[Patch], None], Check]] = [
    (nibbles_swapped, NF4),
    (nibbles_swapped_in_reading, NF4),
    (a_half_rounds_up, NF4),
    (divided_by_the_largest, NF4),
    (block_cut_short_by_the_reciprocal, NF4),
    (largest_without_its_sign, NF4),
    (table_of_fp4_sorted, FP4),
    (table_of_fp4_not_divided, FP4),
    (offset_forgotten, NF4),
    (offset_not_taken_off, NF4),
    (nested_blocks_as_small_as_the_others, NESTED),
    (nested_codes_that_are_the_nearest, NESTED),
    (square_matrix_transposed, partial(check_logits, kind="nf4")),
    (computed_in_bfloat16, partial(check_logits, kind="nf4")),
    (int8_scale_of_columns, CODES),
    (int8_from_the_full_precision, CODES),
    (int8_cut_off, CODES),
    (int8_halves_away_from_zero, CODES),
    (int8_divided_by_127, CODES),
    (bias_dropped, check_int8_forward),
    (outlier_column_counted_twice, check_int8_forward),
    (outlier_column_left_out, check_int8_forward),
    (outlier_column_left_out_of_the_scale, check_int8_forward),
    (outlier_only_above_the_threshold, check_int8_forward),
    (outliers_ignored, check_int8_forward),
    (step_with_all_its_digits, check_int8_forward),
    (shape_of_conv1d_in_the_file, partial(check_files, kind="nf4")),
    (rows_scales_in_half_precision, partial(check_files, kind="int8")),
]


def run(check: Check, checkpoint: Checkpoint, folder: Path) -> None:
    """Some checks are of a model, and one of them of its files."""
    arguments = {check_logits: (checkpoint,), check_files: (checkpoint, folder)}
    check(*arguments.get(getattr(check, "func", check), ()))


@pytest.mark.parametrize("check", [NF4, FP4, CODES], ids=["nf4", "fp4", "int8"])
def test_the_code_as_it_is_passes_these_checks(check: Check) -> None:
    check()  # test_quant.py runs the others, and larger shapes


@pytest.mark.parametrize("check", [NF4, FP4, CODES], ids=["nf4", "fp4", "int8"])
def test_what_the_mistakes_change_a_part_of_is_right(monkeypatch: Patch, check: Check) -> None:
    monkeypatch.setattr(blockwise, "_scale", scale)
    monkeypatch.setattr(int8, "quantize_rows", quantize_rows)
    check()


@pytest.mark.parametrize(("mistake", "check"), MISTAKES, ids=[m.__name__ for m, _ in MISTAKES])
def test_the_mistake_is_caught(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: Patch,
    mistake: Callable[[Patch], None],
    check: Check,
) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        run(check, checkpoint, tmp_path)
