"""Step 3 through transformers: masks are functions of four indices, joined by `and` and `or`.

    causal_mask_function, sliding_window_overlay(W), and_masks(…), or_masks(…), sdpa_mask(…)

They count columns, not positions: padding is a mask of its own, joined by `and`. transformers has
no attention sinks; an overlay of our own adds them. `sdpa_mask` gives None, that is full causal
attention, where it thinks that the kernel's own flag will do: allow_is_causal_skip=False stops it.

Before: tokenizer.py.  After: attention.py.  Twin: minigpt/mask.py.  Proof: tests/test_mask.py.
"""

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_overlay,
)


def visible(
    T: int,
    S: int,
    window: int | None = None,
    sinks: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Boolean (T, S): the queries are the last T of S positions. Raises ValueError as its twin.

    >>> visible(2, 5, window=2, sinks=1).int()
    tensor([[1, 0, 1, 1, 0],
            [1, 0, 0, 1, 1]], dtype=torch.int32)
    """
    if not 1 <= T <= S:
        raise ValueError(f"queries are the last T of S positions: 1 <= T <= S, got T={T}, S={S}")
    rule = _rule(window, sinks)
    mask = sdpa_mask(
        1, T, S, S - T, mask_function=rule, allow_is_causal_skip=False, device=device or "cpu"
    )
    return mask[0, 0]


def visible_at(query: Tensor, key: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """The rule for any positions: (..., T) queries, (..., S) keys -> boolean (..., T, S)."""
    p, j = query[..., :, None], key[..., None, :]  # (..., T, 1), (..., 1, S)
    return _rule(window, sinks)(0, 0, p, j) & (j >= 0)


def left_padding(attention_mask: Tensor) -> Tensor | None:
    """How many columns of padding each row begins with: (B, T) -> (B, 1), or None.

    transformers accepts holes in a mask, and warns at most of padding on the right.
    """
    if attention_mask.bool().all():
        return None
    if (attention_mask.bool().long().diff(dim=1) < 0).any() or not attention_mask[:, -1].all():
        raise ValueError("attention_mask must be 0s, then 1s, in each row: padding on the left")
    return (attention_mask == 0).sum(dim=1, keepdim=True)  # (B, 1)


def check_window(window: int | None, sinks: int) -> None:
    """Raise ValueError unless these numbers describe a window."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
    if sinks < 0:
        raise ValueError(f"sinks must be 0 or more, got {sinks}")
    if sinks and window is None:
        raise ValueError(f"sinks need a window: without one every past token is seen, got {sinks}")


def _rule(window: int | None, sinks: int):
    check_window(window, sinks)
    if window is None:
        return causal_mask_function
    overlay = or_masks(sliding_window_overlay(window), lambda b, h, p, j: j < sinks)
    return and_masks(causal_mask_function, overlay)
