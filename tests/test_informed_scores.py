"""informed_scores: how like each patch is to the mean of a cluster, and which one is the object."""

import pytest
import torch

import sma_fast
from sma_fast.models.vit_layers import patchify
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
    """A disc of another colour on up to three tenths of a noisy picture; patches of pixels."""
    generator = torch.Generator().manual_seed(0)
    batch, size = 100, 56

    def draw(*shape):
        return torch.rand(batch, *shape, generator=generator)

    place = (torch.arange(size) + 0.5) / size
    centre, radius = 0.3 + 0.4 * draw(2, 1), 0.15 + 0.15 * draw(1, 1)
    across, down = ((place - centre[:, i]) ** 2 for i in range(2))
    disc = across[:, None] + down[:, :, None] < radius**2  # (B, H, W)
    colour = draw(3, 1, 1)
    pixels = torch.where(disc[:, None], (colour + 0.5) % 1, colour)
    pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=generator)
    pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    x = patchify(pixels, 4)  # (B, N, C)
    known = patchify(disc[:, None].float(), 4).mean(2) > 0.5  # (B, N)
    scores = sma_fast.informed_scores(x, sma_fast.bipartition(x))
    masked = sma_fast.select_tokens(scores, num_masked=known.sum(1)).mask
    found = (masked & known).sum(1) / known.sum(1)
    assert float(found.mean()) > 0.9
    assert float((found > 0.8).float().mean()) > 0.9  # the rest took the other side


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
