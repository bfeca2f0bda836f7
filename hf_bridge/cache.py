"""Step 5 through transformers: a list of DynamicLayer, or of DynamicSlidingWindowLayer.

They grow by `torch.cat` with every token instead of filling a buffer; the sliding one keeps the
last W - 1 keys, in order. There is none with attention sinks, and at W = 1 the sliding one keeps
everything ([-1 + 1:] is all) while the mask expects nothing: new_cache gives a full one for both.
`crop(-n)` forgets the last n tokens. An interrupted forward leaves a cache uneven.

Before: attention.py.  After: model.py.  Twin: minigpt/cache.py.  Proof: tests/test_cache.py.
"""

from torch import Tensor
from transformers.cache_utils import Cache as HFCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_bridge.config import GPTConfig
from hf_bridge.mask import check_window


class ContextOverflow(ValueError):
    """More tokens than there is room for; transformers has an IndexError from the embedding.

    >>> raise ContextOverflow(1030, 1024)
    Traceback (most recent call last):
    hf_bridge.cache.ContextOverflow: needs room for 1030 tokens, but the context holds 1024
    """

    def __init__(self, needed: int, available: int):
        super().__init__(f"needs room for {needed} tokens, but the context holds {available}")
        self.needed = needed
        self.available = available


class _Counted(HFCache):
    """What minigpt's caches know: how long they are, and each row's left padding (B, 1)."""

    batch_size = 1  # the library's own is -1 for layers that grow
    padding: Tensor | None = None
    capacity: int | None = None

    @property
    def length(self) -> int:
        return int(self.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes that the kept keys and values take."""
        held = [layer for layer in self.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in held)

    def pad(self, padding: Tensor) -> None:
        """Note that each row begins with so many columns of padding: (B, 1)."""
        self.padding = padding

    def truncate(self, length: int) -> bool:
        """Forget all but the first `length` tokens; False if a full window has dropped some."""
        if length < self.length:
            if any(self.is_sliding) and self.length >= self.layers[0].get_max_length():
                return False
            self.crop(length - self.length)
        if length == 0:
            self.padding = None
        return True


class FullCache(_Counted):
    """Keys and values of every token; grows as needed, up to `capacity`."""

    def __init__(self, config: GPTConfig, batch_size: int, capacity: int, *, like: Tensor):
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                f"batch_size and capacity must be at least 1, got {batch_size} and {capacity}"
            )
        super().__init__(layers=[DynamicLayer() for _ in range(config.n_layer)])
        self.batch_size = batch_size
        self.capacity = capacity


class WindowCache(_Counted):
    """Keys and values of the last window - 1 tokens; no sinks (use a full cache for them)."""

    def __init__(
        self, config: GPTConfig, batch_size: int, window: int, sinks: int = 0, *, like: Tensor
    ):
        check_window(window, sinks)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if sinks or window == 1:
            raise ValueError("transformers has no window cache with sinks or of 1: use a full one")
        layers = [DynamicSlidingWindowLayer(window) for _ in range(config.n_layer)]
        super().__init__(layers=layers)
        self.batch_size = batch_size


Cache = FullCache | WindowCache


def check_room(cache: Cache, B: int, length: int) -> None:
    """Raise ValueError unless the cache is for B rows, ContextOverflow if `length` do not fit.

    The library takes any rows, and grows without end.
    """
    if cache.batch_size != B:
        raise ValueError(
            f"ids must have as many rows as the cache, {cache.batch_size}, got {B}: "
            f"new_cache({B}) makes one for them"
        )
    if cache.capacity is not None and length > cache.capacity:
        raise ContextOverflow(length, cache.capacity)
