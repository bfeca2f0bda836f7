"""Step 4 through transformers: the kernels it calls eager and sdpa.  (B, T, C) -> (B, T, C).

GPT2Attention picks a kernel by name (config._attn_implementation) at every call and hands it a
mask of the kernel's own kind: `eager` adds a float one, so that a boolean one would silently add 1
to what is seen; `sdpa` takes booleans, or None for a square causal matrix, and with None and a
chunk it cuts the keys at the top left. Both return (B, T, H, D).

Before: mask.py.  After: cache.py.  Twin: minigpt/attention.py.  Proof: tests/test_attention.py.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

from hf_bridge.mask import visible

LAYER = SimpleNamespace(is_causal=True, training=True)  # what the kernels ask of the layer


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`eager`: (B, H, T, D) queries, (B, H, S, D) keys and values -> (B, H, T, D)."""
    if mask is None:
        mask = visible(q.shape[-2], k.shape[-2], device=q.device)
    added = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return eager_attention_forward(LAYER, q, k, v, added, dropout=dropout)[0].transpose(1, 2)


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`sdpa`: the same function through PyTorch's fused kernel."""
    T, S = q.shape[-2], k.shape[-2]
    if mask is None and T < S:
        mask = visible(T, S, device=q.device)
    return sdpa_attention_forward(LAYER, q, k, v, mask, dropout=dropout)[0].transpose(1, 2)
