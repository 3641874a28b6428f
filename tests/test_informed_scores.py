"""informed_scores: how like each patch is to the mean of a cluster, and which one is the object."""

import math

import pytest
import torch

import sma_fast
from sma_fast.models.vit_layers import patchify
from sma_fast.testing import (
    CASES,
    LAYOUTS,
    NATIVE_DTYPES,
    assert_compiles_once,
    assert_reproducible,
    assert_same,
    call,
    guarded,
    informed_inputs,
    padding_mask,
)

OP = "informed_scores"
X, Y = [1.0, 0.0], [0.0, 1.0]


def cut_of(labels: torch.Tensor) -> sma_fast.Bipartition:
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
    "cancelled out": ([X, [-3.0, 0.0], Y], [1, 1, 0], {}, [0, 0, 0]),
    "a zero patch": ([X, [0.0, 0.0]], [1, 0], {}, [1, 0]),
    "padding": (
        [X, Y, Y],
        [1, 1, 0],
        {"key_padding_mask": torch.tensor([[False, True, False]])},
        [1, 0, 0],
    ),
}


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


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    rows, labels, options, answer = LITERALS[name]
    given = {"embeddings": torch.tensor([rows]), "labels": torch.tensor([labels]) > 0}
    scores = call(OP, backend.inputs(given | options))
    torch.testing.assert_close(scores.cpu(), torch.tensor([answer], dtype=torch.float32))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", NATIVE_DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases_of_half_types(backend, case, dtype):
    test_cases(backend, case, dtype)


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases(backend, case, dtype=torch.float32):
    inputs = backend.inputs(case.build(dtype))
    found, expected = call(OP, inputs), backend.expected(OP, inputs)
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    if "key_padding_mask" in inputs:
        assert not bool(found[inputs["key_padding_mask"]].any())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    inputs, assert_unchanged = guarded(
        backend.inputs(informed_inputs(tokens=20, padding="scattered")), layout
    )
    torch.testing.assert_close(call(OP, inputs), backend.expected(OP, inputs), rtol=0, atol=1e-6)
    assert_unchanged()


def test_reproducible(backend):
    inputs = backend.inputs(informed_inputs(batch=4, tokens=101, width=24))
    assert_reproducible(
        lambda x, labels: [sma_fast.informed_scores(x, cut_of(labels), cluster="smaller")],
        *inputs.values(),
    )


@pytest.mark.one_instruction_set
def test_shares_among_threads(backend, four_threads):
    """Larger than what runs on one thread."""
    inputs = backend.inputs(informed_inputs(batch=16, tokens=40, width=64))
    torch.testing.assert_close(call(OP, inputs), backend.expected(OP, inputs), rtol=0, atol=1e-6)


def test_double(backend):
    inputs = backend.inputs(informed_inputs(torch.float64))
    if not backend.refuses(OP, inputs):
        torch.testing.assert_close(
            call(OP, inputs),
            call(OP, inputs | {"embeddings": inputs["embeddings"].float()}),
            rtol=0,
            atol=1e-6,
        )


@pytest.mark.parametrize("which", (slice(None), slice(None, None, 2)))
@pytest.mark.parametrize("factor", (1e30, 1e-23, 1e-30, 1e-36))
def test_long_and_short_rows(backend, factor, which):
    inputs = informed_inputs(tokens=40, width=40)
    plain = call(OP, backend.inputs(inputs))
    inputs["embeddings"][:, which] *= factor
    found = call(OP, backend.inputs(inputs))
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-6)


def test_double_rows_beyond_float():
    inputs = informed_inputs(torch.float64)
    plain = call(OP, inputs)
    for factor in (1e200, 1e-200):
        found = call(OP, inputs | {"embeddings": inputs["embeddings"] * factor})
        torch.testing.assert_close(found, plain)


def test_padding_may_hold_anything(backend):
    inputs = informed_inputs(padding="scattered")
    plain = call(OP, backend.inputs(inputs))
    inputs["embeddings"][inputs["key_padding_mask"]] = math.nan
    assert_same(call(OP, backend.inputs(inputs)), plain)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_not_finite(backend, value):
    inputs = informed_inputs()
    inputs["embeddings"][1, 3, 5] = value
    with pytest.raises(ValueError, match="^embeddings: holds NaN or infinity, allowed are finite"):
        call(OP, backend.inputs(inputs))


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("member", (False, True))
def test_not_finite_where_nobody_looks(backend, monkeypatch, value, member):
    """As on a GPU: what is not finite scores 0, and a cluster that holds it is nobody's mean."""
    monkeypatch.setattr("sma_fast.reference.check_finite", lambda *_: None)
    inputs = informed_inputs(batch=2)
    plain = call(OP, backend.inputs(inputs))
    row = inputs["labels"][1].int().argmax() if member else inputs["labels"][1].int().argmin()
    inputs["embeddings"][1, row, 5] = value
    plain[1, slice(None) if member else row] = 0
    inputs = backend.inputs(inputs)
    if backend.backend == "cpu":  # the kernel itself looks
        with pytest.raises(ValueError, match="^embeddings: holds NaN or infinity"):
            call(OP, inputs)
    else:
        torch.testing.assert_close(call(OP, inputs), plain, rtol=0, atol=1e-6)


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("layout", ("packed", "transposed"))
def test_opcheck(backend, layout):
    inputs = informed_inputs() | {"padding": padding_mask("left", 3, 12)}
    inputs, _ = guarded(backend.inputs(inputs), layout)
    torch.library.opcheck(
        torch.ops.sma_fast.informed_scores.default,
        (inputs["embeddings"], inputs["labels"], inputs["padding"], "smaller"),
    )


def test_compile():
    sizes = ((2, 12, 8), (3, 33, 16), (4, 70, 9))
    assert_compiles_once(
        lambda x, labels: sma_fast.informed_scores(x, cut_of(labels), cluster="larger"),
        [tuple(informed_inputs(batch=b, tokens=n, width=c).values()) for b, n, c in sizes],
    )


def test_no_gradient():
    inputs = informed_inputs()
    inputs["embeddings"].requires_grad_()
    assert not call(OP, inputs).requires_grad


def test_autocast_changes_nothing():
    inputs = informed_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(OP, inputs)
    assert_same(found, call(OP, inputs))


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


def test_not_a_bipartition(nothing_runs):
    with pytest.raises(TypeError, match="^bipartition: got NoneType, allowed is"):
        sma_fast.informed_scores(EMBEDDINGS, None)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    given = {"embeddings": EMBEDDINGS, "labels": LABELS} | changed
    cut = cut_of(given.pop("labels"))
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        sma_fast.informed_scores(bipartition=cut, **given)
