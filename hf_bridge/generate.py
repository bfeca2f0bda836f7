"""Step 9 through transformers: model.generate, with a thread where tokens come one by one.

generate has no `generator=`: it draws from the global one. So it runs here with do_sample=False,
and the last processor draws by itself and leaves only the drawn token finite: the likeliest of
one. What is asked is checked first; generate would draw one token too many for the context and
then fail with an IndexError, and it goes on thinking after its reader has left.

Before: sampler.py.  After: quant.py.  Twin: minigpt/generate.py.  Proof: tests/test_generate.py.
"""

import math
import threading
from collections.abc import Generator
from queue import SimpleQueue

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from hf_bridge.cache import Cache, ContextOverflow, check_room
from hf_bridge.mask import left_padding
from hf_bridge.model import GPT
from hf_bridge.sampler import Sampler


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
    """Continue each row: (B, T) -> (B, T + new); arguments and errors as in minigpt."""
    sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    options = _options(
        model, ids, attention_mask, None, sampler, max_new_tokens, generator, eos_token_id
    )
    return model.hf.generate(ids, **options, **_chunks(prefill_chunk_size))


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
) -> Generator[int]:
    """The same for one row, each token as soon as it is drawn; closing it stops the model."""
    if ids.shape[0] != 1:
        raise ValueError(f"stream continues one row, got a batch of {ids.shape[0]}")
    sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    options = _options(model, ids, None, cache, sampler, max_new_tokens, generator, eos_token_id)
    return _tokens(model, ids, options | _chunks(prefill_chunk_size))


def _options(
    model: GPT,
    ids: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    sampler: Sampler,
    max_new_tokens: int,
    generator: torch.Generator | None,
    eos_token_id: int | None,
) -> dict:
    """Check everything now; then say it in the words of transformers' generate."""
    model.check_ids(ids, attention_mask)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    B, T = ids.shape
    if T + max_new_tokens > model.config.n_positions:
        raise ContextOverflow(T + max_new_tokens, model.config.n_positions)
    padding = None if attention_mask is None else left_padding(attention_mask)
    cache = model.new_cache(B, capacity=T + max_new_tokens) if cache is None else cache
    check_room(cache, B, T + max_new_tokens - 1)  # the last token is never read
    if padding is not None:
        cache.pad(padding)
    if cache.length >= T:
        raise ValueError(
            f"the cache must hold fewer tokens than ids, got {cache.length} of {T}: "
            "the reply follows the last one"
        )
    processors = sampler._warpers()
    if sampler.temperature:
        processors.append(_Draw(generator))
    return {
        "attention_mask": torch.ones_like(ids) if attention_mask is None else attention_mask,
        "past_key_values": cache,
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "repetition_penalty": float(sampler.repetition_penalty),
        "logits_processor": processors,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,  # what a row that has ended goes on with
    }


def _chunks(size: int | None) -> dict:
    if size is not None and size < 1:
        raise ValueError(f"prefill_chunk_size must be at least 1, got {size}")
    return {"prefill_chunk_size": size}


class _Draw(LogitsProcessor):
    """Draw with a generator of our own and rule all other tokens out."""

    def __init__(self, generator: torch.Generator | None):
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)  # (B, 1)
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


class _Closed(Exception):
    """Nobody wants another token."""


class _HandOver(BaseStreamer):
    """Hands each token over and waits until the next one is wanted, so nothing is drawn ahead."""

    def __init__(self) -> None:
        self.tokens: SimpleQueue = SimpleQueue()
        self.wanted = threading.Semaphore(0)
        self.closed = False
        self.prompt_is_past = False

    def put(self, value: Tensor) -> None:
        if self.prompt_is_past:  # generate shows its streamer the prompt first
            self.tokens.put(int(value))
            self.wanted.acquire()
        self.prompt_is_past = True
        if self.closed:
            raise _Closed

    def end(self) -> None:
        pass


def _tokens(model: GPT, ids: Tensor, options: dict) -> Generator[int]:
    streamer = _HandOver()

    def work() -> None:
        error = None
        try:
            model.hf.generate(ids, streamer=streamer, **options)
        except BaseException as raised:  # a silent thread would leave the reader waiting for ever
            error = raised
        streamer.tokens.put(error or StopIteration())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not isinstance(item := streamer.tokens.get(), BaseException):
            yield item
            streamer.wanted.release()
        if not isinstance(item, StopIteration):
            raise item
    finally:
        streamer.closed = True
        streamer.wanted.release()
        thread.join()
