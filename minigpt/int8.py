"""Beside step 10: products in eight bits, and in floats where eight are too few.

    X W^T = (codes of X) (codes of W)^T * max of X's row * max of W's row / 127^2
            + X's outlier columns times W's, in floats

A column of X is an outlier if any of its numbers has the size `threshold` or more: there are few,
and beside them the others would round to nothing. Dettmers et al. 2022 (LLM.int8()), section 3.
The order of operations and the constants are bitsandbytes', so that every code is the same.

Used by: quant.py.  Proof: tests/test_quant.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# 1 / 127^2 is 6.2000124e-05: bitsandbytes lost a zero, and with it 2e-5 of every product.
STEP = 6.200124e-05


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, K) -> int8 codes (N, K), and the largest size in each row, float32 (N,).

    >>> codes, absmax = quantize_rows(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    >>> codes.tolist(), absmax.tolist()
    ([[64, -127], [0, 0]], [2.0, 0.0])
    """
    half = x.detach().half()  # from here, whatever x was
    absmax = half.abs().amax(dim=1).float()
    codes = (half * (127 / absmax)[:, None]).nan_to_num(nan=0)  # a row of zeros has 0 / 0
    return codes.round().to(torch.int8), absmax


def dequantize_rows(codes: Tensor, absmax: Tensor) -> Tensor:
    """The numbers that the codes stand for, in float32."""
    return codes * absmax[:, None] * (1 / 127)


def linear(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None, threshold: float = 6.0
) -> Tensor:
    """x (M, K) times the transpose of a quantized (N, K) matrix, plus bias: (M, N).

    A threshold of 0 takes no column for an outlier.
    """
    large = x.half().abs() >= (threshold or math.inf)
    outliers = large.any(dim=0)  # (K,)
    x_codes, x_absmax = quantize_rows(x.masked_fill(large, 0))
    x_codes = x_codes.masked_fill(outliers, 0)  # an outlier column's small numbers did count
    out = multiply(x_codes, codes) * (x_absmax[:, None] * absmax) * STEP  # (M, N), float32
    if bias is not None:
        out = out + bias
    out = out.to(x.dtype)
    if outliers.any():
        columns = dequantize_rows(codes[:, outliers], absmax).to(x.dtype)
        out = out + F.linear(x[:, outliers], columns)
    return out


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 matrices (M, K) and (N, K), exactly: int32 (M, N)."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.T)
    return (a.double() @ b.double().T).int()  # float64 holds every such sum
