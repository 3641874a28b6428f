"""select_tokens: which tokens are masked, bit for bit under the tie rule."""

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
    PADDINGS,
    SCORES,
    assert_compiles_once,
    assert_consistent,
    assert_reproducible,
    assert_same_selection,
    call,
    chi_square,
    guarded,
    make_scores,
    padding_mask,
    select_inputs,
)

OP = "select_tokens"
NAN, INF = math.nan, math.inf

# one row of scores, options -> ids_visible, ids_masked, ids_restore; lists among the options are
# one row of a tensor
LITERALS = {
    "the highest two": (
        [0.1, 0.5, 0.3, 0.9, 0.2],
        {"num_masked": 2},
        ([0, 2, 4], [1, 3], [0, 3, 1, 4, 2]),
    ),
    "ties go to the lowest index": (
        [1, 1, 1, 1, 1],
        {"num_masked": 2},
        ([2, 3, 4], [0, 1], [3, 4, 0, 1, 2]),
    ),
    "ties at the edge": (
        [0, 2, 1, 2, 1],
        {"num_masked": 3},
        ([0, 4], [1, 2, 3], [0, 2, 3, 4, 1]),
    ),
    "NaN counts as -inf": (
        [NAN, -INF, 0, NAN, -1],
        {"num_masked": 3},
        ([1, 3], [0, 2, 4], [2, 0, 3, 1, 4]),
    ),
    "-inf before NaN of higher index only": (
        [-INF, NAN, -INF, 0],
        {"num_masked": 3},
        ([2], [0, 1, 3], [1, 2, 0, 3]),
    ),
    "+inf first": ([5, INF, 7, 9, 9], {"num_masked": 1}, ([0, 2, 3, 4], [1], [0, 4, 1, 2, 3])),
    "-0.0 ties with 0.0": (
        [-0.0, 0.0, -0.0, 0.0],
        {"num_masked": 2},
        ([2, 3], [0, 1], [2, 3, 0, 1]),
    ),
    "0.0 above a denormal below zero": (
        [-1e-45, -0.0, 1e-45],
        {"num_masked": 2},
        ([0], [1, 2], [0, 1, 2]),
    ),
    "ratio .5 of 5 is 2": (
        [1, 2, 3, 4, 5],
        {"mask_ratio": 0.5},
        ([0, 1, 2], [3, 4], [0, 1, 2, 3, 4]),
    ),
    "ratio .5 of 3 is 2": ([1, 2, 3], {"mask_ratio": 0.5}, ([0], [1, 2], [0, 1, 2])),
    "ratio .5 of 1 is 0": ([1], {"mask_ratio": 0.5}, ([0], [], [0])),
    "ratio .3 of 5 is 2": (
        [5, 1, 4, 1, 1],
        {"mask_ratio": 0.3},
        ([1, 3, 4], [0, 2], [3, 0, 4, 1, 2]),
    ),
    "ratio 0": ([2, 1], {"mask_ratio": 0.0}, ([0, 1], [], [0, 1])),
    "ratio 1": ([2, 1], {"mask_ratio": 1.0}, ([], [0, 1], [0, 1])),
    "no tokens": ([], {"mask_ratio": 0.5}, ([], [], [])),
    "padding left": (  # 4 valid, so 2, in a width of 3
        [9, 8, 1, 2, 3, 0],
        {"mask_ratio": 0.5, "key_padding_mask": [True, True, False, False, False, False]},
        ([2, 5, -1], [3, 4, -1], [-1, -1, 0, 3, 4, 1]),
    ),
    "padding right": (  # 3 valid, so round(1.5) = 2
        [9, 8, 7, 6, 5, 4],
        {"mask_ratio": 0.5, "key_padding_mask": [False, False, False, True, True, True]},
        ([2, -1, -1], [0, 1, -1], [3, 4, 0, -1, -1, -1]),
    ),
    "padding scattered, with inf": (
        [INF, 1, INF, 2, 3],
        {"num_masked": 2, "key_padding_mask": [True, False, True, False, False]},
        ([1, -1, -1], [3, 4], [-1, 0, -1, 3, 4]),
    ),
    "padding only": (
        [3, 2, 1],
        {"num_masked": 1, "key_padding_mask": [True, True, True]},
        ([-1, -1], [-1], [-1, -1, -1]),
    ),
    "more than the row has": (
        [3, 2, 1],
        {"num_masked": 3, "key_padding_mask": [False, True, False]},
        ([], [0, 2, -1], [0, -1, 1]),
    ),
    "number in a tensor": (
        [1, 2, 3],
        {"num_masked": [2]},
        ([0, -1, -1], [1, 2, -1], [0, 3, 4]),
    ),
    "number in a tensor, 0": (
        [1, 2, 3],
        {"num_masked": [0]},
        ([0, 1, 2], [-1, -1, -1], [0, 1, 2]),
    ),
    "number in a tensor, above N": (
        [1, 2, 3],
        {"num_masked": [9]},
        ([-1, -1, -1], [0, 1, 2], [3, 4, 5]),
    ),
    "no more than max_masked": (
        [1, 2, 3],
        {"num_masked": [2], "max_masked": 1},
        ([0, 1, -1], [2], [0, 1, 3]),
    ),
    "half of 4 by noise": (  # 0 and 1 by score, then 3 and 5, of lowest noise
        [6, 5, 4, 3, 2, 1],
        {"num_masked": 4, "random_fraction": 0.5, "noise": [0.0, 0.0, 0.9, 0.1, 0.5, 0.2]},
        ([2, 4], [0, 1, 3, 5], [2, 3, 0, 4, 1, 5]),
    ),
    "half of 1 is 0 by score": (
        [6, 5, 4],
        {"num_masked": 1, "random_fraction": 0.5, "noise": [0.5, 0.4, 0.3]},
        ([0, 1], [2], [0, 1, 2]),
    ),
    "half of 3 is 2 by score": (
        [6, 5, 4, 3],
        {"num_masked": 3, "random_fraction": 0.5, "noise": [0.0, 0.0, 0.4, 0.3]},
        ([2], [0, 1, 3], [1, 2, 0, 3]),
    ),
    "all by noise, ties to the lowest index": (
        [1, 2, 3, 4],
        {"num_masked": 2, "random_fraction": 1.0, "noise": [0.5, 0.25, 0.5, 0.5]},
        ([2, 3], [0, 1], [2, 3, 0, 1]),
    ),
    "noise of padding is not looked at": (
        [9, 2, 3, 4],
        {
            "num_masked": 1,
            "random_fraction": 1.0,
            "noise": [0.0, 0.5, 0.25, 0.75],
            "key_padding_mask": [True, False, False, False],
        },
        ([1, 3, -1], [2], [-1, 0, 3, 1]),
    ),
    "pool of 3": (  # 0, 1, 2 by score, of these 1 and 2 by noise
        [6, 5, 4, 3, 2, 1],
        {"num_masked": 2, "pool_ratio": 0.5, "noise": [0.9, 0.3, 0.5, 0.0, 0.0, 0.0]},
        ([0, 3, 4, 5], [1, 2], [0, 4, 5, 1, 2, 3]),
    ),
    "pool of round(.5 * 5) = 2": (
        [1, 2, 3, 4, 5],
        {"num_masked": 1, "pool_ratio": 0.5, "noise": [0.0, 0.0, 0.0, 0.2, 0.1]},
        ([0, 1, 2, 3], [4], [0, 1, 2, 3, 4]),
    ),
    "pool never smaller than K": (
        [1, 2, 3, 4],
        {"num_masked": 3, "pool_ratio": 0.25, "noise": [0.0, 0.0, 0.0, 0.0]},
        ([0], [1, 2, 3], [0, 1, 2, 3]),
    ),
    "pool of the valid tokens": (  # 4 valid: pool 2, K 1
        [9, 9, 1, 4, 2, 3],
        {
            "mask_ratio": 0.25,
            "pool_ratio": 0.5,
            "noise": [0.0, 0.0, 0.0, 0.8, 0.0, 0.7],
            "key_padding_mask": [True, True, False, False, False, False],
        },
        ([2, 3, 4, -1], [5, -1], [-1, -1, 0, 1, 2, 4]),
    ),
    "noise without a random share": (
        [1, 2, 3],
        {"num_masked": 1, "noise": [0.0, 0.9, 0.9]},
        ([0, 1], [2], [0, 1, 2]),
    ),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    scores, options, (visible, masked, restore) = LITERALS[name]
    inputs = {"scores": torch.tensor([scores], dtype=torch.float32)}
    for key, x in options.items():
        rows = torch.tensor(x if key == "num_masked" else [x]) if isinstance(x, list) else x
        inputs[key] = rows
    selection = call(OP, backend.inputs(inputs))
    assert selection.ids_visible.tolist() == [visible]
    assert selection.ids_masked.tolist() == [masked]
    assert selection.ids_restore.tolist() == [restore]
    assert selection.mask.tolist() == [[j in masked for j in range(len(scores))]]
    assert selection.num_visible.tolist() == [sum(j >= 0 for j in visible)]
    assert selection.num_masked.tolist() == [sum(j >= 0 for j in masked)]
    assert [x.dtype for x in selection] == [torch.bool, *3 * [torch.int64], *2 * [torch.int32]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases(backend, case, dtype):
    inputs = case.build(dtype)
    backend.assert_same_as_oracle(OP, inputs)
    if backend.backend == "reference":
        assert_consistent(call(OP, inputs), inputs.get("key_padding_mask"))


@pytest.mark.not_interpreted
@given(
    batch=st.integers(0, 4),
    tokens=st.sampled_from((0, 1, 2, 7, 16, 33, 65, 130)),
    scores=st.sampled_from(SCORES),
    padding=st.none() | st.sampled_from(PADDINGS),
    ratio=st.floats(0, 1),
    kind=st.sampled_from(("ratio", "number", "rows")),
    share=st.sampled_from((None, "random", "pool")),
    second=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_input(backend, dtype, layout, ratio, kind, share, second, **options):
    batch, tokens = options["batch"], options["tokens"]
    if kind == "ratio":
        options["mask_ratio"] = ratio
    elif kind == "number":
        options["num_masked"] = int(ratio * tokens)
    else:
        options["rows"] = [int(ratio * tokens * b) for b in range(batch)]
        options["max_masked"] = int(second * tokens)
    if share == "random":
        options["random_fraction"] = second
    elif share == "pool":
        options["pool_ratio"] = max(ratio, second)
    inputs = select_inputs(dtype, **options)
    backend.assert_same_as_oracle(OP, inputs, layout)
    if backend.backend == "reference":
        assert_consistent(call(OP, inputs), inputs.get("key_padding_mask"))


@pytest.mark.not_interpreted
@given(
    rows=st.lists(st.lists(st.floats(width=32), min_size=9, max_size=9), min_size=1, max_size=3),
    num_masked=st.integers(0, 9),
)
def test_any_float(backend, rows, num_masked):
    # against Python's own sort, which keeps the order of equal elements
    scores = torch.tensor(rows, dtype=torch.float32, device=backend.device)
    selection = sma_fast.select_tokens(scores, num_masked=num_masked)
    for row, masked in zip(scores.tolist(), selection.ids_masked.tolist(), strict=True):
        order = sorted(range(9), key=lambda j: INF if math.isnan(row[j]) else -row[j])
        assert masked == sorted(order[:num_masked])


@pytest.mark.not_interpreted
@given(ratio=st.floats(0, 1), tokens=st.integers(0, 40))
def test_any_ratio(backend, ratio, tokens):
    # Python's round goes half to even too; each row has one valid token more than the one before
    padding = torch.arange(tokens) >= torch.arange(tokens + 1)[:, None]
    selection = sma_fast.select_tokens(
        torch.zeros(tokens + 1, tokens, device=backend.device),
        mask_ratio=ratio,
        key_padding_mask=padding.to(backend.device),
    )
    assert selection.num_masked.tolist() == [round(ratio * n) for n in range(tokens + 1)]
    assert selection.ids_masked.shape[1] == round(ratio * tokens)
    assert selection.ids_visible.shape[1] == tokens - round(ratio * tokens)
    assert_consistent(selection, padding)


@pytest.mark.parametrize("true", (2, 255))
@pytest.mark.parametrize("padding", ("left", "right", "scattered"))
def test_any_true(backend, padding, true):
    # True is any byte but 0, as after .view(torch.bool)
    inputs = backend.inputs(select_inputs(batch=4, tokens=40, padding=padding, mask_ratio=0.4))
    expected = backend.expected(OP, inputs)
    odd = inputs["key_padding_mask"].to(torch.uint8).mul(true).view(torch.bool)
    assert_same_selection(call(OP, inputs | {"key_padding_mask": odd}), expected)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int16, torch.int8, torch.uint8), ids=str)
def test_numbers_of_any_integer_type(backend, dtype):
    inputs = select_inputs(rows=[3, 0, 12])
    narrow = inputs | {"num_masked": inputs["num_masked"].to(dtype)}
    result = call(OP, backend.inputs(narrow))
    assert_same_selection(result, backend.expected(OP, backend.inputs(inputs)))


LONG_ROWS = {
    "drawn": lambda n, g: torch.rand(n, generator=g),
    "few values": lambda n, g: torch.randint(3, (n,), generator=g).float(),
    "all equal": lambda n, g: torch.ones(n),
    "rising": lambda n, g: torch.arange(n).float(),
    "falling": lambda n, g: -torch.arange(n).float(),
    # every 16th and 32nd token, which a sample would take, says nothing about the rest
    "odd ones out": lambda n, g: torch.where(torch.arange(n) % 16 == 0, 1e9, torch.rand(n)),
    "a high end": lambda n, g: torch.arange(n).div(n - 40, rounding_mode="floor").float(),
}


def too_long(*values):
    return pytest.param(*values, marks=pytest.mark.not_interpreted)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("batch, tokens", (too_long(1, 65_536), too_long(3, 70_001), (5, 16_384)))
@pytest.mark.parametrize("ratio", (too_long(1e-4), 0.15, too_long(0.5), 0.99))
@pytest.mark.parametrize("name", LONG_ROWS)
def test_long_rows(backend, name, ratio, batch, tokens):
    # long rows are sampled, and shared among threads where there are fewer rows than threads
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.stack([LONG_ROWS[name](tokens, generator) for _ in range(batch)])
    inputs = {"scores": scores.to(backend.device), "mask_ratio": ratio}
    assert_same_selection(call(OP, inputs), backend.expected(OP, inputs))


@pytest.mark.one_instruction_set
def test_rows_of_a_million_tokens(backend):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(1 << 16, (1, 1 << 20), generator=generator).float()  # many ties
    inputs = {"scores": scores.to(backend.device), "mask_ratio": 0.6}
    assert_same_selection(call(OP, inputs), backend.expected(OP, inputs))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("batch, tokens", ((16, 700), (2, 20_001)))
@pytest.mark.parametrize("share", ({}, {"random_fraction": 0.5}, {"pool_ratio": 0.6}), ids=str)
def test_reproducible(backend, batch, tokens, share):
    inputs = select_inputs(
        batch=batch, tokens=tokens, scores="last bits", padding="scattered", **share
    )
    noise = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1))
    inputs = backend.inputs(inputs | {"noise": noise})

    def select(scores, padding, noise):
        return sma_fast.select_tokens(
            scores, mask_ratio=0.3, key_padding_mask=padding, noise=noise, **share
        )

    assert_reproducible(select, inputs["scores"], inputs["key_padding_mask"], inputs["noise"])


@pytest.mark.parametrize("share", ({"random_fraction": 0.5}, {"pool_ratio": 0.6}), ids=str)
def test_seeds(share):
    scores = select_inputs(tokens=63)["scores"]

    def select(seed):
        generator = torch.Generator().manual_seed(seed)
        return sma_fast.select_tokens(scores, mask_ratio=0.3, generator=generator, **share)

    assert_same_selection(select(1), select(1))
    assert not torch.equal(select(1).mask, select(2).mask)
    torch.manual_seed(1)
    default = sma_fast.select_tokens(scores, mask_ratio=0.3, **share)
    assert_same_selection(default, select(1))


def test_random_share_is_uniform():
    # 10 tokens, 4 masked, 2 of them by score: the other 2 fall on 8 places with equal chance
    scores = torch.arange(10.0).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    selection = sma_fast.select_tokens(
        scores, num_masked=4, random_fraction=0.5, generator=generator
    )
    counts = selection.mask.sum(dim=0)
    assert counts[8:].tolist() == [4000, 4000]
    assert counts[:8].sum() == 8000
    assert chi_square(counts[:8], 4000) < 24.3  # 7 degrees of freedom, p = .001
    first, second = (selection.ids_masked[:, :2]).unbind(dim=1)
    pairs = torch.bincount(first * 8 + second, minlength=64).reshape(8, 8)
    pairs = pairs[torch.ones(8, 8).triu(1).bool()]  # 28 pairs
    assert chi_square(pairs, 4000) < 55.5  # 27 degrees of freedom, p = .001


def test_pool_is_uniform():
    # 10 tokens, 3 masked out of the top 6
    generator = torch.Generator().manual_seed(0)
    selection = sma_fast.select_tokens(
        torch.arange(10.0).expand(4000, -1), num_masked=3, pool_ratio=0.6, generator=generator
    )
    counts = selection.mask.sum(dim=0)
    assert counts[:4].tolist() == [0, 0, 0, 0]
    assert counts[4:].sum() == 12_000
    assert chi_square(counts[4:], 4000) < 20.5  # 5 degrees of freedom, p = .001


def test_selection_carries_no_gradient(backend):
    scores = select_inputs()["scores"].to(backend.device).requires_grad_()
    selection = sma_fast.select_tokens(scores, mask_ratio=0.3)
    assert not any(x.requires_grad for x in selection)


OPCHECK = {  # layout, and the arguments of the registered op behind scores
    "ratio": ("packed", (None, None, 0.3, None, None, None, 0.0, None)),
    "number": ("transposed", (None, None, None, 3, None, None, 0.0, None)),
    "rows": ("transposed", ("padding", None, None, None, "rows", 5, 0.0, None)),
    "random share": ("transposed", ("padding", "noise", 0.3, None, None, None, 0.5, None)),
    "pool": ("packed", (None, "noise", 0.3, None, None, None, 0.0, 0.5)),
}


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(backend, name):
    layout, options = OPCHECK[name]
    tensors = {
        "scores": make_scores("normal", (3, 12), torch.float32),
        "padding": padding_mask("left", 3, 12),
        "noise": torch.rand(3, 12),
        "rows": torch.tensor([2, 0, 7]),
    }
    tensors, _ = guarded(backend.inputs(tensors), layout)
    arguments = (tensors.get(x, x) for x in ("scores", *options))
    torch.library.opcheck(torch.ops.sma_fast.select_tokens.default, tuple(arguments))


COMPILED = {
    "ratio": {"mask_ratio": 0.3},
    "number": {"num_masked": 4},
    "random share": {"mask_ratio": 0.3, "random_fraction": 0.5},
    "pool": {"num_masked": 4, "pool_ratio": 0.7},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name):
    def select(scores, padding):
        return sma_fast.select_tokens(scores, key_padding_mask=padding, **COMPILED[name])

    inputs = [select_inputs(tokens=n, padding="left") for n in (12, 33, 100)]
    assert_compiles_once(select, [tuple(x.values()) for x in inputs])


def test_compile_rows():
    def select(scores, rows):
        return sma_fast.select_tokens(scores, num_masked=rows, max_masked=6)

    inputs = [select_inputs(tokens=n, rows=[5, 0, 9]) for n in (12, 33, 100)]
    assert_compiles_once(select, [tuple(x.values()) for x in inputs])


def arguments(**changed):
    return {"scores": torch.zeros(2, 5), "mask_ratio": 0.4} | changed


ROWS = torch.tensor([1, 2])
NUMBER = {"mask_ratio": None, "num_masked": ROWS}
BAD = {
    "scores, not a tensor": ("scores", TypeError, {"scores": [[1.0]]}),
    "scores, rank 1": ("scores", ValueError, {"scores": torch.zeros(5)}),
    "scores, rank 3": ("scores", ValueError, {"scores": torch.zeros(2, 5, 1)}),
    "scores, ints": ("scores", TypeError, {"scores": torch.zeros(2, 5).long()}),
    "scores, bool": ("scores", TypeError, {"scores": torch.zeros(2, 5).bool()}),
    "neither": ("num_masked", ValueError, {"mask_ratio": None}),
    "both": ("num_masked", ValueError, {"num_masked": 3}),
    "ratio, below 0": ("mask_ratio", ValueError, {"mask_ratio": -0.01}),
    "ratio, above 1": ("mask_ratio", ValueError, {"mask_ratio": 1.01}),
    "ratio, NaN": ("mask_ratio", ValueError, {"mask_ratio": NAN}),
    "ratio, inf": ("mask_ratio", ValueError, {"mask_ratio": INF}),
    "ratio, bool": ("mask_ratio", TypeError, {"mask_ratio": True}),
    "ratio, str": ("mask_ratio", TypeError, {"mask_ratio": "0.5"}),
    "ratio, tensor": ("mask_ratio", TypeError, {"mask_ratio": torch.tensor(0.5)}),
    "number, negative": ("num_masked", ValueError, {"mask_ratio": None, "num_masked": -1}),
    "number, above N": ("num_masked", ValueError, {"mask_ratio": None, "num_masked": 6}),
    "number, float": ("num_masked", TypeError, {"mask_ratio": None, "num_masked": 2.0}),
    "number, bool": ("num_masked", TypeError, {"mask_ratio": None, "num_masked": True}),
    "number, list": ("num_masked", TypeError, {"mask_ratio": None, "num_masked": [1, 2]}),
    "rows, floats": ("num_masked", TypeError, NUMBER | {"num_masked": ROWS.float()}),
    "rows, bool": ("num_masked", TypeError, NUMBER | {"num_masked": ROWS.bool()}),
    "rows, rank 0": ("num_masked", ValueError, NUMBER | {"num_masked": ROWS[0]}),
    "rows, rank 2": ("num_masked", ValueError, NUMBER | {"num_masked": ROWS[None]}),
    "rows, batch": ("num_masked", ValueError, NUMBER | {"num_masked": ROWS[:1]}),
    "rows, device": ("num_masked", ValueError, NUMBER | {"num_masked": ROWS.to("meta")}),
    "width with a ratio": ("max_masked", ValueError, {"max_masked": 3}),
    "width with an int": ("max_masked", ValueError, NUMBER | {"num_masked": 2, "max_masked": 3}),
    "width, negative": ("max_masked", ValueError, NUMBER | {"max_masked": -1}),
    "width, above N": ("max_masked", ValueError, NUMBER | {"max_masked": 6}),
    "width, float": ("max_masked", TypeError, NUMBER | {"max_masked": 3.0}),
    "width, bool": ("max_masked", TypeError, NUMBER | {"max_masked": True}),
    "padding, not a tensor": ("key_padding_mask", TypeError, {"key_padding_mask": [[True]]}),
    "padding, ints": ("key_padding_mask", TypeError, {"key_padding_mask": torch.ones(2, 5).int()}),
    "padding, floats": ("key_padding_mask", TypeError, {"key_padding_mask": torch.ones(2, 5)}),
    "padding, shape": ("key_padding_mask", ValueError, {"key_padding_mask": torch.ones(2, 4) > 0}),
    "padding, batch": ("key_padding_mask", ValueError, {"key_padding_mask": torch.ones(1, 5) > 0}),
    "padding, rank": ("key_padding_mask", ValueError, {"key_padding_mask": torch.ones(5) > 0}),
    "padding, device": (
        "key_padding_mask",
        ValueError,
        {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool, device="meta")},
    ),
    "share, below 0": ("random_fraction", ValueError, {"random_fraction": -0.1}),
    "share, above 1": ("random_fraction", ValueError, {"random_fraction": 1.1}),
    "share, NaN": ("random_fraction", ValueError, {"random_fraction": NAN}),
    "share, bool": ("random_fraction", TypeError, {"random_fraction": True}),
    "share, None": ("random_fraction", TypeError, {"random_fraction": None}),
    "pool, below the ratio": ("pool_ratio", ValueError, {"pool_ratio": 0.3}),
    "pool, above 1": ("pool_ratio", ValueError, {"pool_ratio": 1.1}),
    "pool, NaN": ("pool_ratio", ValueError, {"pool_ratio": NAN}),
    "pool, bool": ("pool_ratio", TypeError, {"pool_ratio": True}),
    "share and pool": ("pool_ratio", ValueError, {"pool_ratio": 0.5, "random_fraction": 0.5}),
    "noise, not a tensor": ("noise", TypeError, {"noise": [[0.5]]}),
    "noise, double": ("noise", TypeError, {"noise": torch.zeros(2, 5).double()}),
    "noise, shape": ("noise", ValueError, {"noise": torch.zeros(2, 4)}),
    "noise, rank": ("noise", ValueError, {"noise": torch.zeros(5)}),
    "noise, device": ("noise", ValueError, {"noise": torch.zeros(2, 5, device="meta")}),
    "scores, sparse": ("scores", TypeError, {"scores": torch.zeros(2, 5).to_sparse()}),
    "scores, mkldnn": ("scores", TypeError, {"scores": torch.zeros(2, 5).to_mkldnn()}),
    "noise, sparse": ("noise", TypeError, {"noise": torch.zeros(2, 5).to_sparse()}),
    "generator, nothing drawn": ("generator", TypeError, {"generator": 3}),
    "generator, noise given": (
        "generator",
        TypeError,
        {"random_fraction": 0.5, "noise": torch.zeros(2, 5), "generator": "cpu"},
    ),
    "generator": ("generator", TypeError, {"random_fraction": 0.5, "generator": 3}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^([a-z_]+, )?{argument}(, [a-z_]+)?: .*allowed "):
        sma_fast.select_tokens(**arguments(**changed))


def test_negative_number_of_a_row(backend):
    rows = torch.tensor([1, -3])
    with pytest.raises(ValueError, match="^num_masked: holds -3, allowed is at least 0"):
        call(OP, backend.inputs(arguments(mask_ratio=None, num_masked=rows)))
