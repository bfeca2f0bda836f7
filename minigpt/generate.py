"""Step 9: one token after another.

    prefill   the whole prompt at once, its keys and values into the cache
    decode    the newest token alone, again and again, each reading the cache

Before: sampler.py.  After: quant.py.  Twin: hf_bridge/generate.py.  Proof: tests/test_generate.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minigpt.cache import Cache, ContextOverflow, check_room
from minigpt.mask import left_padding
from minigpt.model import GPT
from minigpt.sampler import Sampler


def generate(
    model: GPT,
    ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    eos_token_id: int | None = None,
    prefill_chunk_size: int | None = None,
) -> Tensor:
    """Continue each row: (B, T) -> (B, T + new).

    Rows of unequal length are padded on the left and marked in `attention_mask` (B, T). A row
    that has drawn `eos_token_id` goes on with it; the loop ends when every row has, or after
    `max_new_tokens`. `prefill_chunk_size` reads a long prompt in pieces of that many tokens.

    Raises ValueError for bad options, ids or mask and ContextOverflow if prompt and reply do not
    fit, both before any computation.
    """
    sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    chunk = prefill_chunk_size
    steps = _decode(
        model, ids, attention_mask, None, sampler, max_new_tokens, generator, eos_token_id, chunk
    )
    return torch.cat([ids, *(token[:, None] for token in steps)], dim=1)


def stream(
    model: GPT,
    ids: Tensor,
    *,
    cache: Cache | None = None,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    eos_token_id: int | None = None,
    prefill_chunk_size: int | None = None,
) -> Iterator[int]:
    """The same for one row, (1, T), each token as soon as it is drawn; closing it stops the model.

    A `cache` that holds the first tokens of ids saves computing them again; it is left holding
    all but the last token, and must have room for them. The eos token, if it comes, is the last
    one given.
    """
    if ids.shape[0] != 1:
        raise ValueError(f"stream continues one row, got a batch of {ids.shape[0]}")
    sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    chunk = prefill_chunk_size
    steps = _decode(
        model, ids, None, cache, sampler, max_new_tokens, generator, eos_token_id, chunk
    )
    return (int(token) for token in steps)


def _decode(
    model: GPT,
    ids: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    sampler: Sampler,
    max_new_tokens: int,
    generator: torch.Generator | None,
    eos_token_id: int | None,
    chunk: int | None,
) -> Iterator[Tensor]:
    """Check everything now; then give (B,) tokens, each computed when it is asked for."""
    model.check_ids(ids, attention_mask)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill_chunk_size must be at least 1, got {chunk}")
    B, T = ids.shape
    if T + max_new_tokens > model.config.n_positions:
        raise ContextOverflow(T + max_new_tokens, model.config.n_positions)
    padding = None if attention_mask is None else left_padding(attention_mask)
    if cache is None:
        # A ring keeps the first columns as sinks, which in padded rows are not the first tokens.
        full = padding is not None and model.attention_sinks > 0
        cache = model.new_cache(B, capacity=T + max_new_tokens, full=full)
    check_room(cache, B, T + max_new_tokens - 1)  # the last token is never read
    if padding is not None:
        cache.pad(padding)
    if cache.length >= T:
        raise ValueError(
            f"the cache must hold fewer tokens than ids, got {cache.length} of {T}: "
            "the reply follows the last one"
        )
    seen = None
    if sampler.repetition_penalty != 1:
        seen = _seen(ids, attention_mask, model.config.vocab_size)
    return _steps(
        model,
        ids[:, cache.length :],
        cache,
        sampler,
        seen,
        max_new_tokens,
        generator,
        eos_token_id,
        chunk,
    )


@torch.inference_mode()
def _steps(
    model: GPT,
    new: Tensor,
    cache: Cache,
    sampler: Sampler,
    seen: Tensor | None,
    max_new_tokens: int,
    generator: torch.Generator | None,
    eos_token_id: int | None,
    chunk: int | None,
) -> Iterator[Tensor]:
    ended = torch.zeros(len(new), dtype=torch.bool, device=new.device)
    for _ in range(max_new_tokens):
        for piece in new.split(
            chunk or new.shape[1], dim=1
        ):  # the prompt, then one token at a time
            x = model.hidden(piece, cache=cache)
        logits = model.head(x[:, -1])  # (B, V): only the last position predicts something new
        token = sampler.sample(logits, seen, generator=generator)  # (B,)
        if eos_token_id is not None:
            token = token.masked_fill(ended, eos_token_id)
            ended |= token == eos_token_id
        yield token
        if ended.all():
            return
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        new = token[:, None]


def _seen(ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """(B, V): True for each token that stands in a row, its padding aside."""
    real = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids.dtype)
    counts = torch.zeros(ids.shape[0], vocab_size, dtype=ids.dtype, device=ids.device)
    return counts.scatter_add_(1, ids, real) > 0
