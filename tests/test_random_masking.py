"""random_masking: MAE's masking, the visible tokens in raster order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sma_fast
from sma_fast.testing import (
    CASES,
    DTYPES,
    LAYOUTS,
    NATIVE_DTYPES,
    SCORES,
    assert_compiles_once,
    assert_gradients,
    assert_reproducible,
    assert_same,
    call,
    chi_square,
    guarded,
    random_inputs,
)

OP = "random_masking"
OPCHECK = ((torch.float32, "packed"), (torch.bfloat16, "transposed"))
OTHER_DTYPES = (torch.int64, torch.int16, torch.uint8, torch.bool, torch.complex64)
NAN, INF = math.nan, math.inf

# noise of tokens 0, 1, 2, ..., ratio -> visible, mask, ids_restore
LITERALS = {
    "half of 4": ([0.4, 0.1, 0.3, 0.2], 0.5, ([1, 3], [1, 0, 1, 0], [2, 0, 3, 1])),
    "ties keep the lowest index": ([0.5, 0.5, 0.5], 0.5, ([0], [0, 1, 1], [0, 1, 2])),
    "keeps int(2.5) = 2": (
        [0.5, 0.4, 0.3, 0.2, 0.1],
        0.5,
        ([3, 4], [1, 1, 1, 0, 0], [2, 3, 4, 0, 1]),
    ),
    "10 * (1 - .9) is below 1": ([0.0] * 10, 0.9, ([], [1] * 10, list(range(10)))),
    "ratio 0": ([0.3, 0.1], 0.0, ([0, 1], [0, 0], [0, 1])),
    "ratio 1": ([0.3, 0.1], 1.0, ([], [1, 1], [0, 1])),
    "no tokens": ([], 0.5, ([], [], [])),
    "NaN is masked first": ([NAN, 0.9, 0.1], 0.4, ([2], [1, 1, 0], [1, 2, 0])),
    "inf ties with NaN": ([INF, NAN, 0.5, INF], 0.5, ([0, 2], [0, 1, 0, 1], [0, 2, 1, 3])),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    noise, ratio, (visible, mask, restore) = LITERALS[name]
    tokens = torch.arange(len(noise), device=backend.device, dtype=torch.float32)[None]
    noise = torch.tensor([noise], device=backend.device)
    result = sma_fast.random_masking(tokens, ratio, noise=noise)
    assert [x.tolist() for x in result] == [[visible], [mask], [restore]]
    assert [x.dtype for x in result] == [torch.float32, torch.float32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases(backend, case, dtype):
    backend.assert_same_as_oracle(OP, case.build(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_other_dtypes(backend, dtype, layout):
    backend.assert_same_as_oracle(OP, random_inputs(dtype, trailing=(3, 2)), layout)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype, width", ((torch.float32, 511), (torch.bfloat16, 1024)))
def test_large(backend, four_threads, dtype, width):
    # an output of more than 8 MiB may be written past them
    inputs = random_inputs(dtype, batch=2, tokens=3000, trailing=(width,), mask_ratio=0.25)
    backend.assert_same_as_oracle(OP, inputs)


# samples that several blocks of a GPU share, that take two launches, of more tokens than one holds
HALF = torch.bfloat16
MANY_BLOCKS = {
    "one sample": {"batch": 1, "tokens": 196, "trailing": (401,)},
    "few samples": {"dtype": HALF, "batch": 2, "tokens": 300, "trailing": (500,)},
    "narrow rows": {"dtype": HALF, "batch": 2, "tokens": 20_000, "trailing": (8,)},
    "long rows": {"dtype": HALF, "batch": 2, "tokens": 70_001, "mask_ratio": 0.75},
    "long rows, no ties": {"batch": 1, "tokens": 70_001, "noise": "normal"},
    "long rows, all masked": {"batch": 1, "tokens": 70_001, "mask_ratio": 1.0},
}


@pytest.mark.parametrize(
    "name",
    [
        # those without ties are as long
        pytest.param(name, marks=pytest.mark.not_interpreted if name == "long rows" else ())
        for name in MANY_BLOCKS
    ],
)
def test_many_blocks(backend, name):
    backend.assert_same_as_oracle(OP, random_inputs(**MANY_BLOCKS[name]))


@pytest.mark.not_interpreted
@given(
    batch=st.integers(0, 4),
    tokens=st.sampled_from((0, 1, 2, 7, 33, 65)),
    trailing=st.lists(st.integers(0, 9), max_size=3),
    mask_ratio=st.floats(0, 1),
    noise=st.sampled_from(("eighths", "drawn", *SCORES)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_input(backend, layout, dtype, **options):
    backend.assert_same_as_oracle(OP, random_inputs(dtype, **options), layout)


def mae_random_masking(x, mask_ratio, noise):
    """MAE's own (models_mae.py, arXiv 2111.06377), but for the noise, which is given."""
    N, L, D = x.shape
    len_keep = int(L * (1 - mask_ratio))
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    ids_keep = ids_shuffle[:, :len_keep]
    x_masked = torch.gather(x, dim=1, index=ids_keep.unsqueeze(-1).repeat(1, 1, D))
    mask = torch.ones([N, L], device=x.device)
    mask[:, :len_keep] = 0
    mask = torch.gather(mask, dim=1, index=ids_restore)
    return x_masked, mask, ids_restore


@pytest.mark.parametrize("ratio", (0.0, 0.5, 0.75, 0.9, 1.0))
@pytest.mark.parametrize("tokens", (1, 10, 196))
def test_masks_what_mae_masks(backend, tokens, ratio):
    x = torch.randn(4, tokens, 6).to(backend.device)
    noise = torch.rand(4, tokens).to(backend.device)
    visible, mask, ids_restore = sma_fast.random_masking(x, ratio, noise=noise)
    theirs, their_mask, their_restore = mae_random_masking(x, ratio, noise)
    assert torch.equal(mask, their_mask)
    # the order of the visible tokens differs; put back, both give the same
    filler = torch.zeros(4, tokens - visible.shape[1], 6, device=x.device)
    ours = sma_fast.restore_tokens(visible, ids_restore, filler)
    index = their_restore[:, :, None].expand(-1, -1, 6)
    assert torch.equal(ours, torch.cat([theirs, filler], dim=1).gather(1, index))


@pytest.mark.needs("restore_tokens_backward", "restore_tokens")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_gradients(backend, case, dtype):
    inputs = backend.inputs(case.build(dtype))

    def visible(tokens):
        return [call(OP, inputs | {"tokens": tokens})[0]]

    assert_gradients(visible, [inputs["tokens"]])


@pytest.mark.needs("restore_tokens_backward", "restore_tokens")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trailing", ((), (5,), (3, 2)), ids=str)
def test_gradients_of_any_layout(backend, trailing, layout):
    inputs = backend.inputs(random_inputs(trailing=trailing))
    function = sma_fast.random_masking
    assert_gradients(
        lambda x: [function(x, 0.4, noise=inputs["noise"])[0]], [inputs["tokens"]], layout
    )


@pytest.mark.parametrize("trailing", ((), (2,), (2, 3)), ids=str)
def test_gradcheck(trailing):
    inputs = random_inputs(torch.float64, batch=2, tokens=5, trailing=trailing)

    def visible(tokens):
        return sma_fast.random_masking(tokens, 0.4, noise=inputs["noise"])[0]

    tokens = inputs["tokens"].requires_grad_()
    assert torch.autograd.gradcheck(visible, (tokens,))
    assert torch.autograd.gradgradcheck(visible, (tokens,))


def test_mask_carries_no_gradient(backend):
    inputs = backend.inputs(random_inputs())
    inputs["tokens"].requires_grad_()
    visible, mask, ids_restore = call(OP, inputs)
    assert visible.requires_grad
    assert not mask.requires_grad and not ids_restore.requires_grad


@pytest.mark.not_interpreted
@pytest.mark.parametrize("batch, tokens", ((5, 700), (1, 20_001)))
def test_reproducible(backend, batch, tokens):
    # wide enough for two threads
    inputs = backend.inputs(random_inputs(batch=batch, tokens=tokens, trailing=(40,)))
    assert_reproducible(
        lambda x, noise: sma_fast.random_masking(x, 0.75, noise=noise),
        inputs["tokens"],
        inputs["noise"],
    )


def test_seeds(backend):
    inputs = backend.inputs(random_inputs(tokens=100, noise="drawn"))
    assert_same(call(OP, inputs), call(OP, inputs))
    assert not torch.equal(call(OP, inputs)[1], call(OP, inputs | {"seed": 1})[1])
    torch.manual_seed(7)
    del inputs["seed"]
    first, second = call(OP, inputs), call(OP, inputs)
    assert_same(first, call(OP, inputs | {"seed": 7}))
    assert not torch.equal(first[1], second[1])


def test_uniform():
    generator = torch.Generator().manual_seed(0)
    _, mask, _ = sma_fast.random_masking(torch.zeros(4000, 8), 0.75, generator=generator)
    kept = mask == 0
    assert bool((kept.sum(dim=1) == 2).all())
    assert chi_square(kept.sum(dim=0), 4000) < 24.3  # 7 degrees of freedom, p = .001
    pairs = (kept[:, :, None] & kept[:, None, :]).sum(dim=0)
    pairs = pairs[torch.ones(8, 8).triu(1).bool()]
    assert chi_square(pairs, 4000) < 55.5  # 27 degrees of freedom, p = .001


@pytest.mark.one_instruction_set
@pytest.mark.needs("restore_tokens")
@pytest.mark.parametrize("dtype, layout", OPCHECK)
@pytest.mark.parametrize("trailing", ((), (5,), (3, 2)), ids=str)
def test_opcheck(backend, trailing, dtype, layout):
    inputs, _ = guarded(backend.inputs(random_inputs(dtype, trailing=trailing)), layout)
    torch.library.opcheck(
        torch.ops.sma_fast.random_masking.default,
        (inputs["tokens"].requires_grad_(), inputs["noise"], 0.4),
    )


def test_compile():
    def mask(tokens):
        return sma_fast.random_masking(tokens, 0.75)

    sizes = ((4, 12), (6, 33), (7, 100))
    inputs = [random_inputs(batch=b, tokens=n)["tokens"].requires_grad_() for b, n in sizes]
    assert_compiles_once(mask, [(x,) for x in inputs])


def test_autocast_keeps_the_dtype(backend):
    inputs = backend.inputs(random_inputs())
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        inside = call(OP, inputs)
    assert_same(inside, call(OP, inputs))


def arguments(**changed):
    return {"tokens": torch.zeros(2, 5, 3), "mask_ratio": 0.4} | changed


BAD = {
    "tokens, not a tensor": ("tokens", TypeError, {"tokens": [[1.0]]}),
    "tokens, rank": ("tokens", ValueError, {"tokens": torch.zeros(5)}),
    "ratio, below 0": ("mask_ratio", ValueError, {"mask_ratio": -0.1}),
    "ratio, above 1": ("mask_ratio", ValueError, {"mask_ratio": 1.1}),
    "ratio, NaN": ("mask_ratio", ValueError, {"mask_ratio": NAN}),
    "ratio, bool": ("mask_ratio", TypeError, {"mask_ratio": False}),
    "ratio, None": ("mask_ratio", TypeError, {"mask_ratio": None}),
    "ratio, tensor": ("mask_ratio", TypeError, {"mask_ratio": torch.tensor(0.5)}),
    "noise, not a tensor": ("noise", TypeError, {"noise": [[0.5]]}),
    "noise, double": ("noise", TypeError, {"noise": torch.zeros(2, 5).double()}),
    "noise, rank": ("noise", ValueError, {"noise": torch.zeros(2, 5, 1)}),
    "noise, batch": ("noise", ValueError, {"noise": torch.zeros(1, 5)}),
    "noise, tokens": ("noise", ValueError, {"noise": torch.zeros(2, 4)}),
    "noise, device": ("noise", ValueError, {"noise": torch.zeros(2, 5, device="meta")}),
    "tokens, mkldnn": ("tokens", TypeError, {"tokens": torch.zeros(2, 5, 3).to_mkldnn()}),
    "generator, noise given": (
        "generator",
        TypeError,
        {"noise": torch.zeros(2, 5), "generator": 3},
    ),
    "generator": ("generator", TypeError, {"generator": 3}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        sma_fast.random_masking(**arguments(**changed))
