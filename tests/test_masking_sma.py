"""SMA's masking policy: draws, counts, annealing, tokens that attend to each other."""

import dataclasses
import math

import pytest
import torch
from model_inputs import ENCODERS, build, lengths, rng, sample

from sma_fast.masking.sma import SMAMasking, given_selection


@pytest.mark.parametrize("mask", ["guided", "random"])
@pytest.mark.parametrize("training", [True, False])
def test_draws_follow_the_seed(mask: str, training: bool) -> None:
    model = build(masking=SMAMasking(mask_ratio=0.4, num_queries=2, mask=mask)).train(training)
    inputs = sample("discrete", batch=16)
    masks = [model(inputs, generator=rng(seed)).mask for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    torch.manual_seed(3)
    first = model(inputs).mask
    torch.manual_seed(3)
    assert torch.equal(first, model(inputs).mask)


def test_random_masks_are_uniform() -> None:
    masking = SMAMasking(mask_ratio=0.25, mask="random")
    drawn = masking.random(torch.empty(4000, 12), generator=rng()).mask.float()
    assert drawn.sum(dim=1).unique().tolist() == [3]
    deviation = math.sqrt(0.25 * 0.75 / 4000)
    assert (drawn.mean(dim=0) - 0.25).abs().max() < 5 * deviation


@pytest.mark.parametrize(
    ("arguments", "tokens", "queries", "expected"),
    [
        ({"mask_ratio": 0.15, "num_per_query": 4}, 1024, 256, 38),
        ({"mask_ratio": 0.3, "num_per_query": 3}, 512, 512, 51),
        ({"mask_ratio": 0.15, "num_per_query": 4}, 8, 256, 1),  # rounds to 0
        ({"mask_ratio": 0.9, "num_per_query": 1}, 100, 90, 90),
        ({"mask_ratio": 0.15, "num_per_query": 4}, 0, 0, 0),
        ({"mask_ratio": 0.15, "num_queries": 5}, 1024, 256, 5),
    ],
)
def test_count_queries(arguments: dict, tokens: int, queries: int, expected: int) -> None:
    assert SMAMasking(**arguments).count_queries(tokens, queries) == expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"mask_ratio": 0.9, "num_per_query": 1}, "num_per_query"),
        ({"num_queries": 13}, "num_queries"),
    ],
)
def test_more_queries_than_there_are(arguments: dict, name: str) -> None:
    masking = SMAMasking(**arguments)
    with pytest.raises(ValueError, match=rf"^{name}: .* of 12 queries, allowed is"):
        masking.count_queries(100, 12)
    with pytest.raises(ValueError, match=rf"^{name}: .* of 12 queries, allowed is"):
        masking.guided(torch.zeros(1, 2, 12, 4), torch.zeros(3, 2, 100, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"mask_ratio": 1.0}, ValueError, "mask_ratio"),
        ({"mask_ratio": "half"}, TypeError, "mask_ratio"),
        ({"num_per_query": 0.5}, ValueError, "num_per_query"),
        ({"num_per_query": True}, TypeError, "num_per_query"),
        ({"num_queries": 0}, ValueError, "num_queries"),
        ({"num_queries": True}, TypeError, "num_queries"),
        ({"num_queries": 2.0}, TypeError, "num_queries"),
        ({"head_reduce": "none"}, ValueError, "head_reduce"),
        ({"mask": "attention"}, ValueError, "mask"),
    ],
)
def test_wrong_masking(arguments: dict, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}: .*allowed is"):
        SMAMasking(**arguments)


def test_given_selection() -> None:
    mask = torch.tensor([[True, False, True, False], [True, True, False, True]])
    padding = torch.tensor([[False, False, False, True], [False, True, False, False]])
    selection = given_selection(mask, padding)
    assert selection.mask.tolist() == [[True, False, True, False], [True, False, False, True]]
    assert selection.ids_visible.tolist() == [[1, -1, -1, -1], [2, -1, -1, -1]]
    assert selection.ids_masked.tolist() == [[0, 2, -1, -1], [0, 3, -1, -1]]


# Tokens that attend to each other


def test_self_attention_draws_from_each_rows_own_tokens() -> None:
    masking = SMAMasking(mask_ratio=0.4, num_per_query=2)
    padding = lengths(20, 13, 7, 2, 0)[:, torch.randperm(20, generator=rng())] == 0
    drawn = masking.draw_tokens(torch.empty(5, 20, 1), padding, rng())
    assert drawn.shape == (5, 4)
    for row, number in zip(drawn, (4, 3, 1, 1, 0), strict=True):  # round(n .4 / 2), at least 1
        assert (row >= 0).sum() == number
    assert not padding.gather(1, drawn.clamp(min=0))[drawn >= 0].any()
    assert (masking.draw_tokens(torch.empty(3, 20, 1)) >= 0).all()


def test_mask_self_masks_the_drawn_tokens_first() -> None:
    masking = SMAMasking(mask_ratio=0.4, num_per_query=2, mask_self=True)
    scores, drawn = torch.rand(3, 20, generator=rng()), torch.tensor([[1, 5], [3, -1], [-1, -1]])
    plain = dataclasses.replace(masking, mask_self=False).select(scores, drawn=drawn)
    selection = masking.select(scores, drawn=drawn)
    assert selection.mask[0, [1, 5]].all() and selection.mask[1, 3]
    assert torch.equal(selection.mask[2], plain.mask[2])
    assert selection.num_masked.tolist() == [8, 8, 8]


# Annealing


@pytest.mark.parametrize(
    ("anneal_by", "progress", "expected"),
    [
        ("share", 0.0, {"random_fraction": 0.9}),
        ("share", 0.125, {"random_fraction": 0.45}),
        ("share", 0.25, {}),
        ("pool", 0.0, {"pool_ratio": 0.9}),
        ("pool", 0.125, {"pool_ratio": 0.65}),
        ("pool", 1.0, {}),
    ],
)
def test_annealing(anneal_by: str, progress: float, expected: dict) -> None:
    masking = SMAMasking(
        mask_ratio=0.4,
        select_initial_ratio=0.9,
        schedule_length_ratio=0.25,
        anneal_by=anneal_by,
    )
    assert masking.annealing(progress) == pytest.approx(expected)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("anneal_by", ["share", "pool"])
def test_annealed_masks_begin_at_random_and_end_guided(encoder: str, anneal_by: str) -> None:
    masking = SMAMasking(
        mask_ratio=0.25, num_queries=1, select_initial_ratio=1.0, anneal_by=anneal_by
    )
    model = build(**ENCODERS[encoder], masking=masking)
    inputs = sample("discrete", batch=1).expand(2000, -1)
    shares = {}
    for progress in (0.0, 1.0):
        model.progress = progress
        with torch.no_grad():
            shares[progress] = model(inputs, generator=rng()).mask.float().mean(dim=0)
    deviation = math.sqrt(0.25 * 0.75 / 2000)
    assert (shares[0.0] - 0.25).abs().max() < 5 * deviation
    assert (shares[1.0] - 0.25).abs().max() > 20 * deviation


def test_short_rows_draw_all_they_have() -> None:
    masking = SMAMasking(num_queries=6)
    padding = torch.arange(8) >= torch.tensor([[8], [3]])
    drawn = masking.draw_tokens(torch.zeros(2, 8, 1), padding)
    assert (drawn >= 0).sum(1).tolist() == [6, 3] and drawn[1, :3].tolist() == [0, 1, 2]
    assert masking.draw_tokens(torch.zeros(2, 4, 1)).tolist() == [[0, 1, 2, 3]] * 2
