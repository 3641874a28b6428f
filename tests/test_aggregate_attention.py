"""aggregate_attention: the attention each key receives, from a map that already exists."""

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
    aggregate_inputs,
    assert_close,
    assert_compiles_once,
    assert_reproducible,
    assert_same,
    attention_inputs,
    call,
    guarded,
    plain_aggregate_attention,
)

OP = "aggregate_attention"
INF = math.inf

MAP = [[[0.5, 0.25, 0.25], [0.125, 0.375, 0.5]], [[0.0, 1.0, 0.0], [0.75, 0.0, 0.25]]]
LOG = math.log(3)  # beside 0: the softmax is 1/4 and 3/4

# attention (H, M, N), options, answer, exact in float32; lists among the options are index rows
LITERALS = {
    "mean": (MAP, {}, [0.6875, 0.8125, 0.5]),
    "sum": (MAP, {"head_reduce": "sum"}, [1.375, 1.625, 1.0]),
    "heads apart": (MAP, {"head_reduce": "none"}, [[0.625, 0.625, 0.75], [0.75, 1.0, 0.25]]),
    "query 1": (MAP, {"query_index": [1]}, [0.4375, 0.1875, 0.375]),
    "a query twice": (MAP, {"query_index": [1, 1]}, [0.875, 0.375, 0.75]),
    "-1 selects nothing": (MAP, {"query_index": [-1, 1]}, [0.4375, 0.1875, 0.375]),
    "only -1": (MAP, {"query_index": [-1, -1]}, [0.0, 0.0, 0.0]),
    "a head for each query": (MAP, {"head_index": [1, 0]}, [0.125, 1.375, 0.5]),
    "a head for each selected query": (
        MAP,
        {"query_index": [1, 0], "head_index": [1, 1]},
        [0.75, 1.0, 0.25],
    ),
    "not attention at all": ([[[3.0, -5.0], [1.0, 2.0]]], {}, [4.0, -3.0]),
    "inf": ([[[INF, -INF, INF], [1.0, 2.0, -INF]]], {}, [INF, -INF, math.nan]),
}
LOGITS = {
    "softmax": ([[[0.0, LOG], [5.0, 5.0]]], {}, [0.75, 1.25]),
    "softmax of the selected": ([[[0.0, LOG], [5.0, 5.0]]], {"query_index": [0]}, [0.25, 0.75]),
    "padding bias": ([[[0.0, LOG, -INF]]], {}, [0.25, 0.75, 0.0]),
    "one token": ([[[-7.0], [3.0]]], {}, [2.0]),
    "+inf has no softmax": ([[[0.0, INF]]], {}, [math.nan, math.nan]),
    "nor has only -inf": ([[[-INF, -INF]]], {}, [math.nan, math.nan]),
    "large": ([[[1000.0, 0.0, 1000.0]]], {}, [0.5, 0.0, 0.5]),
}


def run_literal(backend, attention, options, **more):
    inputs = {"attention": torch.tensor([attention])}
    for argument, x in options.items():
        inputs[argument] = torch.tensor([x]) if isinstance(x, list) else x
    return call(OP, backend.inputs(inputs) | more).cpu()


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    attention, options, answer = LITERALS[name]
    scores, answer = run_literal(backend, attention, options), torch.tensor([answer])
    torch.testing.assert_close(scores, answer, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", LOGITS)
def test_literal_logits(backend, name):
    attention, options, answer = LOGITS[name]
    scores = run_literal(backend, attention, options, logits=True)
    torch.testing.assert_close(scores, torch.tensor([answer]), rtol=1e-6, atol=1e-7, equal_nan=True)


def assert_scores(backend, inputs: dict, layout: str = "packed") -> None:
    inputs, assert_unchanged = guarded(backend.inputs(inputs), layout)
    if backend.refuses(OP, inputs):
        return
    scores = call(OP, inputs)
    assert scores.dtype == torch.float32
    exact = plain_aggregate_attention(**inputs, dtype=torch.float64)
    assert_close(scores, exact, plain_aggregate_attention(**inputs, dtype=torch.float32))
    assert_unchanged()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases(backend, case, dtype):
    assert_scores(backend, case.build(dtype))


@pytest.mark.parametrize("logits", (False, pytest.param(True, marks=pytest.mark.not_interpreted)))
@pytest.mark.parametrize(
    "values", ("normal", pytest.param("equal", marks=pytest.mark.not_interpreted))
)
def test_many_rows(backend, values, logits):
    # thousands of terms: what each addition loses would add up
    attention = torch.zeros(1, 12, 300, 35)
    if values == "normal":
        attention.normal_(generator=torch.Generator().manual_seed(0))
    if not logits:
        attention = attention.softmax(3)
    inputs = backend.inputs({"attention": attention, "logits": logits})
    result = call(OP, inputs)
    exact = attention.double().softmax(3) if logits else attention.double()
    exact = exact.sum(2).mean(1).to(result.device)
    assert ((result - exact).abs() / exact).max() < 3e-7


@pytest.mark.not_interpreted
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    queries=st.integers(0, 20),
    tokens=st.sampled_from((0, 1, 2, 7, 16, 33, 65)),
    selected=st.none() | st.integers(0, 20),
    ragged=st.booleans(),
    shared=st.booleans(),
    by_head=st.booleans(),
    values=st.sampled_from(("normal", "equal", "ties", "special")),
    logits=st.booleans(),
    head_reduce=st.sampled_from(("mean", "sum", "none")),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_input(backend, dtype, layout, queries, selected, **options):
    if selected is None:
        options["ragged"] = options["shared"] = False
    else:
        options["selected"] = min(selected, queries)
    if options["by_head"] and options["head_reduce"] == "none":
        options["head_reduce"] = "sum"
    assert_scores(backend, aggregate_inputs(dtype, queries=queries, **options), layout)


def test_logits_are_what_attention_scores_sums(backend):
    inputs = backend.inputs(attention_inputs(selected=3, tokens=33))
    logits = inputs["query"] @ inputs["key"].transpose(2, 3) * 0.3
    scores = sma_fast.aggregate_attention(logits, query_index=inputs["query_index"], logits=True)
    with sma_fast.use_backend("reference"):
        expected = sma_fast.attention_scores(**inputs, scale=0.3)
    torch.testing.assert_close(scores, expected)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("options", ({}, {"head_reduce": "none"}, {"logits": True}), ids=str)
@pytest.mark.parametrize("batch, tokens", ((5, 300), (1, 5001)))
def test_reproducible(backend, batch, tokens, options, dtype):
    inputs = aggregate_inputs(dtype, batch=batch, tokens=tokens, queries=20, selected=17, heads=3)
    attention, index = backend.inputs(inputs).values()
    assert_reproducible(
        lambda a, i: sma_fast.aggregate_attention(a, query_index=i, **options), attention, index
    )


def test_no_gradient(backend):
    inputs = backend.inputs(aggregate_inputs())
    inputs["attention"].requires_grad_()
    assert not call(OP, inputs).requires_grad


OPCHECK = {  # layout and options
    "plain": ("packed", {}),
    "index": ("transposed", {"selected": 3, "ragged": True, "batch": 3, "logits": True}),
    "heads apart": ("packed", {"head_reduce": "none"}),
    "head of each query": ("transposed", {"selected": 3, "by_head": True}),
}


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(backend, name):
    layout, options = OPCHECK[name]
    inputs, _ = guarded(backend.inputs(aggregate_inputs(**options)), layout)
    torch.library.opcheck(
        torch.ops.sma_fast.aggregate_attention.default,
        (
            inputs["attention"],
            inputs.get("query_index"),
            inputs.get("head_index"),
            inputs.get("head_reduce", "mean"),
            inputs.get("logits", False),
        ),
    )


@pytest.mark.parametrize("logits", (False, True))
def test_compile(logits):
    def scores(attention, index):
        return sma_fast.aggregate_attention(attention, query_index=index, logits=logits)

    inputs = [
        aggregate_inputs(batch=4, tokens=n, queries=m, selected=3)
        for n, m in ((12, 5), (33, 7), (100, 20))
    ]
    assert_compiles_once(scores, [tuple(x.values()) for x in inputs])


@pytest.mark.parametrize("logits", (False, True))
def test_autocast_rounds_nothing(backend, logits):
    inputs = backend.inputs(aggregate_inputs(tokens=33, logits=logits))
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        inside = call(OP, inputs)
    assert_same(inside, call(OP, inputs))


INDEX = torch.zeros(2, 3, dtype=torch.int64)
BAD = {
    "attention, not a tensor": ("attention", TypeError, {"attention": [[1.0]]}),
    "attention, rank": ("attention", ValueError, {"attention": torch.zeros(2, 5, 6)}),
    "attention, ints": ("attention", TypeError, {"attention": torch.zeros(2, 4, 5, 6).long()}),
    "attention, no heads": ("attention", ValueError, {"attention": torch.zeros(2, 0, 5, 6)}),
    "attention, sparse": (
        "attention",
        TypeError,
        {"attention": torch.zeros(2, 4, 5, 6).to_sparse()},
    ),
    "index, sparse": ("query_index", TypeError, {"query_index": INDEX.to_sparse()}),
    "attention, bool": ("attention", TypeError, {"attention": torch.zeros(2, 4, 5, 6).bool()}),
    "index, not a tensor": ("query_index", TypeError, {"query_index": 1}),
    "index, floats": ("query_index", TypeError, {"query_index": INDEX.float()}),
    "index, bool": ("query_index", TypeError, {"query_index": INDEX.bool()}),
    "index, rank": ("query_index", ValueError, {"query_index": INDEX[None]}),
    "index, batch": ("query_index", ValueError, {"query_index": INDEX[:1]}),
    "R > M": ("query_index", ValueError, {"query_index": INDEX.repeat(1, 2)}),
    "index, device": ("query_index", ValueError, {"query_index": INDEX.to("meta")}),
    "head, not a tensor": ("head_index", TypeError, {"head_index": [0]}),
    "head, floats": ("head_index", TypeError, {"head_index": torch.zeros(2, 5)}),
    "head, width": ("head_index", ValueError, {"head_index": INDEX}),
    "head, batch": ("head_index", ValueError, {"query_index": INDEX, "head_index": INDEX[:1]}),
    "head with heads apart": (
        "head_index",
        ValueError,
        {"query_index": INDEX, "head_index": INDEX, "head_reduce": "none"},
    ),
    "reduce, unknown": ("head_reduce", ValueError, {"head_reduce": "max"}),
    "logits, an int": ("logits", TypeError, {"logits": 1}),
    "logits, None": ("logits", TypeError, {"logits": None}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        sma_fast.aggregate_attention(**({"attention": torch.zeros(2, 4, 5, 6)} | changed))


@pytest.mark.parametrize("bad", (5, -2))
def test_query_out_of_range(backend, bad):
    index = INDEX.index_fill(1, torch.tensor(1), bad)
    inputs = {"attention": torch.zeros(2, 4, 5, 6), "query_index": index}
    with pytest.raises(ValueError, match=rf"^query_index: holds {bad}, allowed is -1 to 4"):
        call(OP, backend.inputs(inputs))


@pytest.mark.parametrize("bad", (4, -1))
def test_head_out_of_range(backend, bad):
    index = INDEX.index_fill(1, torch.tensor(1), bad)
    inputs = {"attention": torch.zeros(2, 4, 5, 6), "query_index": INDEX, "head_index": index}
    with pytest.raises(ValueError, match=rf"^head_index: holds {bad}, allowed is 0 to 3"):
        call(OP, backend.inputs(inputs))


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e12, 3e38])
def test_huge_equal_logits_share_evenly(backend, value):
    # such as the padding bias of a row that is all padding
    inputs = backend.inputs({"attention": torch.full((1, 2, 3, 8), value)})
    scores = sma_fast.aggregate_attention(inputs["attention"], logits=True)
    torch.testing.assert_close(scores.cpu(), torch.full((1, 8), 3 / 8))


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("logits", (False, True))
@pytest.mark.parametrize(
    "options",
    [{}, {"selected": 3, "ragged": True, "by_head": True}, {"head_reduce": "none"}],
    ids=str,
)
def test_rows_too_long_to_be_held_at_once(backend, options, logits):
    """On a GPU a launch of its own finds their sums of exponentials."""
    inputs = aggregate_inputs(queries=5, tokens=9000, logits=logits, **options)
    inputs = backend.inputs(inputs)
    expected = backend.expected(OP, inputs)
    torch.testing.assert_close(call(OP, inputs), expected, rtol=3e-5, atol=1e-6)
