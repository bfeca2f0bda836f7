"""The parity checks bite: each classic mistake, made on purpose, is caught by one of them.

A mistake changes a copy of our model, or a function of minigpt for the length of a test.
"""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity import (
    Pair,
    check_greedy,
    check_padded,
    check_pieces,
    check_processed,
    check_sampled,
    check_whole,
    check_window,
)
from torch import Tensor

from minigpt import cache, mask, model, sampler
from minigpt.attention import attend_fused

Mistake = Callable[[pytest.MonkeyPatch, Pair], None]


def exact_gelu(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    other = SimpleNamespace(gelu=lambda x, approximate: F.gelu(x), linear=F.linear)
    patch.setattr(model, "F", other)


def relu(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    patch.setattr(
        model, "F", SimpleNamespace(gelu=lambda x, approximate: x.relu(), linear=F.linear)
    )


def no_division_by_sqrt_d(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        return attend_fused(q * math.sqrt(q.shape[-1]), k, v, mask, dropout)

    for block in pair.ours.h:
        block.attn.attend = attend


def chunk_aligned_to_the_top_left(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)

    for block in pair.ours.h:
        block.attn.attend = attend


def layer_norm_with_another_epsilon(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    for block in pair.ours.h:
        block.ln_1.eps = 1e-6


def no_final_norm(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    pair.ours.ln_f = torch.nn.Identity()


def norm_after_the_sublayer(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    def forward(block: model.Block, x: Tensor, mask: Tensor | None, cache: object) -> Tensor:
        x = block.ln_1(x + block.attn(x, mask, cache))
        return block.ln_2(x + block.mlp(x))

    patch.setattr(model.Block, "forward", forward)


def square_projection_transposed(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    weight = pair.ours.h[1].attn.c_proj.weight
    weight.data = weight.data.T.contiguous()


def keys_and_queries_swapped(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    c_attn = pair.ours.h[0].attn.c_attn
    for parameter in (c_attn.weight, c_attn.bias):
        q, k, v = parameter.data.chunk(3, dim=-1)
        parameter.data = torch.cat([k, q, v], dim=-1)


def heads_cut_across(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    def split(attention: torch.nn.Module, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attention.n_head)).permute(0, 3, 1, 2)

    patch.setattr(type(pair.ours.h[0].attn), "split", split)


def head_not_tied(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    other = pair.ours.wte.weight.detach().clone()
    other[0] += 1e-3
    patch.setattr(pair.ours, "head", lambda x: F.linear(x, other))


def positions_restart_in_every_piece(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    lookup = pair.ours.wpe.forward
    patch.setattr(pair.ours.wpe, "forward", lambda p: lookup(p - p.min()))


def padding_counted_as_positions(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    lookup = pair.ours.wpe.forward
    patch.setattr(
        pair.ours.wpe, "forward", lambda p: lookup(torch.arange(p.shape[-1]).expand_as(p))
    )


def padding_visible(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    patch.setattr(model, "visible_at", lambda q, k, w, s: mask.visible_at(q, k.abs(), w, s))


def window_one_too_wide(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    patch.setattr(model, "visible_at", lambda q, k, w, s: mask.visible_at(q, k, w + 1, s))


def window_one_too_narrow(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    patch.setattr(model, "visible_at", lambda q, k, w, s: mask.visible_at(q, k, w - 1, s))


def sinks_forgotten(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    patch.setattr(model, "visible_at", lambda q, k, w, s: mask.visible_at(q, k, w, 0))


def ring_one_slot_short(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    def slots(ring: cache.WindowCache, columns: Tensor) -> Tensor:
        turning = ring.sinks + (columns - ring.sinks) % (ring.window - 1)
        return torch.where(columns < ring.sinks, columns, turning)

    patch.setattr(cache.WindowCache, "_slots", slots)


def sinks_overwritten_by_the_ring(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    def slots(ring: cache.WindowCache, columns: Tensor) -> Tensor:
        return columns % (ring.sinks + ring.window)

    patch.setattr(cache.WindowCache, "_slots", slots)


def new_keys_written_over_the_last(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    append = cache.FullCache.append

    def late(full: cache.FullCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = append(full, layer, k, v)
        full.length and keys[:, :, full.length - 1].copy_(k[:, :, 0])
        return keys, values

    patch.setattr(cache.FullCache, "append", late)


def the_crossing_token_dropped(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
        descending, order = logits.sort(dim=-1, descending=True)
        drop = descending.softmax(-1).cumsum(-1) > top_p
        drop[..., 0] = False
        return logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)

    patch.setattr(sampler, "keep_top_p", keep_top_p)


def penalty_that_rewards_negative_logits(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    patch.setattr(sampler, "penalize", lambda x, seen, by: torch.where(seen, x / by, x))


def top_p_before_temperature(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    def process(s: sampler.Sampler, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        logits = sampler.penalize(logits.float(), seen, s.repetition_penalty)
        return sampler.keep_top_p(logits, s.top_p) / (s.temperature or 1)

    patch.setattr(sampler.Sampler, "process", process)


def penalty_after_temperature_and_top_p(patch: pytest.MonkeyPatch, pair: Pair) -> None:
    def process(s: sampler.Sampler, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        logits = sampler.keep_top_p(logits.float() / (s.temperature or 1), s.top_p)
        return sampler.penalize(logits, seen, s.repetition_penalty)

    patch.setattr(sampler.Sampler, "process", process)


CHECKS: dict[str, Callable[[Pair], None]] = {
    "whole": check_whole,
    "pieces": check_pieces,
    "padded": check_padded,
    "window": check_window,
    "sinks": lambda pair: check_window(pair, 4, 2),
    "full cache": lambda pair: check_window(pair, full=True),
    "greedy": check_greedy,
    "sampled": check_sampled,
    "processed": check_processed,
}

CAUGHT_BY: list[tuple[Mistake, str]] = [
    (exact_gelu, "whole"),
    (relu, "whole"),
    (no_division_by_sqrt_d, "whole"),
    (layer_norm_with_another_epsilon, "whole"),
    (no_final_norm, "whole"),
    (norm_after_the_sublayer, "whole"),
    (square_projection_transposed, "whole"),
    (keys_and_queries_swapped, "whole"),
    (heads_cut_across, "whole"),
    (head_not_tied, "whole"),
    (chunk_aligned_to_the_top_left, "pieces"),
    (positions_restart_in_every_piece, "pieces"),
    (new_keys_written_over_the_last, "pieces"),
    (padding_counted_as_positions, "padded"),
    (padding_visible, "padded"),
    (window_one_too_wide, "full cache"),
    (window_one_too_wide, "window"),
    (window_one_too_narrow, "window"),
    (ring_one_slot_short, "window"),
    (sinks_forgotten, "sinks"),
    (sinks_overwritten_by_the_ring, "sinks"),
    (the_crossing_token_dropped, "sampled"),
    (penalty_that_rewards_negative_logits, "processed"),
    (top_p_before_temperature, "sampled"),
    (penalty_after_temperature_and_top_p, "sampled"),
]


@pytest.fixture
def own_pair(pair: Pair) -> Pair:
    """A copy of our model, to be spoilt."""
    return Pair(copy.deepcopy(pair.ours), pair.theirs, pair.folder)


@pytest.mark.parametrize("check", CHECKS)
def test_the_code_as_it_is_passes_every_check(pair: Pair, check: str) -> None:
    CHECKS[check](pair)


@pytest.mark.parametrize(
    ("mistake", "check"), CAUGHT_BY, ids=[f"{m.__name__}-{c}" for m, c in CAUGHT_BY]
)
def test_a_mistake_is_caught(
    monkeypatch: pytest.MonkeyPatch, own_pair: Pair, mistake: Mistake, check: str
) -> None:
    mistake(monkeypatch, own_pair)
    with pytest.raises(AssertionError):
        CHECKS[check](own_pair)
