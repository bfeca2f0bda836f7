"""Step 9: the tokens of transformers' generate, one row or many, at once or as a stream."""

import itertools
import re
from types import ModuleType

import pytest
import torch
from parity import Pair, check_sampled, windowed

import hf_bridge
import minigpt
from minigpt import ContextOverflow, generate, stream

OPTIONS = list(itertools.product((0.7, 1.0, 1.6), (0, 12), (1.0, 0.8), (0.0, 0.05), (1.0, 1.3)))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_the_same_seed_draws_the_tokens_of_transformers(pair: Pair, temperature: float) -> None:
    for chosen, top_k, top_p, min_p, penalty in OPTIONS:
        if chosen == temperature:
            check_sampled(
                pair,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=penalty,
            )


def unequal(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 9, 5 and 2 tokens, padded on the left with a token that occurs in them."""
    ids = pair.ids(B=3, T=9)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :7] = 0, 0
    return ids.masked_fill(mask == 0, int(ids[0, 0])), mask


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_batch_of_unequal_prompts_is_each_prompt_alone(
    pair: Pair, window: int | None, chunk: int | None
) -> None:
    model = windowed(pair.ours, window)
    ids, mask = unequal(pair)
    options = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": 1.2}
    batch = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk, **options)
    for row in range(3):
        alone = generate(model, ids[row : row + 1, mask[row] == 1], **options)
        assert batch[row, 9:].tolist() == alone[0, int(mask[row].sum()) :].tolist()


def test_a_padded_batch_under_a_window_with_sinks_is_each_prompt_alone(pair: Pair) -> None:
    model = windowed(pair.ours, 4, 2)
    ids, mask = unequal(pair)
    batch = generate(model, ids, attention_mask=mask, max_new_tokens=12, temperature=0)
    for row in range(3):
        only = ids[row : row + 1, mask[row] == 1]
        alone = generate(model, only, max_new_tokens=12, temperature=0)
        assert batch[row, 9:].tolist() == alone[0, only.shape[1] :].tolist()


def test_rows_that_end_go_on_with_the_end_token(pair: Pair) -> None:
    ids, mask = unequal(pair)
    free = generate(pair.ours, ids, attention_mask=mask, max_new_tokens=12, temperature=0)
    eos = int(free[1, 11])
    ours = generate(
        pair.ours, ids, attention_mask=mask, max_new_tokens=12, temperature=0, eos_token_id=eos
    )
    theirs = pair.theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    assert ours.tolist() == theirs.tolist()


def test_a_stream_gives_the_same_tokens_and_ends_with_the_end_token(pair: Pair) -> None:
    ids = pair.ids(T=6)
    whole = generate(pair.ours, ids, max_new_tokens=10, temperature=0)[0, 6:].tolist()
    assert list(stream(pair.ours, ids, max_new_tokens=10, temperature=0)) == whole
    eos = whole[4]
    cut = list(stream(pair.ours, ids, max_new_tokens=10, temperature=0, eos_token_id=eos))
    assert cut == whole[: whole.index(eos) + 1]


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_a_prompt_in_chunks_gives_the_same_tokens(pair: Pair, chunk: int) -> None:
    ids = pair.ids(T=11)
    options = {"max_new_tokens": 8, "temperature": 0}
    whole = generate(pair.ours, ids, **options)
    assert torch.equal(generate(pair.ours, ids, prefill_chunk_size=chunk, **options), whole)


def test_a_closed_stream_computes_nothing_more(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    hidden = pair.ours.hidden
    monkeypatch.setattr(pair.ours, "hidden", lambda *a, **k: calls.append(1) or hidden(*a, **k))
    tokens = stream(pair.ours, pair.ids(T=6), max_new_tokens=20)
    next(tokens), next(tokens), next(tokens)
    assert len(calls) == 3
    tokens.close()
    assert list(tokens) == []
    assert len(calls) == 3


def test_two_streams_interleave_on_one_model(pair: Pair) -> None:
    prompts = [pair.ids(T=6), pair.ids(T=9, seed=1)]

    def start(number: int):
        generator = torch.Generator().manual_seed(number)
        return stream(pair.ours, prompts[number], max_new_tokens=12, generator=generator)

    alone = [list(start(0)), list(start(1))]
    together = list(zip(start(0), start(1)))
    assert [list(tokens) for tokens in zip(*together)] == alone


def test_a_cache_that_holds_the_beginning_saves_computing_it(pair: Pair) -> None:
    ids = pair.ids(T=12)
    cache = pair.ours.new_cache()
    pair.ours(ids[:, :7], cache=cache)
    warm = list(stream(pair.ours, ids, cache=cache, max_new_tokens=8, temperature=0))
    assert warm == list(stream(pair.ours, ids, max_new_tokens=8, temperature=0))
    assert cache.length == 12 + 8 - 1


def test_the_context_may_be_filled_to_the_last_token(pair: Pair) -> None:
    assert generate(pair.ours, pair.ids(T=60), max_new_tokens=4, temperature=0).shape == (1, 64)


@pytest.mark.parametrize(
    ("length", "options", "error", "message"),
    [
        (
            60,
            {"max_new_tokens": 5},
            ContextOverflow,
            "room for 65 tokens, but the context holds 64",
        ),
        (
            65,
            {"max_new_tokens": 1},
            ContextOverflow,
            "room for 66 tokens, but the context holds 64",
        ),
        (5, {"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        (5, {"prefill_chunk_size": 0}, ValueError, "prefill_chunk_size must be at least 1, got 0"),
        (5, {"temperature": -1}, ValueError, "temperature must be a number of 0 or more, got -1"),
        (0, {}, ValueError, "the prompt is empty"),
    ],
)
def test_what_cannot_be_is_refused_before_any_forward(
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    options: dict,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(pair.ours, "hidden", lambda *_, **__: pytest.fail("computed"))
    for function in (generate, stream):
        with pytest.raises(error, match=message):
            function(pair.ours, pair.ids(T=length), **options)


@pytest.mark.parametrize("side", [minigpt, hf_bridge])
def test_a_cache_that_cannot_hold_the_reply_is_refused_before_any_forward(
    pair: Pair, side: ModuleType
) -> None:
    model, ids = side.GPT.from_pretrained(pair.folder), pair.ids(T=3)
    cache = model.new_cache(capacity=4)
    message = "needs room for 5 tokens, but the context holds 4"
    with pytest.raises(side.ContextOverflow, match=message):
        side.stream(model, ids, cache=cache, max_new_tokens=3)
    assert cache.length == 0
    with pytest.raises(ValueError, match=r"as the cache, 2, got 1: new_cache\(1\) makes"):
        side.stream(model, ids, cache=model.new_cache(2))
    # The last token is drawn but never read: the cache needs no room for it.
    assert len(list(side.stream(model, ids, cache=cache, max_new_tokens=2))) == 2


@pytest.mark.parametrize("side", [minigpt, hf_bridge])
@pytest.mark.parametrize("shape", [(1, 6), (2, 3), (2, 9), (6,)])
def test_a_mask_of_another_shape_is_refused_as_the_model_refuses_it(
    pair: Pair, side: ModuleType, shape: tuple[int, ...]
) -> None:
    model, ids = side.GPT.from_pretrained(pair.folder), pair.ids(B=2, T=6)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[..., 0] = 0
    message = re.escape(f"attention_mask must have the shape of ids, (2, 6), got {shape}")
    with pytest.raises(ValueError, match=message):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=message):
        side.generate(model, ids, attention_mask=mask, max_new_tokens=2)


def test_a_stream_of_a_batch_and_a_full_cache_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="stream continues one row, got a batch of 2"):
        stream(pair.ours, pair.ids(B=2, T=3))
    cache = pair.ours.new_cache()
    pair.ours(pair.ids(T=6), cache=cache)
    with pytest.raises(ValueError, match="must hold fewer tokens than ids, got 6 of 6"):
        stream(pair.ours, pair.ids(T=6), cache=cache)
