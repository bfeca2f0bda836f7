"""Beside step 10: linear layers that hold codes instead of floats.  (…, in) -> (…, out)

    y = x dequantize(codes)^T + b

Read blockwise.py for the arithmetic of 4 bits, int8.py for that of 8.

Used by: quant.py.  Proof: tests/test_quant.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt import blockwise, int8


class Quantized(nn.Module):
    """What both have: sizes, a float bias, and codes that no change of dtype may touch."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, bias: Tensor):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def dequantize(self) -> Tensor:
        """The weight as floats, nearly what it was: (out, in)."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantized":
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):  # moved, but not rounded
            setattr(self, name, before[name].to(buffer.device))
        return self


class Linear4bit(Quantized):
    """NF4 or FP4 by blocks; `nested` has double quantization's own sizes and offset.

    Computes in `compute_dtype` whatever it is given, as bitsandbytes does; `dtype` is what the
    weight was before.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        packed: Tensor,
        absmax: Tensor,
        bias: Tensor,
        *,
        kind: str,
        block_size: int,
        dtype: torch.dtype,
        nested: tuple[Tensor, Tensor] | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(shape[1], shape[0], bias)
        self.kind, self.block_size = kind, block_size
        self.dtype, self.compute_dtype = dtype, compute_dtype
        self.register_buffer("weight", packed)  # (out * in / 2, 1) uint8
        self.register_buffer("absmax", absmax)  # (blocks,) float32; uint8 if nested
        self.register_buffer("nested_absmax", nested[0] if nested else None)  # (blocks / 256,)
        self.register_buffer("nested_offset", nested[1] if nested else None)  # ()

    @classmethod
    def from_float(
        cls, weight: Tensor, bias: Tensor, *, kind: str, block_size: int, double_quant: bool
    ) -> "Linear4bit":
        """Quantize an (out, in) weight."""
        packed, absmax = blockwise.quantize_4bit(weight, kind, block_size)
        nested = None
        if double_quant:
            absmax, outer, offset = blockwise.quantize_absmax(absmax)
            nested = (outer, offset)
        out_features, in_features = weight.shape
        return cls(
            (out_features, in_features),
            packed,
            absmax,
            bias,
            kind=kind,
            block_size=block_size,
            dtype=weight.dtype,
            nested=nested,
        )

    def dequantize(self) -> Tensor:
        return self._values().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._values().to(self.compute_dtype), self.bias.to(self.compute_dtype)
        return F.linear(x.to(self.compute_dtype), weight, bias).to(x.dtype)

    def _values(self) -> Tensor:
        """What the codes stand for, in float32: (out, in)."""
        absmax = self.absmax
        if self.nested_absmax is not None and self.nested_offset is not None:
            absmax = blockwise.dequantize_absmax(absmax, self.nested_absmax, self.nested_offset)
        shape = torch.Size((self.out_features, self.in_features))
        return blockwise.dequantize_4bit(self.weight, absmax, shape, self.kind, self.block_size)


class Linear8bit(Quantized):
    """LLM.int8(): codes by rows, and outlier columns of the input in floats.

    In training gradients must pass: there, as in bitsandbytes, the weight is dequantized.
    """

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor, *, threshold: float = 6.0):
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.threshold = threshold
        self.register_buffer("weight", codes)  # (out, in) int8
        self.register_buffer("scale", scale)  # (out,) float32

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor, *, threshold: float) -> "Linear8bit":
        """Quantize an (out, in) weight."""
        return cls(*int8.quantize_rows(weight), bias, threshold=threshold)

    def dequantize(self) -> Tensor:
        return int8.dequantize_rows(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.linear(x, self.dequantize().to(x.dtype), self.bias)
        rows = x.flatten(0, -2)  # (M, in)
        out = int8.linear(rows, self.weight, self.scale, self.bias, self.threshold)
        return out.unflatten(0, x.shape[:-1])
