"""Step 5: a cache changes the work, never the result."""

import pytest
import torch
from parity import Pair, check_window, in_pieces, windowed

import hf_bridge
import minigpt
from minigpt.cache import ContextOverflow, FullCache, WindowCache

PIECES = [(24,), (1,) * 24, (2, 1, 20, 1), (7, 7, 7, 3), (13, 1, 1, 9)]


@pytest.mark.parametrize("full", [True, False], ids=["full", "ring"])
@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (5, 3), (2, 1), (24, 0), (60, 2)])
def test_both_caches_give_the_windows_logits(
    pair: Pair, window: int, sinks: int, pieces: tuple[int, ...], full: bool
) -> None:
    check_window(pair, window, sinks, pieces, full=full)


@torch.no_grad()
def test_a_ring_holds_left_padded_rows(pair: Pair) -> None:
    model = windowed(pair.ours, 5)
    ids = pair.ids(B=2, T=24)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    whole = model(ids, attention_mask=mask)
    cache = model.new_cache(2)
    first = model(ids[:, :10], attention_mask=mask[:, :10], cache=cache)
    rest = in_pieces(model, ids[:, 10:], (1, 12, 1), cache)
    real = mask.bool()
    torch.testing.assert_close(torch.cat([first, rest], 1)[real], whole[real])


def test_a_ring_takes_the_same_memory_however_long_the_text(pair: Pair) -> None:
    model = windowed(pair.ours, 5, 2)
    cache = model.new_cache()
    before = cache.nbytes
    in_pieces(model, pair.ids(T=60), (30, 1, 29), cache)
    assert cache.nbytes == before == model.new_cache(capacity=7, full=True).nbytes
    assert isinstance(cache, WindowCache)


@torch.no_grad()
@pytest.mark.parametrize(("window", "sinks"), [(64, 0), (60, 4), (10, 10**11), (10**11, 0)])
def test_a_window_that_sees_the_whole_context_takes_no_more_memory_than_it(
    pair: Pair, window: int, sinks: int
) -> None:
    model, ids = windowed(pair.ours, window, sinks), pair.ids(T=64)
    cache = model.new_cache()
    assert cache.nbytes == pair.ours.new_cache().nbytes
    torch.testing.assert_close(in_pieces(model, ids, (40, 1, 23), cache), pair.ours(ids))


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 30])
def test_a_truncated_cache_goes_on_as_if_nothing_had_followed(
    pair: Pair, window: int | None
) -> None:
    model = windowed(pair.ours, window)
    ids, other = pair.ids(T=24), pair.ids(T=24, seed=1)
    cache = model.new_cache()
    model(torch.cat([ids[:, :10], other[:, :8]], dim=1), cache=cache)
    assert cache.truncate(10)
    torch.testing.assert_close(model(ids[:, 10:], cache=cache), model(ids)[:, 10:])


def test_a_ring_that_has_turned_cannot_go_back(pair: Pair) -> None:
    model = windowed(pair.ours, 4, 1)
    cache = model.new_cache()
    model(pair.ids(T=9), cache=cache)
    assert not cache.truncate(8)
    assert cache.length == 9
    assert cache.truncate(9)


@torch.no_grad()
def test_an_interrupted_forward_leaves_a_full_cache_as_it_was(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = pair.ids(T=12)
    cache = pair.ours.new_cache()
    pair.ours(ids[:, :5], cache=cache)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pair.ours.h[1].mlp, "forward", interrupt)
        pair.ours(pair.ids(T=4, seed=3), cache=cache)
    assert cache.length == 5
    torch.testing.assert_close(pair.ours(ids[:, 5:], cache=cache), pair.ours(ids)[:, 5:])


@pytest.fixture(params=[None, 30], ids=["full", "ring"])
def both(request: pytest.FixtureRequest, pair: Pair) -> list:
    options = {"dtype": torch.float64, "sliding_window": request.param}
    return [side.GPT.from_pretrained(pair.folder, **options) for side in (minigpt, hf_bridge)]


@torch.no_grad()
def test_a_cache_truncated_to_nothing_forgets_its_padding(pair: Pair, both: list) -> None:
    ids = pair.ids(B=2, T=6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for model in both:
        cache = model.new_cache(2)
        model(ids, attention_mask=mask, cache=cache)
        assert cache.truncate(0)
        torch.testing.assert_close(model(ids, cache=cache), model(ids))


@torch.no_grad()
def test_a_cache_takes_as_many_rows_as_it_was_made_for(pair: Pair, both: list) -> None:
    for model in both:
        for rows, B in ((2, 1), (1, 2)):
            cache = model.new_cache(rows)
            for _ in range(2):
                with pytest.raises(
                    ValueError, match=rf"as the cache, {rows}, got {B}: new_cache\({B}\) makes"
                ):
                    model(pair.ids(B=B, T=6), cache=cache)
                model(pair.ids(B=rows, T=6), cache=cache)
        cache, mask = model.new_cache(2), torch.tensor([[0, 0, 1, 1, 1, 1]])
        with pytest.raises(ValueError, match="as many rows as the cache, 2, got 1"):
            model(pair.ids(B=1, T=6), attention_mask=mask, cache=cache)
        assert cache.padding is None
        with pytest.raises(ValueError, match=r"batch_size .*must be at least 1, got 0"):
            model.new_cache(0)


def test_sinks_and_padding_do_not_share_a_ring(pair: Pair) -> None:
    cache = windowed(pair.ours, 4, 1).new_cache(2)
    with pytest.raises(ValueError, match="with sinks holds no padded rows: use a full cache"):
        cache.pad(torch.tensor([[1], [0]]))


def test_padding_after_the_first_token_is_refused(pair: Pair) -> None:
    cache = pair.ours.new_cache(2)
    ids = pair.ids(B=2, T=3)
    pair.ours(ids, cache=cache)
    with pytest.raises(ValueError, match="give its mask before the first token"):
        pair.ours(ids, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), cache=cache)


def test_sizes_that_make_no_cache_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 4"):
        FullCache(pair.ours.config, 0, 4, like=torch.empty(0))
    with pytest.raises(ContextOverflow):
        FullCache(pair.ours.config, 1, 4, like=torch.empty(0)).columns(5)
