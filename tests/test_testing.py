"""The comparisons of `sma_fast.testing` refuse what is wrong and nothing else."""

import contextlib

import pytest
import torch

import sma_fast
from sma_fast.testing import (
    SCORE_TOLERANCE,
    assert_consistent,
    assert_mask_up_to_near_ties,
    assert_scores_close,
    score_bound,
)


def verdict(agrees):
    return contextlib.nullcontext() if agrees else pytest.raises(AssertionError)


@pytest.mark.parametrize(
    "mask, agrees",
    (
        ([1, 0, 1, 0], True),
        ([1, 1, 0, 0], True),
        ([1, 1, 1, 0], False),  # another number
        ([0, 1, 1, 0], False),
        ([1, 0, 0, 1], False),
    ),
)
def test_near_ties_may_fall_either_way_and_nothing_else(mask, agrees):
    scores = torch.tensor([[0.5, 0.3, 0.3 + 1e-6, 0.1]])
    expected = torch.tensor([[True, False, True, False]])
    with verdict(agrees):
        assert_mask_up_to_near_ties(
            torch.tensor([mask]).bool(), expected, scores, score_bound(scores)
        )


@pytest.mark.parametrize("scores, agrees", (([2.0, 1.0, 1.0], True), ([2.0, 1.1, 1.0], False)))
def test_a_bound_of_0_is_for_equal_scores(scores, agrees):
    expected, actual = torch.tensor([[[1, 1, 0]], [[1, 0, 1]]]).bool()
    with verdict(agrees):
        assert_mask_up_to_near_ties(actual, expected, torch.tensor([scores]), 0.0)


@pytest.mark.parametrize("share, agrees", ((0.9, True), (1.1, False), (float("nan"), False)))
def test_scores_are_held_to_their_rows_largest(share, agrees):
    expected = torch.tensor([[1.0, 0.0], [100.0, 50.0]])
    actual = expected + torch.tensor([[0.0, share * SCORE_TOLERANCE], [0.0, 0.0]])
    with verdict(agrees):
        assert_scores_close(actual, expected)


@pytest.mark.parametrize("name", sma_fast.TokenSelection._fields)
def test_a_selection_follows_from_its_mask(name):
    scores, padding = (
        torch.tensor([[3.0, 1.0, 2.0, 0.0]]),
        torch.tensor([[False, False, False, True]]),
    )
    selection = sma_fast.select_tokens(scores, num_masked=1, key_padding_mask=padding)
    assert_consistent(selection, padding)
    changed = getattr(selection, name).clone()
    changed[..., 0] = 0 if name == "mask" else 7
    with pytest.raises(AssertionError):
        assert_consistent(selection._replace(**{name: changed}), padding)
