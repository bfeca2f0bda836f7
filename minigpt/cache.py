"""Step 5: keep keys and values instead of recomputing them.

A past token's keys and values never change, since it cannot see what comes later. `FullCache`
keeps them all, in buffers allocated once. `WindowCache` keeps what a sliding window can still
see: a ring of W slots (and the sinks before it), in which the newest token takes the place of the
one that just left the window.

    slot(c) = c                            for the first `sinks` columns c
              sinks + (c - sinks) mod W    for all others

A cache counts columns, 0, 1, 2 … in the order in which tokens came, padding included. It is for
inference: gradients do not flow into it.

Before: attention.py.  After: model.py.  Twin: hf_bridge/cache.py.  Proof: tests/test_cache.py.
"""

import torch
from torch import Tensor

from minigpt.config import GPTConfig
from minigpt.mask import check_window

EMPTY = -(1 << 40)  # a column so early that its position is negative: nobody sees it


class ContextOverflow(ValueError):
    """More tokens than there is room for; carries the two numbers `needed` and `available`.

    >>> raise ContextOverflow(1030, 1024)
    Traceback (most recent call last):
    minigpt.cache.ContextOverflow: needs room for 1030 tokens, but the context holds 1024
    """

    def __init__(self, needed: int, available: int):
        super().__init__(f"needs room for {needed} tokens, but the context holds {available}")
        self.needed = needed
        self.available = available


class FullCache:
    """Keys and values of every token, all layers.

    `length` tokens are held; `padding` is None or (B, 1), each row's number of left padding
    columns. `append` leaves `length` alone and the model calls `advance` at the end of its
    forward, so an interrupted forward changes nothing of the tokens held.

    >>> cache = FullCache(GPTConfig(n_embd=2, n_head=1, n_layer=1), 1, 3, like=torch.empty(0))
    >>> k, v = cache.append(0, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)); cache.advance(2)
    >>> tuple(k.shape), cache.length
    ((1, 1, 2, 2), 2)
    >>> cache.columns(2)
    Traceback (most recent call last):
    minigpt.cache.ContextOverflow: needs room for 4 tokens, but the context holds 3
    """

    def __init__(self, config: GPTConfig, batch_size: int, capacity: int, *, like: Tensor):
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                f"batch_size and capacity must be at least 1, got {batch_size} and {capacity}"
            )
        self.batch_size = batch_size
        self.capacity = capacity
        self.length = 0
        self.padding: Tensor | None = None
        self.keys, self.values = _buffers(config, batch_size, capacity, like)

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take, filled or not."""
        return self.keys.nbytes + self.values.nbytes

    def pad(self, padding: Tensor) -> None:
        """Note that each row begins with so many columns of padding: (B, 1)."""
        self.padding = padding

    def columns(self, T: int) -> Tensor:
        """(S,): the columns that `append` of T more tokens will return, or ContextOverflow."""
        if self.length + T > self.capacity:
            raise ContextOverflow(self.length + T, self.capacity)
        return torch.arange(self.length + T, device=self.keys.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new (B, H, T, D) keys and values; return all S as views, (B, H, S, D)."""
        end = self.length + k.shape[-2]
        self.keys[layer][:, :, self.length : end] = k.detach()
        self.values[layer][:, :, self.length : end] = v.detach()
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, T: int) -> None:
        """Count T tokens as held, once every layer has appended them."""
        self.length += T

    def truncate(self, length: int) -> bool:
        """Forget all but the first `length` tokens; False, nothing changed, if it cannot."""
        self.length = min(self.length, length)
        if length == 0:
            self.padding = None
        return True


class WindowCache:
    """Keys and values of the last `window` tokens and the first `sinks`; calls as in FullCache.

    An interrupted forward of several tokens damages it: what they pushed out of the ring is gone.

    >>> config = GPTConfig(n_embd=2, n_head=1, n_layer=1)
    >>> cache = WindowCache(config, 1, window=3, sinks=1, like=torch.empty(0))
    >>> for _ in range(6):
    ...     _ = cache.append(0, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)); cache.advance(1)
    >>> cache.held.tolist()                 # a sink, then a ring of three
    [0, 4, 5, 3]
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, window: int, sinks: int = 0, *, like: Tensor
    ):
        check_window(window, sinks)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.capacity: int | None = None  # the oldest make room for the newest
        self.window = window
        self.sinks = sinks
        self.length = 0
        self.padding: Tensor | None = None
        self.keys, self.values = _buffers(config, batch_size, sinks + window, like)
        self.held = torch.full((sinks + window,), EMPTY, device=like.device)  # slot -> column

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take: these do not grow with the conversation."""
        return self.keys.nbytes + self.values.nbytes

    def pad(self, padding: Tensor) -> None:
        """Note that each row begins with so many columns of padding: (B, 1)."""
        if (
            self.sinks
        ):  # the sink slots hold the first columns, and those are not each row's first tokens
            raise ValueError("a window cache with sinks holds no padded rows: use a full cache")
        self.padding = padding

    def columns(self, T: int) -> Tensor:
        """(S,): the columns that `append` of T more tokens will return, in its order."""
        new = torch.arange(self.length, self.length + T, device=self.held.device)
        if T == 1:
            return self.held.index_fill(0, self._slots(new), self.length)
        return torch.cat([self.held, new])

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new (B, H, T, D) keys and values; return what these T may see, (B, H, S, D)."""
        k, v = k.detach(), v.detach()
        T = k.shape[-2]
        keys, values = self.keys[layer], self.values[layer]
        if T > 1:
            # The first of several queries still sees what the last of them pushes out of the ring.
            all_keys, all_values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        kept = self._kept(T, k.device)
        slots = self._slots(self.length + kept)
        keys[:, :, slots] = k[:, :, kept]
        values[:, :, slots] = v[:, :, kept]
        return (keys, values) if T == 1 else (all_keys, all_values)

    def advance(self, T: int) -> None:
        """Count T tokens as held, once every layer has appended them."""
        new = self.length + self._kept(T, self.held.device)
        self.held[self._slots(new)] = new
        self.length += T

    def truncate(self, length: int) -> bool:
        """Forget all but the first `length` tokens; False if the ring has overwritten some."""
        if length < self.length:
            if self.length > self.sinks + self.window:
                return False
            self.held[self.held >= length] = EMPTY
            self.length = length
        if length == 0:
            self.padding = None
        return True

    def _slots(self, columns: Tensor) -> Tensor:
        ring = self.sinks + (columns - self.sinks) % self.window
        return torch.where(columns < self.sinks, columns, ring)

    def _kept(self, T: int, device: torch.device) -> Tensor:
        """Which of T new tokens have a slot in the end: the last W, and sinks among the others."""
        new = torch.arange(T, device=device)
        return new[(new >= T - self.window) | (self.length + new < self.sinks)]


Cache = FullCache | WindowCache


def check_room(cache: Cache, B: int, length: int) -> None:
    """Raise ValueError unless the cache is for B rows, ContextOverflow if `length` do not fit."""
    if cache.batch_size != B:
        raise ValueError(
            f"ids must have as many rows as the cache, {cache.batch_size}, got {B}: "
            f"new_cache({B}) makes one for them"
        )
    if cache.capacity is not None and length > cache.capacity:
        raise ContextOverflow(length, cache.capacity)


def _buffers(config: GPTConfig, batch_size: int, slots: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(L, B, H, slots, D) twice. Zeros, since the 0 weight of an empty slot times NaN is NaN."""
    shape = (2, config.n_layer, batch_size, config.n_head, slots, config.head_size)
    keys, values = like.new_zeros(shape)
    return keys, values
