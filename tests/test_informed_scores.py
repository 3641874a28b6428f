"""informed_scores: how like each patch is to the mean of a cluster, and which one is the object."""

import pytest
import torch

import sma_fast
from sma_fast.testing import cut_inputs

X, Y = [1.0, 0.0], [0.0, 1.0]


def cut_of(labels) -> sma_fast.Bipartition:
    labels = torch.tensor([labels], dtype=torch.bool)
    return sma_fast.Bipartition(None, labels, None, None, None)


# embeddings, labels, options, answer
LITERALS = {
    "one cluster is one patch": ([X, Y], [1, 0], {}, [1, 0]),
    "background": ([X, Y], [1, 0], {"cluster": "background"}, [0, 1]),
    "smaller": ([X, Y, Y], [0, 1, 1], {"cluster": "smaller"}, [1, 0, 0]),
    "larger": ([X, Y, Y], [1, 0, 0], {"cluster": "larger"}, [0, 1, 1]),
    "as many": ([X, Y], [0, 1], {"cluster": "smaller"}, [0, 1]),
    "lengths do not matter": ([[9.0, 0.0], [0.0, 0.1]], [1, 1], {}, [0.5**0.5, 0.5**0.5]),
    "opposite": ([X, [-2.0, 0.0]], [1, 0], {}, [1, -1]),
    "an empty cluster": ([X, Y], [0, 0], {}, [0, 0]),
    "a zero patch": ([X, [0.0, 0.0]], [1, 0], {}, [1, 0]),
    "padding": (
        [X, Y, Y],
        [1, 1, 0],
        {"key_padding_mask": torch.tensor([[False, True, False]])},
        [1, 0, 0],
    ),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literal(name):
    rows, labels, options, answer = LITERALS[name]
    scores = sma_fast.informed_scores(torch.tensor([rows]), cut_of(labels), **options)
    torch.testing.assert_close(scores, torch.tensor([answer], dtype=torch.float32))


def test_the_object_of_pictures_with_a_known_one():
    """A disc of another colour than the noisy rest, which takes up to two fifths of the picture."""
    generator = torch.Generator().manual_seed(0)
    size, batch = 14, 50
    place = torch.arange(size).float()
    centre = 3 + 8 * torch.rand(batch, 2, generator=generator)
    radius = 2 + 3 * torch.rand(batch, generator=generator)
    away = (place[None, :, None] - centre[:, :1, None]) ** 2
    away = away + (place[None, None, :] - centre[:, 1:, None]) ** 2
    disc = (away < radius[:, None, None] ** 2).flatten(1)  # (B, N)
    colours = torch.randn(batch, 2, 24, generator=generator)
    x = torch.where(disc[:, :, None], colours[:, :1], colours[:, 1:])
    x = x + 0.3 * torch.randn(x.shape, generator=generator)
    cut = sma_fast.bipartition(x)
    assert float((cut.labels == disc).float().mean()) > 0.97
    scores = sma_fast.informed_scores(x, cut)
    masked = sma_fast.select_tokens(scores, num_masked=disc.sum(1)).mask
    assert float((masked & disc).sum() / disc.sum()) > 0.97


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_types(dtype):
    x = cut_inputs()["embeddings"].to(dtype)
    cut = sma_fast.bipartition(x)
    scores = sma_fast.informed_scores(x, cut)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, sma_fast.informed_scores(x.float(), cut))


@pytest.mark.parametrize(
    "factor, dtype",
    [(1e30, torch.float32), (1e-30, torch.float32), (1e-23, torch.float32), (1e200, torch.float64)],
)
def test_long_and_short_rows(factor, dtype):
    x = cut_inputs()["embeddings"].to(dtype)
    cut = sma_fast.bipartition(x)
    torch.testing.assert_close(
        sma_fast.informed_scores(x * factor, cut), sma_fast.informed_scores(x, cut)
    )


def test_padding_may_hold_anything():
    inputs = cut_inputs(padding="scattered")
    x, padding = inputs["embeddings"], inputs["key_padding_mask"]
    cut = sma_fast.bipartition(x, key_padding_mask=padding)
    plain = sma_fast.informed_scores(x, cut, key_padding_mask=padding)
    x[padding] = torch.nan
    assert torch.equal(sma_fast.informed_scores(x, cut, key_padding_mask=padding), plain)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_not_finite(value):
    x = cut_inputs()["embeddings"]
    cut = sma_fast.bipartition(x)
    x[1, 3, 5] = value
    with pytest.raises(ValueError, match="^embeddings: holds NaN or infinity, allowed are finite"):
        sma_fast.informed_scores(x, cut)


def test_no_gradient():
    x = cut_inputs()["embeddings"].requires_grad_()
    assert not sma_fast.informed_scores(x, sma_fast.bipartition(x)).requires_grad


EMBEDDINGS = torch.randn(2, 5, 3)
LABELS = torch.zeros(2, 5, dtype=torch.bool)
BAD = {
    "no features": ("embeddings", ValueError, {"embeddings": EMBEDDINGS[..., :0]}),
    "rank": ("embeddings", ValueError, {"embeddings": EMBEDDINGS[0]}),
    "labels, shape": ("bipartition.labels", ValueError, {"labels": LABELS[:, 1:]}),
    "labels, ints": ("bipartition.labels", TypeError, {"labels": LABELS.int()}),
    "cluster": ("cluster", ValueError, {"cluster": "foreground"}),
    "padding": ("key_padding_mask", ValueError, {"key_padding_mask": LABELS[:1]}),
}


def test_not_a_bipartition():
    with pytest.raises(TypeError, match="^bipartition: got NoneType, allowed is"):
        sma_fast.informed_scores(EMBEDDINGS, None)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    argument, error, changed = BAD[name]
    given = {"embeddings": EMBEDDINGS, "labels": LABELS} | changed
    cut = sma_fast.Bipartition(None, given.pop("labels"), None, None, None)
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        sma_fast.informed_scores(bipartition=cut, **given)
