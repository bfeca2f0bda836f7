"""Step 6: the whole decoder.  (B, T) token ids -> (B, T, V) logits.

    x = wte[ids] + wpe[positions]
    x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))      n_layer times
    logits = ln_f(x) wte^T

Radford et al. 2019, section 2.3: layer norms moved to the input of each sub-block, one more at
the end.

Before: cache.py.  After: weights.py.  Twin: hf_bridge/model.py.  Proof: tests/test_model.py.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.attention import Attention, Conv1D
from minigpt.cache import Cache, ContextOverflow, FullCache, WindowCache, check_room
from minigpt.config import GPTConfig
from minigpt.mask import check_window, left_padding, visible_at


class MLP(nn.Module):
    """Widen fourfold, bend, narrow.  (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.inner_size)
        self.c_proj = Conv1D(config.inner_size, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2 was trained with the tanh form of GELU; the exact form is a different model.
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Two residual steps, normalised before, not after.  (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2, with fresh weights drawn from `generator`; `from_pretrained` reads trained ones.

    `sliding_window` and `attention_sinks` are ways to run a model, not part of it: no file
    records them.

    >>> model = GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2))
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
        check_window(sliding_window, attention_sinks)
        self.config = config
        self.sliding_window = sliding_window
        self.attention_sinks = attention_sinks
        device = torch.get_default_device()
        with torch.device("meta"):  # torch's layers would draw weights of their own first
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
            self.drop = nn.Dropout(config.embd_pdrop)
            self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.to_empty(device=device)
        self.initialize(generator)

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
        from minigpt import weights

        model = weights.load(name_or_path, dtype=dtype, device=device)
        check_window(sliding_window, attention_sinks)
        model.sliding_window, model.attention_sinks = sliding_window, attention_sinks
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors as transformers reads them. See weights.save."""
        from minigpt import weights

        weights.save(self, folder)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: N(0, 0.02), residual projections 1 / sqrt(2 n_layer) of that."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in f".{name}":
                parameter.fill_(1.0)
            else:
                scale = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1
                parameter.normal_(0.0, std / scale, generator=generator)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.wte.weight.device

    def forward(
        self, ids: Tensor, *, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits for every position: (B, T) -> (B, T, V).

        `attention_mask` (B, T) of 0 and 1 marks left padding. With a `cache`, ids continue after
        the tokens that it holds, and it holds them too afterwards. Raises ValueError for ids that
        are no tokens or not as many rows as the cache's, ContextOverflow past n_positions.
        """
        self.check_ids(ids, attention_mask)
        return self.head(self.hidden(ids, attention_mask=attention_mask, cache=cache))

    def hidden(
        self, ids: Tensor, *, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The last block's normalised output, (B, T) -> (B, T, C); arguments as in forward."""
        B, T = ids.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.n_positions:
            raise ContextOverflow(start + T, self.config.n_positions)
        if cache is not None:
            check_room(cache, B, start + T)
        padding = self._padding(attention_mask, cache)
        columns = torch.arange(start, start + T, device=ids.device)  # (T,)
        positions = columns if padding is None else (columns - padding).clamp(min=0)  # (B, T)
        mask = self._mask(columns, padding, cache)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Score every word of the vocabulary, by the embedding where tied: (…, C) -> (…, V)."""
        tied = self.config.tie_word_embeddings
        return F.linear(x, self.wte.weight) if tied else self.lm_head(x)

    def new_cache(
        self, batch_size: int = 1, *, capacity: int | None = None, full: bool = False
    ) -> Cache:
        """An empty cache: a ring for a window shorter than the context, else `capacity` long.

        The default capacity is the whole context. Both give the same logits; a ring takes less
        memory. `full` asks for no ring.
        """
        window, sinks, like = self.sliding_window, self.attention_sinks, self.wte.weight
        if window is not None and window + sinks < self.config.n_positions and not full:
            return WindowCache(self.config, batch_size, window, sinks, like=like)
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
        low, high = (bound.item() for bound in ids.aminmax())
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

    def _padding(self, attention_mask: Tensor | None, cache: Cache | None) -> Tensor | None:
        """(B, 1) columns of padding at each row's left, or None. A cache remembers them."""
        if attention_mask is None:
            return cache.padding if cache is not None else None
        padding = left_padding(attention_mask)
        if cache is not None and padding is not None:
            if cache.length:
                raise ValueError("padding stands on the left: give its mask before the first token")
            cache.pad(padding)
        return cache.padding if cache is not None else padding

    def _mask(self, columns: Tensor, padding: Tensor | None, cache: Cache | None) -> Tensor | None:
        """Who sees whom in this call, or None for the plain causal case, which needs no matrix."""
        keys = columns if cache is None else cache.columns(len(columns))  # (S,)
        window, sinks = self.sliding_window, self.attention_sinks
        if padding is None:
            return None if window is None else visible_at(columns, keys, window, sinks)  # (T, S)
        mask = visible_at(columns - padding, keys - padding, window, sinks)  # (B, T, S)
        # Padding sees itself. With nothing to see its softmax would be NaN, and 0 * NaN is NaN
        # in the sums of those who do not look at it.
        mask |= columns[:, None] == keys
        return mask[:, None]  # (B, 1, T, S)
