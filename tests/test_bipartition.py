"""bipartition: patches cut in two by the second eigenvector of their similarity."""

import io
import itertools
import math
import os
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

import sma_fast
from sma_fast.testing import (
    CASES,
    LAYOUTS,
    NATIVE_DTYPES,
    assert_compiles_once,
    assert_reproducible,
    assert_same,
    call,
    cut_inputs,
    guarded,
    padding_mask,
)

OP = "bipartition"
PICTURES = (
    Path(os.environ.get("SMA_FAST_DATA") or Path(__file__).parents[2] / "shared/data")
    / "vision/cifar10_jpeg_12k.zip"
)
X, Y, O = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]  # noqa: E741
D = [1.0, 1.0]  # between the two

# embeddings, options, labels, eigenvalue. Two groups at right angles, of a and b patches: a step of
# the random walk along W stays in them with 2 a / (2 a + b) and 2 b / (a + 2 b); the sum less 1 is
# the walk's second eigenvalue, of 2 and 1 patches 4 / 5 + 2 / 4 - 1, and the cut's 1 less that.
LITERALS = {
    "two groups": ([X, X, Y], {}, [0, 0, 1], 0.7),
    "two groups, as many": ([X, Y], {}, [1, 0], 2 / 3),
    "the first group is fewer": ([Y, X, X, X], {}, [1, 0, 0, 0], None),
    "opposite": ([X, [-1.0, 0.0]], {}, [1, 0], 0.0),
    "lengths do not matter": ([[5.0, 0.0], [0.1, 0.0], Y], {}, [0, 0, 1], 0.7),
    "pca, two groups": ([X, X, Y], {"method": "pca"}, [0, 0, 1], 4 / 9),
    "pca, opposite": ([X, [-1.0, 0.0]], {"method": "pca"}, [1, 0], 1.0),
}
NOTHING = {
    "one patch": ([X], {}),
    "equal patches": ([X, X, X], {}),
    "zero patches, pca": ([O, O], {"method": "pca"}),
}


def choice_for(backend, *, fast, interpreted, emulated=None):
    """Returns the choice for how this backend runs here: on a CPU, Triton and CUDA take long."""
    if backend.backend in ("cpu", "reference") or str(backend.device) != "cpu":
        return fast
    return interpreted if backend.backend == "triton" or emulated is None else emulated


def cut(backend, rows, **options):
    return call(OP, backend.inputs({"embeddings": torch.tensor([rows])} | options))


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    rows, options, labels, eigenvalue = LITERALS[name]
    found = cut(backend, rows, **options)
    assert found.labels.tolist() == [[bool(x) for x in labels]]
    assert bool(found.converged.all())
    ids = [i for i, label in enumerate(labels) if label]
    assert found.ids.tolist() == [ids + [-1] * (len(labels) - len(ids))]
    assert float(found.vector.norm()) == pytest.approx(1, abs=1e-5)
    assert int(found.vector.abs().argmax()) in ids
    if eigenvalue is not None:
        assert float(found.eigenvalue) == pytest.approx(eigenvalue, abs=1e-5)


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_cut(backend, name):
    rows, options = NOTHING[name]
    found = cut(backend, rows, iterations=8, **options)
    assert not bool(found.converged.any() or found.labels.any() or found.vector.any())
    assert bool((found.ids == -1).all())
    assert float(found.eigenvalue) == (0.0 if options else 1.0)


def test_ties_go_to_the_first(backend):
    """Two patches as unlike each other as can be: both entries are as large."""
    for rows in ([X, Y], [Y, X]):
        assert cut(backend, rows).labels.tolist() == [[True, False]]


def test_the_vector_solves_the_problem(backend):
    x = cut_inputs(tokens=30)["embeddings"]
    found = call(OP, backend.inputs({"embeddings": x}))
    unit = torch.nn.functional.normalize(x.double(), dim=2)
    weight = (1 + unit @ unit.transpose(1, 2)) / 2
    degree = weight.sum(2)
    v = found.vector.double().cpu()
    left = degree * v - (weight @ v[:, :, None])[:, :, 0]
    right = found.eigenvalue.double().cpu()[:, None] * degree * v
    torch.testing.assert_close(left, right, rtol=0, atol=2e-3)


def too_long(tokens: int):
    return pytest.param(tokens, marks=pytest.mark.not_interpreted)


def agreement(found, expected) -> float:
    """Returns the share of patches with the reference's label, where `found` has converged."""
    same = (found.labels == expected.labels)[found.converged]
    return float(same.float().mean()) if same.numel() else 1.0  # then nothing was claimed


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", NATIVE_DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases_of_half_types(backend, case, dtype):
    test_cases(backend, case, dtype)


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases(backend, case, dtype=torch.float32):
    inputs = backend.inputs(case.build(dtype))
    found, expected = call(OP, inputs), backend.expected(OP, inputs)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert agreement(found, expected) >= 0.999
    assert not bool((found.converged & ~expected.converged).any())
    here = found.converged
    torch.testing.assert_close(found.vector[here], expected.vector[here], rtol=0, atol=2e-3)
    torch.testing.assert_close(found.eigenvalue[here], expected.eigenvalue[here], rtol=0, atol=1e-5)
    # what the labels say, the ids and the vector say too, converged or not
    assert_same(found.labels, found.vector > 1e-4 * found.vector.abs().amax(1, keepdim=True))
    for labels, ids in zip(found.labels.cpu(), found.ids.tolist(), strict=True):
        chosen = labels.nonzero()[:, 0].tolist()
        assert ids == chosen + [-1] * (len(ids) - len(chosen))
    if "key_padding_mask" in inputs:
        assert not bool(found.vector[inputs["key_padding_mask"]].any())
    if case.name.startswith("clustered") or "patches" in case.name and "one" not in case.name:
        assert bool(found.converged.all())


@pytest.mark.one_instruction_set
@pytest.mark.not_interpreted
@pytest.mark.parametrize("noise", (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6))
def test_nearly_degenerate(backend, noise):
    """Three equal groups at right angles, whose second and third vector only noise tells apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(4)[torch.arange(120) // 40].repeat(8, 1, 1)
    x[..., 3] = 1.0
    x += noise * torch.randn(x.shape, generator=generator)
    inputs = backend.inputs({"embeddings": x})
    found, expected = call(OP, inputs), backend.expected(OP, inputs)
    assert agreement(found, expected) >= 0.999
    assert noise < 1e-2 or bool(found.converged.all())
    assert noise > 1e-6 or not bool(found.converged.any())


@pytest.mark.parametrize("iterations", (1, 2, 3, 20))
@pytest.mark.parametrize("method", ("ncut", "pca"))
def test_ties_are_not_known(backend, method, iterations):
    """Two opposite pairs at right angles, in all orders: either pair could be the cut."""
    four = torch.tensor([X, [-1.0, 0.0], Y, [0.0, -1.0]])
    x = torch.stack([four[list(order)] for order in itertools.permutations(range(4))])
    x = x[:: choice_for(backend, fast=1, interpreted=8)]
    options = {"method": method, "iterations": iterations}
    for some in (x, x.repeat(1, 5, 1)):
        found = call(OP, backend.inputs({"embeddings": some} | options))
        assert not bool(found.converged.any())


@pytest.mark.parametrize("method", ("ncut", "pca"))
@pytest.mark.parametrize("tokens, width", ((4, 2), (4, 3), (8, 3), (16, 3)))
def test_rows_of_signs(backend, method, tokens, width):
    """Often several eigenvalues are equal, and products with the matrix are exact."""
    batch = choice_for(backend, fast=400, emulated=30, interpreted=4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (batch, tokens, width), generator=generator) * 2.0 - 1
    inputs = backend.inputs({"embeddings": x, "method": method})
    found, expected = call(OP, inputs), backend.expected(OP, inputs)
    assert not bool((found.converged & ~expected.converged).any())
    assert_same(found.labels[found.converged], expected.labels[found.converged])
    assert float(found.converged.float().mean()) > (0.8 if batch > 10 else 0)


def one_hot_rows(counts, orders):
    rows = torch.eye(len(counts))[torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))]
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [rows[torch.randperm(len(rows), generator=generator)] for _ in range(orders)]
    )


@pytest.mark.parametrize("method", ("ncut", "pca"))
@pytest.mark.parametrize(
    "counts",
    (
        *([2] * 3 + [1] * 3, [3] * 3 + [2] * 4, [7] * 3 + [6] * 13),
        *([4] * 5 + [20] * 4, [4] * 3 + [2] * 40),
    ),
    ids=lambda counts: f"{len(counts)} groups",
)
def test_groups_at_right_angles_of_two_sizes(backend, method, counts):
    """Several eigenvalues are equal: a pair of vectors may find one of them before the others."""
    orders = choice_for(backend, fast=200, emulated=4, interpreted=1)
    inputs = backend.inputs({"embeddings": one_hot_rows(counts, orders)})
    iterations = choice_for(backend, fast=64, interpreted=12)
    found = call(OP, inputs | {"method": method, "iterations": iterations})
    assert not bool(found.converged.any())


def test_what_is_zero_but_for_rounding_is_not_above_it(backend):
    """Two opposite patches, and others at right angles to both: the vector is 0 there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 16, generator=generator)
    y = torch.randn(2, 1, 16, generator=generator)
    y = y - x * (x * y).sum(2, keepdim=True) / (x * x).sum(2, keepdim=True)
    inputs = backend.inputs({"embeddings": torch.cat([x, -x, y.expand(-1, 28, -1)], dim=1)})
    found = call(OP, inputs)
    assert bool(found.converged.all())
    assert found.ids[:, 0].tolist() == [0, 0] and bool((found.ids[:, 1:] == -1).all())
    assert_same(found.labels, backend.expected(OP, inputs).labels)


@pytest.mark.parametrize("tokens", (12, too_long(300)))
def test_padding_may_hold_anything(backend, tokens):
    inputs = cut_inputs(tokens=tokens, padding="scattered")
    plain = call(OP, backend.inputs(inputs))
    inputs["embeddings"][inputs["key_padding_mask"]] = math.nan
    inputs = backend.inputs(inputs)
    assert_same(call(OP, inputs), plain)
    assert_same(backend.expected(OP, inputs).labels, plain.labels)


@pytest.mark.one_instruction_set
@pytest.mark.not_interpreted
@pytest.mark.parametrize("noise", (0.0, 1e-5, 1e-4))
@pytest.mark.parametrize("pairs, rows", ((4, 16), (5, 16), (4, 4)))
def test_what_is_left_of_other_groups_is_not_labelled(backend, pairs, rows, noise):
    """Two opposite groups are cut; pairs of others at right angles to them are 0 in the vector."""
    number = 4 if str(backend.device) == "cpu" and backend.backend == "cuda" else 40  # emulated
    x = torch.zeros(number, 40 + 2 * pairs * rows, 32)
    x[:, :20, 0], x[:, 20:40, 0] = 1, -1
    for j in range(pairs):
        start = 40 + 2 * rows * j
        x[:, start : start + rows, 1 + j] = 1
        x[:, start + rows : start + 2 * rows, 1 + j] = -1
    for b in range(number):
        generator = torch.Generator().manual_seed(b)
        x[b] = x[b, torch.randperm(x.shape[1], generator=generator)]
        x[b] += noise * torch.randn(x[b].shape, generator=generator)
    inputs = backend.inputs({"embeddings": x})
    found, expected = call(OP, inputs), backend.expected(OP, inputs)
    wrong = (found.labels != expected.labels)[found.converged].sum(1)
    # with the largest noise their entries lie about where labels begin, and few cuts can tell
    assert noise == 1e-4 or float(found.converged.float().mean()) > 0.5
    assert int(wrong.sum()) <= max(1, len(wrong) * x.shape[1] // 1000) and not (wrong > 1).any()


@pytest.mark.one_instruction_set
@pytest.mark.not_interpreted
def test_the_sign_of_what_is_nearly_a_mirror_image(backend):
    """The largest entries of both sides differ by about the thousandth that counts as a tie."""
    some = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        half = 0.3 * torch.randn(20, 6, generator=generator)
        half[:, 0] = 1
        other = half * torch.tensor([-1.0, 1, 1, 1, 1, 1])
        change = torch.randn(40, 6, generator=generator)
        some += [torch.cat([half, other]) + t * change for t in torch.linspace(0, 3e-3, 60)]
    inputs = backend.inputs({"embeddings": torch.stack(some)})
    found, expected = call(OP, inputs), backend.expected(OP, inputs)
    assert float(found.converged.float().mean()) > 0.9
    assert_same(found.labels[found.converged], expected.labels[found.converged])


@pytest.mark.parametrize("tokens", (40, too_long(300)))
@pytest.mark.parametrize("factor", (1e37, 1e30, 1e-30, 1e-36))
def test_long_and_short_rows(backend, factor, tokens):
    x = cut_inputs(tokens=tokens, tol=1e-4)["embeddings"]
    plain = call(OP, backend.inputs({"embeddings": x}))
    x[:, ::2] *= factor
    found = call(OP, backend.inputs({"embeddings": x}))
    if backend.backend == "cuda" and factor > 1e36:  # beyond its floats: it must not claim to know
        assert not bool(found.converged.any() or found.labels.any())
        return
    assert bool(found.converged.all())
    assert_same(found.labels, plain.labels)


@pytest.mark.parametrize("tokens", (40, too_long(300)))
def test_rows_shorter_than_a_normal_number_are_zero_rows(backend, tokens):
    x = cut_inputs(tokens=tokens, tol=1e-4)["embeddings"]
    x[:, ::2] = 0
    plain = call(OP, backend.inputs({"embeddings": x}))
    x[:, ::2] = 1e-40
    assert bool((x[:, ::2] != 0).all())
    inputs = backend.inputs({"embeddings": x})
    assert_same(call(OP, inputs), plain)
    assert_same(backend.expected(OP, inputs).labels, plain.labels)


@pytest.mark.one_instruction_set
@pytest.mark.not_interpreted
def test_random_embeddings_of_the_usual_size(backend):
    """Their eigenvalues lie close together: they take many iterations, and are then cut right."""
    number = 1 if str(backend.device) == "cpu" and backend.backend == "cuda" else 4  # emulated
    x = torch.randn(number, 196, 768, generator=torch.Generator().manual_seed(0))
    inputs = backend.inputs({"embeddings": x, "iterations": 600})
    found, expected = call(OP, inputs), backend.expected(OP, inputs)
    assert bool(found.converged.all())
    assert agreement(found, expected) >= 0.999


def test_double_rows_beyond_float():
    x = cut_inputs(torch.float64)["embeddings"]
    plain = sma_fast.bipartition(x)
    for factor in (1e200, 1e-200):
        found = sma_fast.bipartition(x * factor)
        assert_same(found.labels, plain.labels)
        assert bool(found.converged.all())


def pictures(number: int) -> torch.Tensor:
    """Returns real pictures, (B, 3, 32, 32), evenly taken from the test folder."""
    image = pytest.importorskip("PIL.Image")
    with zipfile.ZipFile(PICTURES) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("test/") and n[-4:] == ".jpg")
        names = names[:: len(names) // number][:number]
        arrays = [numpy.asarray(_rgb(image, archive, name)) for name in names]
    x = torch.tensor(numpy.stack(arrays)).float().permute(0, 3, 1, 2)
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def _rgb(image, archive, name):
    return image.open(io.BytesIO(archive.read(name))).convert("RGB")


@pytest.mark.one_instruction_set
@pytest.mark.not_interpreted
@pytest.mark.skipif(not PICTURES.is_file(), reason=f"no pictures in {PICTURES}")
def test_real_pictures(backend):
    """Patches of 4 x 4 pixels, 2 apart, through random features."""
    slow = backend.backend == "reference" or (
        str(backend.device) == "cpu" and backend.backend == "cuda"
    )
    number = 24 if slow else 200
    patches = torch.nn.functional.unfold(pictures(number), 4, stride=2).transpose(1, 2)
    mix = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)) / 4
    for x in (patches, torch.tanh(patches @ mix)):
        inputs = backend.inputs({"embeddings": x.contiguous()})
        found, expected = call(OP, inputs), backend.expected(OP, inputs)
        assert float(found.converged.float().mean()) >= 0.99
        assert agreement(found, expected) >= 0.999


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", (20, too_long(300)))
def test_layouts(backend, layout, tokens):
    inputs = backend.inputs(cut_inputs(tokens=tokens, padding="scattered", tol=1e-4))
    inputs, assert_unchanged = guarded(inputs, layout)
    found, expected = call(OP, inputs), backend.expected(OP, inputs)
    assert bool(found.converged.all())
    assert_same(found.labels, expected.labels)
    torch.testing.assert_close(found.vector, expected.vector, rtol=0, atol=1e-4)
    assert_unchanged()


@pytest.mark.parametrize("tokens", (30, 270))
def test_reproducible(backend, tokens):
    x = backend.inputs(cut_inputs(batch=4, tokens=tokens))["embeddings"]
    assert_reproducible(lambda x: list(sma_fast.bipartition(x)), x)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("tokens", (12, 300))
def test_not_finite(backend, value, tokens):
    inputs = cut_inputs(tokens=tokens)
    inputs["embeddings"][1, 3, 5] = value
    with pytest.raises(ValueError, match="^embeddings: holds NaN or infinity, allowed are finite"):
        call(OP, backend.inputs(inputs))


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("layout", ("packed", "transposed"))
@pytest.mark.parametrize("method", ("ncut", "pca"))
def test_opcheck(backend, method, layout):
    inputs = cut_inputs() | {"padding": padding_mask("left", 3, 12)}
    inputs, _ = guarded(backend.inputs(inputs), layout)
    torch.library.opcheck(
        torch.ops.sma_fast.bipartition.default,
        (inputs["embeddings"], inputs["padding"], method, 20, 1e-3),
    )


def test_compile():
    def cut_and_score(x):
        found = sma_fast.bipartition(x)
        return [*found, sma_fast.informed_scores(x, found)]

    sizes = ((2, 12, 8), (3, 33, 16), (4, 270, 9))
    assert_compiles_once(
        cut_and_score,
        [(cut_inputs(batch=b, tokens=n, width=c)["embeddings"],) for b, n, c in sizes],
    )


EMBEDDINGS = torch.randn(2, 5, 3)
PADDING = torch.zeros(2, 5, dtype=torch.bool)
BAD = {
    "not a tensor": ("embeddings", TypeError, {"embeddings": [[1.0]]}),
    "rank": ("embeddings", ValueError, {"embeddings": EMBEDDINGS[0]}),
    "ints": ("embeddings", TypeError, {"embeddings": EMBEDDINGS.long()}),
    "no patches": ("embeddings", ValueError, {"embeddings": EMBEDDINGS[:, :0]}),
    "no features": ("embeddings", ValueError, {"embeddings": EMBEDDINGS[..., :0]}),
    "padding, shape": ("key_padding_mask", ValueError, {"key_padding_mask": PADDING[:, 1:]}),
    "padding, ints": ("key_padding_mask", TypeError, {"key_padding_mask": PADDING.int()}),
    "method": ("method", ValueError, {"method": "kmeans"}),
    "similarity": ("similarity", ValueError, {"similarity": "euclidean"}),
    "iterations, 0": ("iterations", ValueError, {"iterations": 0}),
    "iterations, float": ("iterations", TypeError, {"iterations": 3.0}),
    "iterations, negative": ("iterations", ValueError, {"iterations": -1}),
    "tol, 0": ("tol", ValueError, {"tol": 0.0}),
    "tol, NaN": ("tol", ValueError, {"tol": math.nan}),
    "tol, text": ("tol", TypeError, {"tol": "small"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        sma_fast.bipartition(**({"embeddings": EMBEDDINGS} | changed))
