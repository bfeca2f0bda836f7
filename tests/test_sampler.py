"""Step 8: each filter keeps what transformers keeps, and ends are identities."""

import itertools
import math

import pytest
import torch
from parity import check_processed
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import hf_bridge
import minigpt
from minigpt.sampler import Sampler, keep_min_p, keep_top_k, keep_top_p


def logits(kind: str) -> torch.Tensor:
    """(40, 30) random scores; rounded ones tie often, flat ones always."""
    random = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 2
    return {"random": random, "ties": random.round(), "flat": random * 0}[kind]


@pytest.mark.parametrize("kind", ["random", "ties", "flat"])
def test_the_kept_sets_are_transformers_kept_sets(kind: str) -> None:
    scores = logits(kind)
    for k in (1, 2, 5, 29, 30, 100):
        assert torch.equal(keep_top_k(scores, k), TopKLogitsWarper(k)(None, scores))
    for p in (0.01, 0.26, 0.5, 0.9, 0.999):
        assert torch.equal(keep_top_p(scores, p), TopPLogitsWarper(p)(None, scores))
        assert torch.equal(keep_min_p(scores, p), MinPLogitsWarper(p)(None, scores))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.7])
def test_the_order_is_transformers_order(pair, temperature: float, penalty: float) -> None:
    options = itertools.product((1, 10, 97), (0.3, 0.9), (0.01, 0.5))
    for top_k, top_p, min_p in options:
        check_processed(
            pair,
            temperature=temperature,
            repetition_penalty=penalty,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )


def test_the_word_that_crosses_top_p_is_kept() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = {p: keep_top_p(scores, p).isfinite().sum().item() for p in (0.4, 0.51, 0.79, 0.81)}
    assert kept == {0.4: 1, 0.51: 2, 0.79: 2, 0.81: 3}


def test_every_option_is_off_at_its_default() -> None:
    scores = logits("random")
    assert torch.equal(Sampler().process(scores), scores)
    assert torch.equal(Sampler(top_p=1.0, top_k=30).process(scores), scores)


def test_temperature_zero_is_the_likeliest_word_and_draws_nothing() -> None:
    scores = logits("random")
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    chosen = Sampler(temperature=0).sample(scores, generator=generator)
    assert torch.equal(chosen, scores.argmax(-1))
    assert torch.equal(generator.get_state(), before)


def test_a_draw_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)
    drawn = Sampler().sample(probabilities.log().expand(20_000, 3), generator=generator)
    rates = drawn.bincount(minlength=3) / 20_000
    # four standard deviations of the widest rate
    assert (rates - probabilities).abs().max() < 4 * math.sqrt(0.7 * 0.3 / 20_000)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    Sampler().sample(logits("random"), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number of 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a number of 0 or more, got nan"),
        ({"temperature": math.inf}, "temperature must be a number of 0 or more, got inf"),
        ({"top_k": -1}, r"top_k must be a whole number of 0 \(off\) or more, got -1"),
        ({"top_k": 1.5}, r"top_k must be a whole number of 0 \(off\) or more, got 1.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_p": math.nan}, r"top_p must be in \(0, 1\], got nan"),
        ({"min_p": -0.5}, r"min_p must be in \[0, 1\], got -0.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, got 0"),
    ],
)
def test_an_option_outside_its_range_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**options)


@pytest.mark.parametrize("side", [minigpt, hf_bridge], ids=["minigpt", "hf_bridge"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_scores_that_are_no_numbers_choose_no_word(pair, side, temperature: float) -> None:
    sampler = side.sampler.Sampler(temperature=temperature, top_k=5, top_p=0.9, min_p=0.1)
    for bad in (math.nan, math.inf):
        scores = logits("random").index_fill(1, torch.tensor([3]), bad)
        with pytest.raises(FloatingPointError, match="not finite: the model's weights hold NaN"):
            sampler.sample(scores)
    some = torch.tensor([[-math.inf, 1.0]])  # a word that is ruled out is none of it
    assert sampler.sample(some).tolist() == [1]
    model = side.GPT.from_pretrained(pair.folder)
    next(p for name, p in model.named_parameters() if "ln_f" in name).data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"dtype overflows \(load it in float32\)"):
        next(side.stream(model, pair.ids(T=4), max_new_tokens=2, temperature=temperature))


@pytest.mark.parametrize("side", [minigpt, hf_bridge], ids=["minigpt", "hf_bridge"])
def test_a_temperature_that_overflows_is_told(side) -> None:
    with pytest.raises(FloatingPointError, match=r"too near 0 \(0 takes the most likely word\)"):
        side.sampler.Sampler(temperature=1e-38).sample(logits("random"))
