"""Checks that minigpt computes what transformers computes: for the tests, and the teeth.

Each takes a pair of models with the same float64 weights and fails by AssertionError. The weights
are drawn wide (std 0.2): with GPT-2's own 0.02 most mistakes would hide below any tolerance.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    set_seed,
)

from minigpt import GPT, generate
from minigpt.cache import Cache
from minigpt.mask import left_padding
from minigpt.sampler import Sampler

TOLERANCE = 1e-9  # float64: rounding stays near 1e-14, the smallest mistake of the teeth near 1e-6


@dataclass
class Pair:
    """Two models with the same weights."""

    ours: GPT
    theirs: GPT2LMHeadModel
    folder: Path

    def ids(self, B: int = 1, T: int = 24, seed: int = 0) -> Tensor:
        """(B, T) random tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.ours.config.vocab_size, (B, T), generator=generator)

    @torch.no_grad()
    def expected(self, ids: Tensor, **options: Any) -> Tensor:
        """transformers' logits; an explicit mask, without which it may guess packed sequences."""
        options = {"attention_mask": torch.ones_like(ids), **options}
        return self.theirs(ids, **options).logits


def small_config(**changes: Any) -> GPT2Config:
    """A GPT-2 small enough for a test, with unlike sizes so that no two axes can be confused."""
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4}
    return GPT2Config(**{**sizes, "bos_token_id": None, "eos_token_id": None, **changes})


def new_pair(folder: Path, config: GPT2Config, dtype: torch.dtype = torch.float64) -> Pair:
    """Save a random HF model, and load it with both."""
    set_seed(0)
    theirs = GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder)
    ours = GPT.from_pretrained(folder, dtype=dtype)
    return Pair(ours, theirs.to(dtype), folder)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Fail with the largest difference; NaN is never close."""
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.3g} > {tolerance:g}"


@torch.no_grad()
def check_whole(pair: Pair) -> None:
    """One forward over a batch."""
    ids = pair.ids(B=3)
    assert_close(pair.ours(ids), pair.expected(ids))


@torch.no_grad()
def check_pieces(pair: Pair, pieces: tuple[int, ...] = (5, 1, 1, 10, 7)) -> None:
    """The same prompt through a cache, in pieces of these lengths."""
    ids = pair.ids(B=2, T=sum(pieces))
    got = in_pieces(pair.ours, ids, pieces, pair.ours.new_cache(2))
    assert_close(got, pair.expected(ids))


@torch.no_grad()
def check_padded(pair: Pair, pieces: tuple[int, ...] = (9, 1, 14)) -> None:
    """A left-padded batch, with the positions that HF's generate would give it."""
    ids = pair.ids(B=3, T=sum(pieces))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :8] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = pair.expected(ids, attention_mask=mask, position_ids=positions)
    real = mask.bool()
    assert_close(pair.ours(ids, attention_mask=mask)[real], theirs[real])
    cache = pair.ours.new_cache(3)
    cache.pad(left_padding(mask))
    assert_close(in_pieces(pair.ours, ids, pieces, cache)[real], theirs[real])


@torch.no_grad()
def check_window(
    pair: Pair,
    window: int = 5,
    sinks: int = 0,
    pieces: tuple[int, ...] = (8, 1, 1, 12, 2),
    *,
    full: bool = False,
) -> None:
    """A sliding window against HF with the mask written out cell by cell."""
    T = sum(pieces)
    ids = pair.ids(B=2, T=T)
    dense = torch.zeros(T, T, dtype=torch.bool)
    for query in range(T):
        for key in range(query + 1):
            dense[query, key] = query - key < window or key < sinks
    theirs = pair.expected(ids, attention_mask=dense.expand(2, 1, T, T))
    ours = windowed(pair.ours, window, sinks)
    assert_close(ours(ids), theirs)
    assert_close(in_pieces(ours, ids, pieces, ours.new_cache(2, full=full)), theirs)


@torch.no_grad()
def check_greedy(pair: Pair) -> None:
    """Greedy tokens, with a repetition penalty in the second half of the check."""
    ids = pair.ids(B=1, T=6)
    for penalty in (1.0, 1.3):
        ours = generate(
            pair.ours, ids, max_new_tokens=24, temperature=0, repetition_penalty=penalty
        )
        theirs = pair.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
        )
        assert ours.tolist() == theirs.tolist()


@torch.no_grad()
def check_sampled(pair: Pair, **options: Any) -> None:
    """The same seed draws the same tokens as HF's own generate."""
    ids = pair.ids(B=1, T=6)
    options = {"temperature": 0.7, "top_p": 0.6, "repetition_penalty": 1.4, **options}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        ours = generate(pair.ours, ids, max_new_tokens=16, generator=generator, **options)
        torch.manual_seed(seed)
        theirs = pair.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=True,
            **{"top_k": 0, **options},
        )
        assert ours.tolist() == theirs.tolist()


def check_processed(pair: Pair, **options: Any) -> None:
    """Sampler.process gives the scores of HF's processors, in HF's order, on random logits."""
    chosen = {"temperature": 2.5, "top_k": 80, "top_p": 0.97, "min_p": 0.01, **options}
    penalty = chosen.pop("repetition_penalty", 1.4)
    logits = 3 * torch.randn(50, 97, generator=torch.Generator().manual_seed(0))
    ids = pair.ids(B=50, T=30)
    seen = torch.zeros(50, 97, dtype=torch.bool).scatter(1, ids, True)
    ours = Sampler(repetition_penalty=penalty, **chosen).process(logits, seen)
    theirs = logits
    for processor in (
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(chosen["temperature"]),
        TopKLogitsWarper(chosen["top_k"]),
        TopPLogitsWarper(chosen["top_p"]),
        MinPLogitsWarper(chosen["min_p"]),
    ):
        theirs = processor(ids, theirs)
    assert torch.equal(ours, theirs)


def in_pieces(model: GPT, ids: Tensor, pieces: tuple[int, ...], cache: Cache) -> Tensor:
    """All logits of a prompt that comes in pieces."""
    return torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)


def windowed(model: GPT, window: int | None, sinks: int = 0) -> GPT:
    """The same weights under a window: a shallow copy, so that the fixture stays as it is."""
    copy = model.__class__.__new__(model.__class__)
    copy.__dict__ = {**model.__dict__, "sliding_window": window, "attention_sinks": sinks}
    return copy
