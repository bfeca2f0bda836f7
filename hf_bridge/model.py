"""Step 6 through transformers: GPT2LMHeadModel.  (B, T) token ids -> (B, T, V) logits.

What the wrapper adds, because the library does without: positions counted from the left padding
(a bare forward counts its columns), a mask that is always explicit (without one, positions with
gaps are taken for packed sequences), errors before the forward, and a sliding window. GPT-2 knows
no window, and config.sliding_window would only make the cache forget: so a mask of our own is
registered, beside the sdpa kernel, under a name that carries the window's numbers.

Before: cache.py.  After: weights.py.  Twin: minigpt/model.py.  Proof: tests/test_model.py.
"""

import copy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GPT2LMHeadModel
from transformers.generation import GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_bridge.cache import Cache, ContextOverflow, FullCache, WindowCache, check_room
from hf_bridge.config import GPTConfig
from hf_bridge.mask import check_window, left_padding, visible_at


class GPT(nn.Module):
    """`hf`, a GPT2LMHeadModel, behind minigpt's calls; fresh weights are drawn from `generator`.

    >>> model = GPT(GPTConfig(11, n_positions=8, n_embd=4, n_layer=2, n_head=2, eos_token_id=0))
    >>> tuple(model(torch.tensor([[1, 2, 3]])).shape)
    (1, 3, 11)
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        sliding_window: int | None = None,
        attention_sinks: int = 0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        # The library draws from the global generator only: lend it a seed, then put it back.
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            if generator is not None:
                draw = torch.randint(1 << 62, (), generator=generator, device=generator.device)
                torch.default_generator.manual_seed(int(draw))
            self.hf = GPT2LMHeadModel(copy.deepcopy(config))
        self._slide(sliding_window, attention_sinks)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        sliding_window: int | None = None,
        attention_sinks: int = 0,
    ) -> "GPT":
        """Read a directory in Hugging Face's layout, or a hub id. See weights.load."""
        from hf_bridge import weights

        model = weights.load(name_or_path, dtype=dtype, device=device)
        model._slide(sliding_window, attention_sinks)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors. See weights.save."""
        from hf_bridge import weights

        weights.save(self, folder)

    @property
    def config(self) -> GPTConfig:
        """The model's own GPT2Config."""
        return self.hf.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hf.device

    def forward(
        self, ids: Tensor, *, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits for every position: (B, T) -> (B, T, V); arguments and errors as in minigpt."""
        self.check_ids(ids, attention_mask)
        return self.head(self.hidden(ids, attention_mask=attention_mask, cache=cache))

    def hidden(
        self, ids: Tensor, *, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The last block's normalised output, (B, T) -> (B, T, C)."""
        B, T = ids.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.n_positions:
            raise ContextOverflow(start + T, self.config.n_positions)
        if cache is not None:
            check_room(cache, B, start + T)
        padding = self._padding(attention_mask, cache)
        columns = torch.arange(start + T, device=ids.device).expand(B, -1)  # (B, S)
        positions = columns[:, start:] - padding  # (B, T)
        return self.hf.transformer(
            ids,
            attention_mask=(columns >= padding).long(),  # (B, S)
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def head(self, x: Tensor) -> Tensor:
        """Score every word of the vocabulary: (…, C) -> (…, V)."""
        return self.hf.lm_head(x)

    def new_cache(
        self, batch_size: int = 1, *, capacity: int | None = None, full: bool = False
    ) -> Cache:
        """An empty cache: of the window's size if sliding_window is set, else `capacity` long."""
        window, sinks, like = self.sliding_window, self.attention_sinks, self.hf.lm_head.weight
        if window is not None and window > 1 and not sinks and not full:
            return WindowCache(self.config, batch_size, window, like=like)
        capacity = self.config.n_positions if capacity is None else capacity
        return FullCache(self.config, batch_size, capacity, like=like)

    def check_ids(self, ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Raise ValueError unless ids is a (B, T) batch of tokens, and a mask has its shape."""
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"ids must be a (B, T) tensor of integers, got shape {tuple(ids.shape)} {ids.dtype}"
            )
        if not ids.numel():
            raise ValueError("ids must hold at least one token: the prompt is empty")
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"token ids must be in [0, {self.config.vocab_size}), the vocabulary, got {wrong}"
            )
        if attention_mask is not None and attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of ids, {tuple(ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )

    def _padding(self, attention_mask: Tensor | None, cache: Cache | None) -> Tensor | int:
        """(B, 1) columns of padding at each row's left, or 0. A cache remembers them."""
        padding = None if attention_mask is None else left_padding(attention_mask)
        if cache is not None:
            if padding is not None and cache.length:
                raise ValueError("padding stands on the left: give its mask before the first token")
            if padding is not None:
                cache.pad(padding)
            padding = cache.padding
        return 0 if padding is None else padding

    def _slide(self, window: int | None, sinks: int, kernel: str = "sdpa") -> None:
        check_window(window, sinks)
        self.sliding_window, self.attention_sinks = window, sinks
        name = kernel if window is None else f"sdpa_window_{window}_{sinks}"
        if window is not None:
            AttentionInterface.register(name, sdpa_attention_forward)
            AttentionMaskInterface.register(name, partial(_window_mask, window, sinks))
        self.hf.set_attn_implementation(name)
        # A checkpoint's own advice (sample, top-k 50, an end token) would fill in what is left out.
        self.hf.generation_config = GenerationConfig()


def _window_mask(
    window: int,
    sinks: int,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device,
    **_others,  # transformers says more than is needed here
) -> Tensor:
    """What a registered mask function owes its kernel: who sees whom, (B, 1, T, S)."""
    start = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)  # each row's first token
    if attention_mask is not None:  # generate drops a mask of ones
        start = attention_mask.long().argmax(dim=1, keepdim=True)
    query = torch.arange(q_offset, q_offset + q_length, device=device) - start  # (B, T)
    key = torch.arange(kv_offset, kv_offset + kv_length, device=device) - start  # (B, S)
    return visible_at(query, key, window, sinks)[:, None]
