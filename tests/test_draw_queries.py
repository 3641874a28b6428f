"""draw_queries: queries drawn for each sample, uniformly and without replacement."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sma_fast
from sma_fast.testing import (
    CASES,
    LAYOUTS,
    PADDINGS,
    SCORES,
    assert_compiles_once,
    assert_reproducible,
    assert_same,
    call,
    chi_square,
    draw_inputs,
    guarded,
    make_scores,
    padding_mask,
)

OP = "draw_queries"
NAN = float("nan")

# noise, num_queries (a list: for each row), padding, answer: those of lowest noise, ascending
LITERALS = {
    "the lowest two": ([[0.5, 0.1, 0.3, 0.2]], 2, None, [[1, 3]]),
    "ties go to the lowest index": ([[0.1, 0.1, 0.1]], 2, None, [[0, 1]]),
    "all": ([[0.9, 0.1]], 2, None, [[0, 1]]),
    "each row by its noise": ([[0.1, 0.2], [0.2, 0.1]], 1, None, [[0], [1]]),
    "NaN last": ([[NAN, 0.9, NAN]], 2, None, [[0, 1]]),
    "padding never": ([[0.0, 0.5, 0.0, 0.4]], 2, [[1, 0, 1, 0]], [[1, 3]]),
    "fewer than asked": ([[0.0, 0.5, 0.1]], 2, [[1, 0, 1]], [[1, -1]]),
    "padding only": ([[0.0, 0.5]], 2, [[1, 1]], [[-1, -1]]),
    "rows": (
        [[0.3, 0.2, 0.1]] * 4,
        [1, 3, 2, 9],
        None,
        [[2, -1, -1], [0, 1, 2], [1, 2, -1], [0, 1, 2]],
    ),
    "at least one": ([[0.3, 0.2, 0.1]], [0], None, [[2, -1, -1]]),
    "not one where all is padding": ([[0.3, 0.2]], [0], [[1, 1]], [[-1, -1]]),
    "rows and padding": ([[0.3, 0.2, 0.1]] * 2, [1, 2], [[0, 0, 1]] * 2, [[1, -1, -1], [0, 1, -1]]),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    noise, number, padding, answer = LITERALS[name]
    noise = torch.tensor(noise, device=backend.device)
    rows = torch.tensor(number, device=backend.device) if isinstance(number, list) else None
    if padding is not None:
        padding = torch.tensor(padding, device=backend.device).bool()
    width = noise.shape[1] if rows is not None else number
    drawn = torch.ops.sma_fast.draw_queries(noise, width, rows, padding)
    assert drawn.tolist() == answer
    assert drawn.dtype == torch.int64


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases(backend, case):
    inputs = case.build()
    backend.assert_same_as_oracle(OP, inputs)
    if backend.backend == "reference":
        assert_drawn(call(OP, inputs), inputs)


def assert_drawn(drawn: torch.Tensor, inputs: dict) -> None:
    """Asserts each row ascending, without repetition, of its own number, and no padding in it."""
    batch, padding, number = drawn.shape[0], inputs.get("padding_mask"), inputs["num_queries"]
    numbers = number.tolist() if isinstance(number, torch.Tensor) else [number] * batch
    for b in range(batch):
        row = [j for j in drawn[b].tolist() if j >= 0]
        if padding is None:
            valid = set(range(inputs["num_candidates"]))
        else:
            valid = {j for j, p in enumerate(padding[b].tolist()) if not p}
        assert row == sorted(set(row))
        assert len(row) == min(max(numbers[b], 1), len(valid))
        assert set(row) <= valid
        assert drawn[b, : len(row)].tolist() == row  # -1 stands behind


@pytest.mark.not_interpreted
@given(
    batch=st.integers(0, 4),
    candidates=st.sampled_from((0, 1, 2, 7, 16, 33, 65)),
    noise=st.sampled_from(SCORES),
    number=st.integers(0, 65) | st.lists(st.integers(0, 70), min_size=4, max_size=4),
    padding=st.none() | st.sampled_from(PADDINGS),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_input(backend, batch, candidates, noise, number, padding, layout):
    inputs = {"noise": make_scores(noise, (batch, candidates), torch.float32)}
    if isinstance(number, list):
        inputs["rows"], width = torch.tensor(number[:batch], dtype=torch.int64), candidates
    else:
        width = min(max(number, 1), candidates)
    if padding is not None:
        inputs["padding"] = padding_mask(padding, batch, candidates)
    inputs, assert_unchanged = guarded(backend.inputs(inputs), layout)
    arguments = (inputs["noise"], width, inputs.get("rows"), inputs.get("padding"))
    drawn = torch.ops.sma_fast.draw_queries(*arguments)
    with sma_fast.use_backend("reference"):
        assert_same(drawn, torch.ops.sma_fast.draw_queries(*arguments))
    assert_unchanged()


@pytest.mark.parametrize("true", (2, 255))
def test_any_true(backend, true):
    # True is any byte but 0, as after .view(torch.bool)
    inputs = backend.inputs(draw_inputs(num_queries=4, padding="scattered"))
    expected = call(OP, inputs)
    odd = inputs["padding_mask"].to(torch.uint8).mul(true).view(torch.bool)
    assert torch.equal(call(OP, inputs | {"padding_mask": odd}), expected)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int16, torch.int8, torch.uint8), ids=str)
def test_numbers_of_any_integer_type(backend, dtype):
    inputs = backend.inputs(draw_inputs(rows=[3, 0, 12]))
    narrow = inputs | {"num_queries": inputs["num_queries"].to(dtype)}
    assert_same(call(OP, narrow), backend.expected(OP, inputs))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("batch, candidates", ((16, 700), (2, 20_001)))
def test_reproducible(backend, batch, candidates):
    noise = torch.rand(batch, candidates, generator=torch.Generator().manual_seed(1))
    padding = padding_mask("scattered", batch, candidates)
    assert_reproducible(
        lambda n, p: torch.ops.sma_fast.draw_queries(n, 300, None, p),
        noise.to(backend.device),
        padding.to(backend.device),
    )


def test_seeds(backend):
    inputs = backend.inputs(draw_inputs(num_queries=9, candidates=100))
    assert_same(call(OP, inputs), call(OP, inputs))
    assert not torch.equal(call(OP, inputs), call(OP, inputs | {"seed": 1}))
    torch.manual_seed(0)
    del inputs["seed"]
    first, second = call(OP, inputs), call(OP, inputs)
    assert_same(first.cpu(), call(OP, inputs | {"seed": 0}).cpu())
    assert not torch.equal(first, second)


def test_shapes_come_from_what_is_given():
    padding = torch.zeros(3, 7, dtype=torch.bool)
    assert sma_fast.draw_queries(2, batch=3, num_candidates=7).shape == (3, 2)
    assert sma_fast.draw_queries(2, padding_mask=padding).shape == (3, 2)
    assert sma_fast.draw_queries(0, padding_mask=padding).shape == (3, 1)
    rows = torch.tensor([1, 2, 3])
    assert sma_fast.draw_queries(rows, num_candidates=7).shape == (3, 7)
    assert sma_fast.draw_queries(rows, padding_mask=padding).shape == (3, 7)
    assert sma_fast.draw_queries(2, batch=3, num_candidates=7, device="meta").is_meta


def test_uniform():
    drawn = sma_fast.draw_queries(
        2, batch=4000, num_candidates=8, generator=torch.Generator().manual_seed(0)
    )
    assert chi_square(torch.bincount(drawn.flatten(), minlength=8), 4000) < 24.3  # 7 degrees
    first, second = drawn.unbind(dim=1)
    pairs = torch.bincount(first * 8 + second, minlength=64).reshape(8, 8)
    assert int(pairs.tril().sum()) == 0
    pairs = pairs[torch.ones(8, 8).triu(1).bool()]
    assert chi_square(pairs, 4000) < 55.5  # 27 degrees of freedom, p = .001


def test_uniform_beside_padding():
    padding = torch.tensor([True, False, True, False, False, False, False]).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = sma_fast.draw_queries(2, padding_mask=padding, generator=generator)
    counts = torch.bincount(drawn.flatten(), minlength=7)
    assert counts[[0, 2]].tolist() == [0, 0]
    assert chi_square(counts[[1, 3, 4, 5, 6]], 4000) < 18.5  # 4 degrees of freedom, p = .001


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("layout", ("packed", "transposed"))
@pytest.mark.parametrize("rows", (False, True))
@pytest.mark.parametrize("padding", (False, True))
def test_opcheck(backend, rows, padding, layout):
    inputs = {
        "noise": make_scores("normal", (3, 9), torch.float32),
        "rows": torch.tensor([1, 0, 5]) if rows else None,
        "padding": padding_mask("left", 3, 9) if padding else None,
    }
    inputs, _ = guarded(backend.inputs(inputs), layout)
    torch.library.opcheck(
        torch.ops.sma_fast.draw_queries.default,
        (inputs["noise"], 9 if rows else 4, inputs["rows"], inputs["padding"]),
    )


def test_compile():
    def draw(padding, like):
        given = sma_fast.draw_queries(3, padding_mask=padding)
        free = sma_fast.draw_queries(3, batch=like.shape[0], num_candidates=like.shape[1])
        return given, free

    sizes = ((4, 12), (5, 33), (6, 100))
    inputs = [(padding_mask("left", b, n), torch.zeros(b, n + 1)) for b, n in sizes]
    assert_compiles_once(draw, inputs)


def arguments(**changed):
    return {"num_queries": 2, "batch": 3, "num_candidates": 5} | changed


ROWS = torch.tensor([1, 2, 3])
PADDING = torch.zeros(3, 5, dtype=torch.bool)
BAD = {
    "number, None": ("num_queries", TypeError, {"num_queries": None}),
    "number, float": ("num_queries", TypeError, {"num_queries": 2.0}),
    "number, bool": ("num_queries", TypeError, {"num_queries": True}),
    "number, list": ("num_queries", TypeError, {"num_queries": [1, 2, 3]}),
    "number, negative": ("num_queries", ValueError, {"num_queries": -1}),
    "R > M": ("num_queries", ValueError, {"num_queries": 6}),
    "rows, floats": ("num_queries", TypeError, {"num_queries": ROWS.float()}),
    "rows, bool": ("num_queries", TypeError, {"num_queries": ROWS.bool()}),
    "rows, rank 0": ("num_queries", ValueError, {"num_queries": ROWS[0]}),
    "rows, rank 2": ("num_queries", ValueError, {"num_queries": ROWS[None]}),
    "rows, batch": ("num_queries", ValueError, {"num_queries": ROWS[1:]}),
    "rows, batch of padding": (
        "num_queries",
        ValueError,
        {"num_queries": ROWS[1:], "padding_mask": PADDING, "batch": None},
    ),
    "rows, device": ("num_queries", ValueError, {"num_queries": ROWS, "device": "meta"}),
    "batch, missing": ("batch", ValueError, {"batch": None}),
    "batch, negative": ("batch", ValueError, {"batch": -1}),
    "batch, float": ("batch", TypeError, {"batch": 3.0}),
    "batch, bool": ("batch", TypeError, {"batch": True}),
    "batch, not that of padding": ("batch", ValueError, {"padding_mask": PADDING, "batch": 2}),
    "candidates, missing": ("num_candidates", ValueError, {"num_candidates": None}),
    "candidates, negative": ("num_candidates", ValueError, {"num_candidates": -1}),
    "candidates, float": ("num_candidates", TypeError, {"num_candidates": 5.0}),
    "candidates, not those of padding": (
        "num_candidates",
        ValueError,
        {"padding_mask": PADDING, "num_candidates": 4},
    ),
    "padding, not a tensor": ("padding_mask", TypeError, {"padding_mask": [[True]]}),
    "padding, ints": ("padding_mask", TypeError, {"padding_mask": PADDING.int()}),
    "padding, rank": ("padding_mask", ValueError, {"padding_mask": PADDING[0]}),
    "padding, device": ("padding_mask", ValueError, {"padding_mask": PADDING, "device": "meta"}),
    "padding, sparse": ("padding_mask", TypeError, {"padding_mask": PADDING.to_sparse()}),
    "rows, sparse": ("num_queries", TypeError, {"num_queries": ROWS.to_sparse()}),
    "device, unknown": ("device", ValueError, {"device": "nope"}),
    "device, empty": ("device", ValueError, {"device": ""}),
    "device, float": ("device", TypeError, {"device": 3.5}),
    "device, bool": ("device", TypeError, {"device": True}),
    "device, unknown, beside padding": (
        "device",
        ValueError,
        {"padding_mask": PADDING, "device": "nope"},
    ),
    "generator, nothing to draw": ("generator", TypeError, {"batch": 0, "generator": 3}),
    "generator": ("generator", TypeError, {"generator": 3}),
}


def test_default_device_is_that_of_torch():
    with torch.device("meta"):
        assert sma_fast.draw_queries(**arguments()).is_meta
        assert sma_fast.draw_queries(**arguments(device="cpu")).device.type == "cpu"
        assert sma_fast.draw_queries(2, padding_mask=PADDING).device.type == "cpu"


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        sma_fast.draw_queries(**arguments(**changed))


def test_negative_number_of_a_row(backend):
    rows = torch.tensor([1, -3, 2])
    with pytest.raises(ValueError, match="^num_queries: holds -3, allowed is at least 0"):
        call(OP, backend.inputs(arguments(num_queries=rows, batch=None)))
