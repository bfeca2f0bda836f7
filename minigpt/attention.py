"""Step 4: causal self-attention.  (B, T, C) -> (B, T, C).

    attention(q, k, v) = softmax(q k^T / sqrt(D)) v      Vaswani et al. 2017, equation (1)

Before: mask.py.  After: cache.py.  Twin: hf_bridge/attention.py.  Proof: tests/test_attention.py.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import GPTConfig
from minigpt.mask import visible

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Weigh the values of the visible keys: the equation above, written out.

    q is (B, H, T, D); k and v are (B, H, S, D); mask is boolean and broadcasts to (B, H, T, S);
    None is the causal one, the queries being the last T of S. `dropout` zeroes weights with that
    probability. Returns (B, H, T, D).

    >>> one = torch.ones(1, 1, 1, 2)
    >>> attend(one, one, 7 * one).tolist()              # a single key gets all the weight
    [[[[7.0, 7.0]]]]
    """
    if mask is None:
        mask = visible(q.shape[-2], k.shape[-2], device=q.device)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    pattern = F.dropout(scores.softmax(dim=-1), dropout)
    return pattern @ v  # (B, H, T, D)


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The same function through PyTorch's fused kernel, which never holds all (T, S) scores."""
    T, S = q.shape[-2], k.shape[-2]
    causal = mask is None and T == S > 1
    if mask is None and 1 < T < S:  # the kernel's own is_causal would align a chunk to the top left
        mask = visible(T, S, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal)


class Conv1D(nn.Module):
    """GPT-2's linear layer, x W + b: its weight is (inputs, outputs), as the checkpoint stores it.

    nn.Linear would want the transpose. For one row this orientation is also the faster one on a
    CPU.

    >>> layer = Conv1D(2, 3)
    >>> tuple(layer.weight.shape), tuple(layer(torch.ones(5, 2)).shape)
    ((2, 3), (5, 3))
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Attention(nn.Module):
    """One attention layer, with the checkpoint's parameter names c_attn and c_proj."""

    def __init__(self, config: GPTConfig, layer: int, attend: Attend = attend_fused):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.attend = attend
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)  # q, k and v side by side
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache=None) -> Tensor:
        q, k, v = (self.split(part) for part in self.c_attn(x).chunk(3, dim=-1))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        dropout = self.attn_pdrop if self.training else 0.0
        heads = self.attend(q, k, v, mask, dropout)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(self.merge(heads)))

    def split(self, x: Tensor) -> Tensor:
        """Cut the width into heads: (B, T, C) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """Lay the heads side by side again: (B, H, T, D) -> (B, T, C)."""
        return x.transpose(1, 2).flatten(-2)
