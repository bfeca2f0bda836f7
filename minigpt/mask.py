"""Step 3: who may look at whom.  -> (T, S), True where a query sees a key.

    sees(p, j)  =  0 <= j <= p   and   (p - j < window   or   j < sinks)

A token sees itself and those before it (causal; Vaswani et al. 2017, section 3.2.3), with a
window only itself and the window - 1 before it (Beltagy et al. 2020), plus the first `sinks`
tokens, on which attention leans when it has nothing to say (Xiao et al. 2023). A key at a
negative position is nobody: padding.

Before: tokenizer.py.  After: attention.py.  Twin: hf_bridge/mask.py.  Proof: tests/test_mask.py.
"""

import torch
from torch import Tensor


def visible(
    T: int,
    S: int,
    window: int | None = None,
    sinks: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Boolean (T, S): the queries are the last T of S positions.

    Raises ValueError unless 1 <= T <= S, window >= 1 and sinks >= 0.

    >>> visible(4, 4, window=2).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    >>> visible(2, 5, window=2, sinks=1).int()      # two new tokens after three, the first a sink
    tensor([[1, 0, 1, 1, 0],
            [1, 0, 0, 1, 1]], dtype=torch.int32)
    >>> visible(1, 4).int()                             # one new token sees all that came before
    tensor([[1, 1, 1, 1]], dtype=torch.int32)
    """
    if not 1 <= T <= S:
        raise ValueError(f"queries are the last T of S positions: 1 <= T <= S, got T={T}, S={S}")
    positions = torch.arange(S, device=device)  # (S,)
    return visible_at(positions[S - T :], positions, window, sinks)


def visible_at(query: Tensor, key: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """The rule above for any positions: (..., T) queries, (..., S) keys -> boolean (..., T, S).

    This form serves what is not one run of columns: left-padded rows, a ring buffer's slots.

    >>> visible_at(torch.tensor([2]), torch.tensor([-1, 0, 3, 2])).int()    # padding, past, future…
    tensor([[0, 1, 0, 1]], dtype=torch.int32)
    """
    check_window(window, sinks)
    p, j = query[..., :, None], key[..., None, :]  # (..., T, 1), (..., 1, S)
    mask = (j >= 0) & (j <= p)
    if window is not None:
        mask &= (p - j < window) | (j < sinks)
    return mask


def left_padding(attention_mask: Tensor) -> Tensor | None:
    """How many columns of padding each row begins with: (B, T) of 0 and 1 -> (B, 1), or None.

    Raises ValueError if a 0 stands after a 1: only the left side is padded, so that the newest
    token of every row stands in the last column.

    >>> left_padding(torch.tensor([[0, 0, 1], [1, 1, 1]])).tolist()
    [[2], [0]]
    """
    real = attention_mask.bool()
    if real.all():
        return None
    if (real[:, :-1] & ~real[:, 1:]).any() or not real[:, -1].all():
        raise ValueError("attention_mask must be 0s, then 1s, in each row: padding on the left")
    return (~real).sum(dim=1, keepdim=True)  # (B, 1)


def check_window(window: int | None, sinks: int) -> None:
    """Raise ValueError unless these numbers describe a window.

    >>> check_window(0, 0)
    Traceback (most recent call last):
    ValueError: window must be at least 1 (a token sees itself), got 0
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
    if sinks < 0:
        raise ValueError(f"sinks must be 0 or more, got {sinks}")
    if sinks and window is None:
        raise ValueError(f"sinks need a window: without one every past token is seen, got {sinks}")
