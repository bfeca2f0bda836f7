"""Beside step 11: one linear layer with low-rank corrections.  (…, in) -> (…, out)

    h = W0 x + scale * B A x        scale = alpha / R, or alpha / sqrt(R)

A is (R, in), B is (out, R) and starts at zero, so that at first nothing changes. Hu et al. 2021,
equation (3) and the scaling after it; with the root it is rank-stabilized, Kalajdzievski 2023.

Used by: lora.py.  Proof: tests/test_lora.py.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.attention import Conv1D

THIRDS = "qkv"  # what c_attn computes, side by side


@dataclass(frozen=True)
class LoRAConfig:
    """An adapter without its weights. Raises ValueError for numbers that make none.

    >>> LoRAConfig(rank=4, alpha=16).scale, LoRAConfig(rank=4, alpha=16, rslora=True).scale
    (4.0, 8.0)
    >>> LoRAConfig(rank=0)
    Traceback (most recent call last):
    ValueError: rank must be a whole number of at least 1, got 0
    """

    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("c_attn",)
    dropout: float = 0.0
    rslora: bool = False
    qkv: str = THIRDS

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if not (isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha must be a number above 0, got {self.alpha!r}")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        if not self.qkv or not set(self.qkv) <= set(THIRDS):
            raise ValueError(f"qkv must be some of the letters q, k and v, got {self.qkv!r}")

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRank(nn.Module):
    """One correction, scale * B A x: (…, in) -> (…, out).

    `rows` (N,) are the outputs that it reaches, None all: lora_B holds only these rows of B.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: LoRAConfig,
        *,
        rows: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.config = config
        self.out_features = out_features
        R = config.rank
        # In peft two nn.Linear fill A and B before A is drawn again: the same seed, the same A.
        for shape in ((R, in_features), (out_features, R), (R, in_features)):
            drawn = torch.empty(shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(drawn)
        self.lora_B = nn.Parameter(torch.zeros(out_features if rows is None else len(rows), R))
        self.rows: Tensor | None
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x.to(self.lora_A.dtype), self.config.dropout, self.training)
        return F.linear(F.linear(x, self.lora_A), self.full_B()) * self.config.scale

    def full_B(self) -> Tensor:
        """(out, R): lora_B, with zeros for the outputs that it does not reach."""
        if self.rows is None:
            return self.lora_B
        zeros = self.lora_B.new_zeros(self.out_features, self.config.rank)
        return zeros.index_copy(0, self.rows, self.lora_B)

    def delta(self) -> Tensor:
        """(out, in): the correction as a matrix, in the orientation of nn.Linear."""
        return self.full_B() @ self.lora_A * self.config.scale

    @torch.no_grad()
    def fill(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Take over A (R, in) and the whole B (out, R)."""
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B if self.rows is None else lora_B[self.rows.cpu()])


class LoRALinear(nn.Module):
    """A frozen linear layer and the corrections it knows by name; one of them is active, or none.

    The layer is a Conv1D, or a quantized one with in_features and out_features: it is only called.

    >>> layer = LoRALinear(Conv1D(3, 2))
    >>> correction = layer.add("default", LoRAConfig(rank=1))
    >>> layer.active, x = "default", torch.ones(5, 3)
    >>> torch.equal(layer(x), layer.base(x))    # B is zero
    True
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = sizes(base)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.train(base.training)

    def add(
        self,
        name: str,
        config: LoRAConfig,
        *,
        rows: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LowRank:
        """A new correction, in float32 at least, and in eval mode where the base is."""
        weight = cast(Tensor, self.base.weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        adapter = LowRank(
            self.in_features, self.out_features, config, rows=rows, generator=generator
        )
        self.adapters[name] = adapter.to(weight.device, dtype).train(self.base.training)
        return adapter

    def get(self, name: str | None) -> LowRank | None:
        """The correction of this name, if the layer has one."""
        return cast(LowRank, self.adapters[name]) if name and name in self.adapters else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        adapter = self.get(self.active)
        return out if adapter is None else (out + adapter(x)).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A plain layer that computes the same, W0 + delta; with no correction active, the base."""
        adapter = self.get(self.active)
        if adapter is None:
            return self.base
        if not isinstance(self.base, Conv1D):
            raise ValueError(
                f"merging needs a float base, got {type(self.base).__name__}, which would round "
                "the sum: load the float model, lora.load the adapter onto it, and merge there"
            )
        weight = self.base.weight + adapter.delta().T  # (in, out), as Conv1D stores it
        plain = Conv1D(self.in_features, self.out_features).train(self.base.training)
        plain.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        plain.bias = self.base.bias
        return plain


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, whichever way its weight lies."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return cast(int, layer.in_features), cast(int, layer.out_features)


def rows_of(out_features: int, qkv: str) -> Tensor | None:
    """Which of c_attn's outputs are those of the letters in qkv; None: all of them."""
    width = out_features // 3
    chosen = [torch.arange(width) + i * width for i, third in enumerate(THIRDS) if third in qkv]
    return torch.cat(chosen) if len(chosen) < 3 else None
