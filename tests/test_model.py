"""Step 6: whole, cached, chunked and padded forwards equal transformers'."""

from pathlib import Path

import pytest
import torch
from parity import (
    Pair,
    assert_close,
    check_greedy,
    check_padded,
    check_pieces,
    check_whole,
    new_pair,
    small_config,
)

from minigpt import GPT, ContextOverflow, GPTConfig, generate

FLOAT32 = 1e-4  # 12 layers of rounding at |logit| near 50


def test_a_whole_forward_equals_transformers(pair: Pair) -> None:
    check_whole(pair)


@pytest.mark.parametrize("first", range(1, 24))
def test_every_split_of_the_prompt_gives_the_same_logits(pair: Pair, first: int) -> None:
    check_pieces(pair, (first, 24 - first))


def test_one_token_at_a_time_gives_the_same_logits(pair: Pair) -> None:
    check_pieces(pair, (1,) * 24)


def test_a_left_padded_batch_gives_each_row_its_own_logits(pair: Pair) -> None:
    check_padded(pair)


def test_a_piece_may_be_nothing_but_padding(pair: Pair) -> None:
    check_padded(pair, (3, 3, 18))


def test_an_inner_width_of_its_own_equals_transformers(tmp_path: Path) -> None:
    check_whole(new_pair(tmp_path, small_config(n_inner=80)))


def test_greedy_tokens_equal_transformers(pair: Pair) -> None:
    check_greedy(pair)


@pytest.mark.slow
def test_gpt2_smalls_shape_agrees_in_float32(tmp_path: Path) -> None:
    config = small_config(vocab_size=1000, n_positions=256, n_embd=768, n_layer=12, n_head=12)
    narrower = 0.25  # std 0.05 keeps the logits near the size of real ones
    pair = new_pair(tmp_path, config, torch.float32)
    for parameter in pair.theirs.parameters():
        parameter.data.mul_(narrower)
    pair.theirs.save_pretrained(tmp_path)
    pair.ours = GPT.from_pretrained(tmp_path)
    ids = pair.ids(B=1, T=48)
    with torch.no_grad():
        assert_close(pair.ours(ids), pair.expected(ids), FLOAT32)
    ours = generate(pair.ours, ids, max_new_tokens=200, temperature=0)
    theirs = pair.theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=200,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for step, logits in enumerate(theirs.logits):
        best, second = logits[0].topk(2).values.tolist()
        if best - second <= FLOAT32:
            break  # from a tie on, the two may go different ways
        assert ours[0, 48 + step] == theirs.sequences[0, 48 + step]
    assert step > 50, "a tie so early says nothing about the rest"


def test_fresh_weights_are_a_function_of_the_generator() -> None:
    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    a, b, c = (GPT(config, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.wte.weight, b.wte.weight)
    assert not torch.equal(a.wte.weight, c.wte.weight)
    assert all(p.isfinite().all() for p in a.parameters())


def test_fresh_residual_projections_are_scaled_by_the_depth() -> None:
    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=256, n_layer=8, n_head=2)
    block = GPT(config, generator=torch.Generator().manual_seed(0)).h[0]
    ratio = (block.attn.c_proj.weight.std() / block.attn.c_attn.weight.std()).item()
    assert ratio == pytest.approx(1 / 4, rel=0.02)


def test_the_context_overflows_before_anything_is_computed(pair: Pair) -> None:
    with pytest.raises(ContextOverflow, match="room for 65 tokens, but the context holds 64"):
        pair.ours(pair.ids(T=65))
    cache = pair.ours.new_cache(capacity=10)
    pair.ours(pair.ids(T=8), cache=cache)
    with pytest.raises(ContextOverflow, match="room for 11 tokens, but the context holds 10"):
        pair.ours(pair.ids(T=3), cache=cache)
    assert cache.length == 8


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), "the prompt is empty"),
        (torch.tensor([[1, 97]]), r"must be in \[0, 97\), the vocabulary, got 97"),
        (torch.tensor([[-1, 3]]), r"must be in \[0, 97\), the vocabulary, got -1"),
        (torch.tensor([1, 2]), r"must be a \(B, T\) tensor of integers, got shape \(2,\)"),
        (torch.tensor([[0.5]]), "of integers, got shape .* torch.float32"),
    ],
)
def test_what_is_no_token_is_refused(pair: Pair, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair.ours(ids)


def test_a_mask_of_another_shape_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"shape of ids, \(1, 4\), got \(1, 3\)"):
        pair.ours(pair.ids(T=4), attention_mask=torch.ones(1, 3))


def test_building_draws_from_the_given_generator_alone() -> None:
    before = torch.get_rng_state()
    GPT(GPTConfig(n_embd=8, n_layer=1, n_head=2), generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
