"""Step 3: the masks, drawn as matrices, and against transformers' own mask functions."""

import pytest
import torch
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from minigpt.mask import left_padding, visible, visible_at


@pytest.mark.parametrize("window", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (7, 7), (1, 9), (4, 9)])
def test_a_window_is_transformers_window(T: int, S: int, window: int) -> None:
    theirs = sdpa_mask(
        1,
        T,
        S,
        q_offset=S - T,
        mask_function=sliding_window_causal_mask_function(window),
        allow_is_causal_skip=False,
    )
    assert torch.equal(visible(T, S, window), theirs[0, 0])


def test_a_chunk_is_aligned_to_the_bottom_right() -> None:
    assert visible(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_sinks_stay_visible_behind_the_window() -> None:
    assert visible(5, 5, window=2, sinks=1).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]


def test_a_window_as_long_as_the_text_is_no_window() -> None:
    assert torch.equal(visible(6, 6, window=6), visible(6, 6))


def test_a_window_of_one_is_the_identity() -> None:
    assert torch.equal(visible(5, 5, window=1), torch.eye(5).bool())


def test_nobody_sees_a_negative_position() -> None:
    keys = torch.tensor([[-2, -1, 0, 1], [0, 1, 2, 3]])
    assert visible_at(keys[:, -1:], keys).int().tolist() == [[[0, 0, 1, 1]], [[1, 1, 1, 1]]]


def test_left_padding_counts_the_zeros() -> None:
    assert left_padding(torch.tensor([[1, 1, 1]])) is None
    assert left_padding(torch.tensor([[0, 1, 1], [1, 1, 1]])).tolist() == [[1], [0]]


@pytest.mark.parametrize("mask", [[[1, 0, 1]], [[1, 1, 0]], [[0, 0, 0]]])
def test_padding_anywhere_but_left_is_refused(mask: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="0s, then 1s, in each row"):
        left_padding(torch.tensor(mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 2), "1 <= T <= S, got T=3, S=2"),
        ((1, 1, 0), "window must be at least 1 .*, got 0"),
        ((1, 1, 2, -1), "sinks must be 0 or more, got -1"),
        ((1, 1, None, 2), "sinks need a window: .*, got 2"),
    ],
)
def test_numbers_that_make_no_mask_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visible(*arguments)
