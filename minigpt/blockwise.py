"""Beside step 10: numbers in four bits, block by block.

    code = the entry of a table of 16 that is nearest to  x / max |x|  in its block
    x    = table[code] * max |x|, nearly

NF4 spaces its entries as a normal distribution spaces its quantiles, FP4 as a tiny floating-point
number. Double quantization stores the largest values themselves in 8 bits, less their mean, in
blocks of 256. Dettmers et al. 2023 (QLoRA), section 3; the 8-bit map is from Dettmers 2015. The
order of operations is bitsandbytes', so that every bit is the same.

Used by: quant.py.  Proof: tests/test_quant.py.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# fmt: off
TABLES = {  # code -> value
    "nf4": torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]),
    # a sign, two bits of exponent, one of mantissa; in the order of the bits, not of the values
    "fp4": torch.tensor([
        0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3,
    ]) / 12,
}
# fmt: on
NESTED_BLOCK = 256


def quantize_4bit(x: Tensor, kind: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Two codes a byte, the first in the high half, and each block's largest size.

    x of any shape is read row by row. Returns uint8 (ceil(n / 2), 1) and float32 (blocks,).

    >>> packed, absmax = quantize_4bit(torch.tensor([0.5, -2.0, 0.0]))
    >>> packed.tolist(), absmax.tolist()            # codes 10, 0, 7, and 7, a zero, to fill up
    ([[160], [119]], [2.0])
    """
    table, order = TABLES[kind].to(x.device).sort(stable=True)
    scaled, absmax = _scale(x, block_size)
    if scaled.numel() % 2:
        scaled = F.pad(scaled, (0, 1))
    codes = order[torch.bucketize(scaled, midpoints(table))].to(torch.uint8)
    return (codes[0::2] << 4 | codes[1::2])[:, None], absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, shape: torch.Size, kind: str = "nf4", block_size: int = 64
) -> Tensor:
    """The numbers that the codes stand for, in float32.

    >>> packed, absmax = quantize_4bit(torch.tensor([0.5, -2.0, 0.0]))
    >>> [round(x, 3) for x in dequantize_4bit(packed, absmax, torch.Size([3])).tolist()]
    [0.492, -2.0, 0.0]
    """
    table, n = TABLES[kind].to(packed.device), math.prod(shape)
    pairs = torch.cartesian_prod(table, table)  # (256, 2): what each byte stands for
    values = F.embedding(packed.flatten().int(), pairs).flatten()[:n]
    return _unscale(values, absmax, block_size).view(shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: (blocks,) -> 8-bit codes, their own blocks' sizes, and the mean."""
    offset = absmax.mean()
    rest = absmax - offset
    outer = F.pad(rest, (0, -len(rest) % NESTED_BLOCK)).view(-1, NESTED_BLOCK).abs().amax(dim=1)
    scaled = rest * (1 / outer).repeat_interleave(NESTED_BLOCK)[: len(rest)]
    scaled = scaled.nan_to_num(nan=-1).clamp(-1, 1)  # in a block of equal sizes 0 / 0 gets code 0
    # bitsandbytes looks the code up in 65536 cells: nearest to the cell's centre, not to the number
    cells = ((scaled + 1) * 32767.5 + 0.5).long()
    codes = torch.bucketize(cells / 32767.5 - 1, midpoints(dynamic_map().to(absmax.device)))
    return codes.to(torch.uint8), outer, offset


def dequantize_absmax(codes: Tensor, outer: Tensor, offset: Tensor) -> Tensor:
    """The largest sizes again, nearly: (blocks,) in float32."""
    values = dynamic_map().to(codes.device)[codes.long()]
    return _unscale(values, outer, NESTED_BLOCK) + offset


@cache
def dynamic_map() -> Tensor:
    """256 sorted values from -0.993 to 1: seven powers of ten, each finer divided than the last.

    >>> len(dynamic_map().unique()), dynamic_map()[127].item()
    (256, 0.0)
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        centers = (10 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += [*centers, *(-center for center in centers)]
    return torch.tensor(sorted(values))


def midpoints(table: Tensor) -> Tensor:
    """Where the nearest entry of a sorted table changes; a number just there takes the lower."""
    return (table[:-1] + table[1:]) / 2


def _scale(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Every number as a part of its block's largest: (n,) in [-1, 1], and (blocks,)."""
    flat = x.detach().flatten().float()
    full = len(flat) // block_size * block_size
    blocks, tail = flat[:full].view(-1, block_size), flat[full:]
    absmax = blocks.abs().amax(dim=1)
    # By the reciprocal, which rounds differently from a division; a block cut short is divided.
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).flatten()
    if len(tail):
        largest = tail.abs().amax().clamp(min=1e-38)
        absmax, scaled = torch.cat([absmax, largest[None]]), torch.cat([scaled, tail / largest])
    return scaled.clamp(-1, 1), absmax


def _unscale(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    return values * absmax.repeat_interleave(block_size)[: len(values)]
