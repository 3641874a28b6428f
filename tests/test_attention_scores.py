"""attention_scores: the attention each key receives from the selected queries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sma_fast
from sma_fast import _native
from sma_fast.testing import (
    CASES,
    DTYPES,
    LAYOUTS,
    NATIVE_DTYPES,
    PADDINGS,
    assert_close,
    assert_compiles_once,
    assert_reproducible,
    assert_same,
    attention_inputs,
    call,
    guarded,
    plain_attention_scores,
)

OP = "attention_scores"
NAN = math.nan


def logs(*weights: float) -> list[list[float]]:
    """Returns keys of width 1 whose softmax under query 1 is `weights` over their sum."""
    return [[math.log(w)] for w in weights]


ONE, OFF, TWO = [1.0], [0.0], [2.0]  # queries of width 1: as they are, all equal, squares

# query (H, M, D), key (H_kv, N, D), options, answer; lists among the options are index rows
LITERALS = {
    "one query": ([[ONE]], [logs(1, 3)], {}, [0.25, 0.75]),
    "an infinite key": ([[[-1.0]]], [[[math.inf], *logs(3, 1)]], {}, [0.0, 0.25, 0.75]),
    "an infinite query": (
        [[[-math.inf]]],
        [[ONE, TWO, ONE]],
        {"key_padding_mask": [False, False, True]},
        [NAN, NAN, 0.0],
    ),
    "the sum of two queries": ([[ONE, OFF]], [logs(1, 3)], {}, [0.75, 1.25]),
    "query 1": ([[ONE, OFF]], [logs(1, 3)], {"query_index": [1]}, [0.5, 0.5]),
    "one query twice": ([[ONE, OFF]], [logs(1, 3)], {"query_index": [0, 0]}, [0.5, 1.5]),
    "-1 selects nothing": ([[ONE, OFF]], [logs(1, 3)], {"query_index": [0, -1]}, [0.25, 0.75]),
    "only -1": ([[ONE, OFF]], [logs(1, 3)], {"query_index": [-1, -1]}, [0.0, 0.0]),
    "the mean of the heads": ([[ONE], [OFF]], [logs(1, 3)] * 2, {}, [0.375, 0.625]),
    "the sum of the heads": (
        [[ONE], [OFF]],
        [logs(1, 3)] * 2,
        {"head_reduce": "sum"},
        [0.75, 1.25],
    ),
    "heads apart": (
        [[ONE], [OFF]],
        [logs(1, 3)] * 2,
        {"head_reduce": "none"},
        [[0.25, 0.75], [0.5, 0.5]],
    ),
    "query 0 in head 1, query 1 in head 0": (
        [[ONE, TWO], [OFF, OFF]],
        [logs(1, 3)] * 2,
        {"head_index": [1, 0]},
        [0.5 + 0.1, 0.5 + 0.9],
    ),
    "a head for each selected query": (
        [[ONE, TWO], [OFF, OFF]],
        [logs(1, 3)] * 2,
        {"query_index": [1, -1], "head_index": [0, 1]},
        [0.1, 0.9],
    ),
    "heads 0 and 1 share keys, 2 and 3 too": (
        [[ONE]] * 4,
        [logs(1, 3), logs(1, 1)],
        {"head_reduce": "none"},
        [[0.25, 0.75], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]],
    ),
    "padding": (
        [[ONE]],
        [logs(1, 3, 4)],
        {"key_padding_mask": [False, False, True]},
        [0.25, 0.75, 0.0],
    ),
    "padding that is NaN": (
        [[ONE]],
        [[[NAN], *logs(1, 3)]],
        {"key_padding_mask": [True, False, False]},
        [0.0, 0.25, 0.75],
    ),
    "padding only": ([[ONE]], [logs(1, 3)], {"key_padding_mask": [True, True]}, [0.0, 0.0]),
    "padding beside NaN": (
        [[ONE]],
        [[[NAN], *logs(1, 3)]],
        {"key_padding_mask": [False, False, True]},
        [NAN, NAN, 0.0],
    ),
    "scale 2": ([[ONE]], [logs(1, 3)], {"scale": 2.0}, [0.1, 0.9]),
    "scale -1": ([[ONE]], [logs(1, 3)], {"scale": -1.0}, [0.75, 0.25]),
    "scale 1/2 for width 4": (
        [[4 * ONE]],
        [[4 * x for x in logs(1, 3)]],  # 4 times the log, halved, is the square
        {},
        [0.1, 0.9],
    ),
    "one key": ([[ONE, TWO]], [logs(7)], {}, [2.0]),
    "large logits": ([[[1000.0]]], [[[1.0], [2.0], [2.0]]], {}, [0.0, 0.5, 0.5]),
    "very negative logits": ([[[-1000.0]]], [[[1.0], [2.0], [2.0]]], {}, [1.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    query, key, options, answer = LITERALS[name]
    inputs = {"query": torch.tensor([query]), "key": torch.tensor([key])}
    for argument, x in options.items():
        inputs[argument] = torch.tensor([x]) if isinstance(x, list) else x
    scores = call(OP, backend.inputs(inputs)).cpu()
    torch.testing.assert_close(scores, torch.tensor([answer]), rtol=1e-6, atol=1e-7, equal_nan=True)


def assert_scores(backend, inputs: dict, layout: str = "packed") -> None:
    inputs, assert_unchanged = guarded(backend.inputs(inputs), layout)
    if backend.refuses(OP, inputs):
        return
    scores = call(OP, inputs)
    assert scores.dtype == torch.float32
    exact = plain_attention_scores(**inputs, dtype=torch.float64)
    assert_close(scores, exact, plain_attention_scores(**inputs, dtype=torch.float32))
    if inputs.get("key_padding_mask") is not None:
        padding = inputs["key_padding_mask"]
        if scores.dim() == 3:
            padding = padding[:, None, :].expand_as(scores)
        assert bool((scores[padding] == 0).all()), "padding scores exactly 0"
    assert_unchanged()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases(backend, case, dtype):
    assert_scores(backend, case.build(dtype))


ROWS = {"batch": 1, "heads": 8, "kv_heads": 1, "queries": 64, "tokens": 9000, "width": 4}
LARGE = {  # 512 rows of one key head are 18 MiB; threads share samples, or one sample's keys
    "rows": ROWS,
    "rows, heads apart": ROWS | {"head_reduce": "none"},
    "rows, padding": ROWS | {"padding": "scattered"},
    "another number of rows in each head": {
        **{"batch": 1, "heads": 8, "by_head": True, "queries": 40, "selected": 30},
        **{"tokens": 9000},
    },
    "samples": {"batch": 16, "tokens": 300, "queries": 20, "selected": 17, "padding": "left"},
    "few samples, many keys": {"batch": 5, "tokens": 4500, "queries": 3, "padding": "left"},
    # thousands of equal terms: what each addition loses would add up
    "many rows, all equal": {"heads": 12, "queries": 300, "tokens": 70, "scale": 0.0},
    "many rows": {"heads": 8, "queries": 500, "tokens": 200, "width": 16},
}


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large(backend, four_threads, name, dtype):
    assert_scores(backend, attention_inputs(dtype, **LARGE[name]))


@pytest.mark.not_interpreted
@given(
    batch=st.integers(0, 3),
    latents=st.booleans(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.integers(0, 20),
    tokens=st.sampled_from((0, 1, 2, 7, 16, 33, 65)),
    width=st.sampled_from((1, 3, 8, 16, 17, 40)),
    selected=st.none() | st.integers(0, 20),
    ragged=st.booleans(),
    shared=st.booleans(),
    by_head=st.booleans(),
    padding=st.none() | st.sampled_from(PADDINGS),
    values=st.sampled_from(
        ("normal", "equal", "sharp", "NaN query", "NaN key", "inf key", "-inf keys")
    ),
    head_reduce=st.sampled_from(("mean", "sum", "none")),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_input(
    backend, dtype, layout, batch, latents, kv_heads, group, queries, selected, **options
):
    if selected is None:
        options["ragged"] = options["shared"] = False
    else:
        options["selected"] = min(selected, queries)
    if options["by_head"] and options["head_reduce"] == "none":
        options["head_reduce"] = "sum"
    inputs = attention_inputs(
        dtype,
        batch=batch,
        query_batch=1 if latents else batch,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        queries=queries,
        **options,
    )
    assert_scores(backend, inputs, layout)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int16, torch.int8), ids=str)
def test_index_of_any_integer_type(backend, dtype):
    inputs = attention_inputs(batch=4, selected=3, ragged=True, by_head=True)
    narrow = inputs | {name: inputs[name].to(dtype) for name in ("query_index", "head_index")}
    assert_same(call(OP, backend.inputs(narrow)), call(OP, backend.inputs(inputs)))


@pytest.mark.parametrize("true", (2, 255))
@pytest.mark.parametrize("padding", ("left", "right", "scattered"))
def test_any_true(backend, padding, true):
    # True is any byte but 0, as after .view(torch.bool)
    inputs = backend.inputs(attention_inputs(tokens=40, padding=padding))
    expected = call(OP, inputs)
    odd = inputs["key_padding_mask"].to(torch.uint8).mul(true).view(torch.bool)
    assert torch.equal(call(OP, inputs | {"key_padding_mask": odd}), expected)


@pytest.mark.parametrize("scale", (1e30, -1e30, 1e-30, -0.5, 0.0))
def test_scale_beyond_the_range_of_queries(backend, scale):
    # logits are small, though query times scale would be infinite
    query = torch.tensor([[[[1e10, -2e9], [3e9, 1e10]]]], device=backend.device)
    key = 1e-38 * torch.tensor([[[[2, 1], [1, -1], [0, 2.5]]]], device=backend.device)
    inputs = {"query": query, "key": key * (100 if abs(scale) > 1 else 1), "scale": scale}
    assert_scores(backend, inputs)


def test_latents_given_once_are_the_expanded_ones(backend):
    inputs = backend.inputs(attention_inputs(query_batch=1, batch=3, selected=3))
    expanded = inputs | {"query": inputs["query"].expand(3, -1, -1, -1)}
    assert_same(call(OP, inputs), call(OP, expanded))


REPRODUCIBLE = (
    {},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"head_reduce": "none"},
    {"padding": "left"},
    {"by_head": True},
)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("options", REPRODUCIBLE, ids=str)
@pytest.mark.parametrize("batch, tokens", ((16, 300), (5, 4500), (1, 5001)))
def test_reproducible(backend, batch, tokens, options):
    inputs = attention_inputs(
        batch=batch, tokens=tokens, queries=20, selected=17, heads=3, **options
    )
    names, tensors = zip(*((k, x) for k, x in inputs.items() if k != "head_reduce"), strict=True)
    rest = {k: x for k, x in inputs.items() if k == "head_reduce"}

    def scores(*tensors):
        return sma_fast.attention_scores(**dict(zip(names, tensors, strict=True)), **rest)

    assert_reproducible(scores, *(x.to(backend.device) for x in tensors))


def test_no_gradient(backend):
    inputs = backend.inputs(attention_inputs())
    inputs["query"].requires_grad_(), inputs["key"].requires_grad_()
    assert not call(OP, inputs).requires_grad


OPCHECK = {  # layout and options
    "plain": ("packed", {}),
    "index": ("transposed", {"selected": 3, "ragged": True, "padding": "left", "batch": 3}),
    "heads apart": ("packed", {"kv_heads": 1, "query_batch": 1, "head_reduce": "none"}),
    "head of each query": ("transposed", {"selected": 3, "by_head": True}),
}


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(backend, name):
    layout, options = OPCHECK[name]
    inputs, _ = guarded(backend.inputs(attention_inputs(**options)), layout)
    optional = (inputs.get(k) for k in ("query_index", "head_index", "key_padding_mask"))
    torch.library.opcheck(
        torch.ops.sma_fast.attention_scores.default,
        (
            inputs["query"],
            inputs["key"],
            *optional,
            0.3,
            inputs.get("head_reduce", "mean"),
        ),
    )


@pytest.mark.parametrize("head_reduce", ("mean", "none"))
def test_compile(head_reduce):
    def scores(query, key, index, padding):
        return sma_fast.attention_scores(
            query, key, query_index=index, key_padding_mask=padding, head_reduce=head_reduce
        )

    inputs = [
        attention_inputs(batch=b, tokens=n, queries=m, selected=3, padding="left")
        for b, n, m in ((4, 12, 5), (6, 33, 7), (7, 100, 20))
    ]
    assert_compiles_once(scores, [tuple(x.values()) for x in inputs])


def test_compile_under_autocast():
    def scores(query, key):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sma_fast.attention_scores(query, key)

    inputs = [attention_inputs(tokens=n) for n in (12, 33)]
    assert_compiles_once(scores, [(x["query"], x["key"].bfloat16()) for x in inputs])


def test_autocast_rounds_nothing(backend):
    inputs = backend.inputs(attention_inputs(tokens=33))
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        inside = call(OP, inputs)
    assert_same(inside, call(OP, inputs))


@pytest.mark.parametrize("half", ("query", "key"))
def test_mixed_dtypes_meet_in_autocast(backend, half):
    inputs = backend.inputs(attention_inputs(tokens=33))
    mixed = inputs | {half: inputs[half].bfloat16()}
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        inside = call(OP, mixed)
    both = {name: x.bfloat16() for name, x in inputs.items()}
    assert_same(inside, call(OP, both))
    with pytest.raises(TypeError, match="^key: got torch"):
        call(OP, mixed)


def arguments(**changed):
    return {"query": torch.zeros(2, 4, 5, 8), "key": torch.zeros(2, 2, 6, 8)} | changed


INDEX = torch.zeros(2, 3, dtype=torch.int64)
PADDING = torch.zeros(2, 6, dtype=torch.bool)
BAD = {
    "query, not a tensor": ("query", TypeError, {"query": [[1.0]]}),
    "query, rank": ("query", ValueError, {"query": torch.zeros(2, 5, 8)}),
    "query, ints": ("query", TypeError, {"query": torch.zeros(2, 4, 5, 8).long()}),
    "query, batch": ("query", ValueError, {"query": torch.zeros(3, 4, 5, 8)}),
    "query, width": ("query", ValueError, {"query": torch.zeros(2, 4, 5, 7)}),
    "width 0": (
        "query",
        ValueError,
        {"query": torch.zeros(2, 4, 5, 0), "key": torch.zeros(2, 2, 6, 0)},
    ),
    "key, not a tensor": ("key", TypeError, {"key": None}),
    "key, rank": ("key", ValueError, {"key": torch.zeros(2, 2, 6, 8, 1)}),
    "key, ints": ("key", TypeError, {"key": torch.zeros(2, 2, 6, 8).int()}),
    "key, batch 1": ("query", ValueError, {"key": torch.zeros(1, 2, 6, 8)}),
    "key, heads not a divisor": ("key", ValueError, {"key": torch.zeros(2, 3, 6, 8)}),
    "key, more heads": ("key", ValueError, {"key": torch.zeros(2, 8, 6, 8)}),
    "key, no heads": ("key", ValueError, {"key": torch.zeros(2, 0, 6, 8)}),
    "query, no heads": ("key", ValueError, {"query": torch.zeros(2, 0, 5, 8)}),
    "key, dtype": ("key", TypeError, {"key": torch.zeros(2, 2, 6, 8).half()}),
    "key, device": ("key", ValueError, {"key": torch.zeros(2, 2, 6, 8, device="meta")}),
    "index, not a tensor": ("query_index", TypeError, {"query_index": [0, 1]}),
    "index, floats": ("query_index", TypeError, {"query_index": INDEX.float()}),
    "index, bool": ("query_index", TypeError, {"query_index": INDEX.bool()}),
    "index, rank 0": ("query_index", ValueError, {"query_index": INDEX[0, 0]}),
    "index, rank 3": ("query_index", ValueError, {"query_index": INDEX[None]}),
    "index, batch": ("query_index", ValueError, {"query_index": INDEX[:1]}),
    "R > M": ("query_index", ValueError, {"query_index": INDEX.repeat(1, 2)}),
    "R > M, for all rows": ("query_index", ValueError, {"query_index": INDEX.reshape(6)}),
    "index, device": ("query_index", ValueError, {"query_index": INDEX.to("meta")}),
    "head, not a tensor": ("head_index", TypeError, {"head_index": 0}),
    "head, floats": ("head_index", TypeError, {"head_index": torch.zeros(2, 5)}),
    "head, width M": ("head_index", ValueError, {"head_index": INDEX}),
    "head, width R": ("head_index", ValueError, {"query_index": INDEX, "head_index": INDEX[:, 1:]}),
    "head, rank": ("head_index", ValueError, {"query_index": INDEX, "head_index": INDEX[0]}),
    "head, device": (
        "head_index",
        ValueError,
        {"query_index": INDEX, "head_index": INDEX.to("meta")},
    ),
    "head with heads apart": (
        "head_index",
        ValueError,
        {"query_index": INDEX, "head_index": INDEX, "head_reduce": "none"},
    ),
    "padding, not a tensor": ("key_padding_mask", TypeError, {"key_padding_mask": [[True]]}),
    "padding, ints": ("key_padding_mask", TypeError, {"key_padding_mask": PADDING.int()}),
    "padding, floats": ("key_padding_mask", TypeError, {"key_padding_mask": PADDING.float()}),
    "padding, rank": ("key_padding_mask", ValueError, {"key_padding_mask": PADDING[0]}),
    "padding, batch": ("key_padding_mask", ValueError, {"key_padding_mask": PADDING[:1]}),
    "padding, tokens": ("key_padding_mask", ValueError, {"key_padding_mask": PADDING[:, 1:]}),
    "padding, device": ("key_padding_mask", ValueError, {"key_padding_mask": PADDING.to("meta")}),
    "scale, str": ("scale", TypeError, {"scale": "1"}),
    "scale, bool": ("scale", TypeError, {"scale": True}),
    "scale, tensor": ("scale", TypeError, {"scale": torch.tensor(1.0)}),
    "query, mkldnn": ("query", TypeError, {"query": torch.zeros(2, 4, 5, 8).to_mkldnn()}),
    "key, sparse": ("key", TypeError, {"key": torch.zeros(2, 2, 6, 8).to_sparse()}),
    "index, sparse": ("query_index", TypeError, {"query_index": INDEX.to_sparse()}),
    "padding, sparse": ("key_padding_mask", TypeError, {"key_padding_mask": PADDING.to_sparse()}),
    "scale, no float holds it": ("scale", ValueError, {"scale": 10**400}),
    "scale, nor prints it": ("scale", ValueError, {"scale": -(10**5000)}),
    "scale, -inf": ("scale", ValueError, {"scale": -math.inf}),
    "scale, inf": ("scale", ValueError, {"scale": math.inf}),
    "scale, NaN": ("scale", ValueError, {"scale": NAN}),
    "reduce, unknown": ("head_reduce", ValueError, {"head_reduce": "max"}),
    "reduce, random": ("head_reduce", ValueError, {"head_reduce": "random"}),
    "reduce, None": ("head_reduce", ValueError, {"head_reduce": None}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^{argument}(, key)?: .*allowed is"):
        sma_fast.attention_scores(**arguments(**changed))


@pytest.mark.parametrize("argument, bad", (("query_index", 5), ("query_index", -2)))
@pytest.mark.parametrize("shared", (False, True))
def test_query_out_of_range(backend, argument, bad, shared):
    index = INDEX.index_fill(1, torch.tensor(1), bad)
    inputs = arguments(query_index=index[0] if shared else index)
    with pytest.raises(ValueError, match=rf"^query_index: holds {bad}, allowed is -1 to 4"):
        call(OP, backend.inputs(inputs))


@pytest.mark.parametrize("bad", (4, -1))
def test_head_out_of_range(backend, bad):
    inputs = arguments(query_index=INDEX, head_index=INDEX.index_fill(1, torch.tensor(1), bad))
    with pytest.raises(ValueError, match=rf"^head_index: holds {bad}, allowed is 0 to 3"):
        call(OP, backend.inputs(inputs))


@pytest.mark.parametrize("bad", (2, -2, 2**40))
def test_unchecked_index_out_of_range_adds_nothing(unchecked_reference, bad):
    query, key = torch.tensor([[[ONE, OFF]] * 2]), torch.tensor([[logs(1, 3)] * 2])
    index, head = torch.tensor([[0, bad]]), torch.tensor([[bad, 0]])
    scores = sma_fast.attention_scores(query, key, query_index=index)
    torch.testing.assert_close(scores, torch.tensor([[0.25, 0.75]]))
    scores = sma_fast.attention_scores(query, key, head_index=head)
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.5]]))
    attention = torch.tensor([[[[0.25, 0.75], [0.5, 0.5]]] * 2])
    scores = sma_fast.aggregate_attention(attention, query_index=index)
    torch.testing.assert_close(scores, torch.tensor([[0.25, 0.75]]))


@pytest.mark.one_instruction_set
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.not_interpreted),
        pytest.param({"selected": 35, "padding": "scattered"}, marks=pytest.mark.not_interpreted),
        {"selected": 35, "ragged": True, "by_head": True, "padding": "one full row"},
        pytest.param(
            {"selected": 35, "kv_heads": 1, "head_reduce": "none"},
            marks=pytest.mark.not_interpreted,
        ),
        pytest.param({"query_batch": 1, "head_reduce": "sum"}, marks=pytest.mark.not_interpreted),
    ],
    ids=str,
)
def test_keys_too_long_to_be_held_at_once(backend, options):
    """Triton reads these twice, CUDA too before sm_90."""
    inputs = attention_inputs(queries=40, tokens=2100, width=16, **options)
    inputs = backend.inputs(inputs)
    expected = backend.expected(OP, inputs)
    torch.testing.assert_close(call(OP, inputs), expected, rtol=3e-5, atol=1e-6)


@pytest.mark.not_interpreted
@pytest.mark.one_instruction_set
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 9000, "head_reduce": "none"},
        {"tokens": 9000, "padding": "scattered"},
        {"tokens": 9000, "by_head": True},
        {"tokens": 9000, "by_head": True, "padding": "scattered", "values": "-inf keys"},
        {"queries": 5000, "tokens": 70},
        {"tokens": 300, "width": 600, "head_reduce": "none"},  # parts of rows in several chunks
    ],
    ids=str,
)
def test_sums_of_rows_in_turns(backend, options, monkeypatch):
    """On a GPU the sums of rows lie in scratch memory, which holds those of a few rows here."""
    monkeypatch.setattr(_native, "_SCRATCH", 20_000)
    inputs = backend.inputs(attention_inputs(**{"queries": 100, "heads": 3, "width": 8} | options))
    scores, expected = call(OP, inputs), backend.expected(OP, inputs)
    torch.testing.assert_close(scores, expected, rtol=3e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("scale", (0.3, 0.5, 0.7))
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_large_logits(backend, dtype, scale):
    """Of 1e9 and more: whatever the rounding, the largest has the exponent 0."""
    query = torch.full((1, 1, 1, 4), 6e4).to(dtype)
    key = torch.tensor([1.0, 0.5, -1.0, 0.25])[:, None].to(dtype) * query
    inputs = backend.inputs({"query": query, "key": key, "scale": scale})
    assert torch.equal(call(OP, inputs).cpu(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("tokens", (300, 8192))
def test_rows_of_large_and_small_logits(backend, tokens):
    """A row's attention adds up to 1 whatever the other rows of its tile are."""
    query, key = torch.zeros(1, 1, 16, 128), torch.zeros(1, 1, tokens, 128)
    query[..., 0] = torch.tensor([1.7e8] * 8 + [1.3e9] * 8)
    key[..., 0] = 1 + torch.rand(tokens) / 16
    inputs = backend.inputs({"query": query, "key": key, "scale": 1.0})
    torch.testing.assert_close(call(OP, inputs).sum().item(), 16.0, rtol=1e-4, atol=0)


@pytest.mark.one_instruction_set
@pytest.mark.parametrize(
    "query, largest, scale",
    (([0, 1], torch.finfo(torch.float32).max, 1.0), ([1, 0], 1e37, 0.0), ([1, 1], 1e37, -0.0)),
    ids=str,
)
def test_the_largest_keys(backend, query, largest, scale):
    """What is multiplied by 0, by the query or by the scale, is 0 however large it is."""
    query = torch.tensor([[[query]]], dtype=torch.float32)
    key = torch.tensor([[[[largest, 1.0], [1.0, 1.0], [-largest, 1.0], [0.0, 1.0]]]])
    inputs = backend.inputs({"query": query, "key": key, "scale": scale})
    torch.testing.assert_close(call(OP, inputs).cpu(), torch.full((1, 4), 0.25))


@pytest.mark.not_interpreted
@pytest.mark.one_instruction_set
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("shift", (-200.0, 40.0, 300.0))
@pytest.mark.parametrize("rows", ([0], [23, 24], [55], range(0, 60, 7), range(60)), ids=str)
@pytest.mark.parametrize("tokens", (90, 1300))
def test_rows_of_shifted_logits(backend, tokens, rows, shift, dtype):
    """Attention is the same where all logits of a row are larger or smaller by one number."""
    options = {"batch": 2, "queries": 60, "heads": 3, "kv_heads": 1, "padding": "right"}
    inputs = attention_inputs(tokens=tokens, dtype=dtype, scale=0.5, **options)
    inputs["query"][..., 0], inputs["key"][..., 0] = 0, 1
    expected = backend.expected(OP, backend.inputs(inputs))
    inputs["query"][:, 1:, list(rows), 0] = shift / 0.5
    inputs = backend.inputs(inputs)
    torch.testing.assert_close(call(OP, inputs), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.not_interpreted
@pytest.mark.one_instruction_set
@pytest.mark.parametrize(
    "logits, scale", (((15087354, 15087353), 12.33253288), ((2839.2, 2839), 1))
)
def test_rows_of_logits_about_a_power_of_two(backend, logits, scale):
    """The largest, which has a warp of its own, and the others may be rounded otherwise."""
    query, key = torch.zeros(1, 1, 16, 8), torch.zeros(1, 1, 9000, 8)
    query[..., :2] = 1
    key[..., 0] = logits[1] // 4096 * 4096  # which the tensor cores' numbers hold, as the rest
    key[..., 1] = logits[1] % 4096
    key[:, :, 5, 1] += logits[0] - logits[1]
    padding = torch.zeros(1, 9000, dtype=torch.bool)
    padding[:, :600] = True
    padding[:, 5] = False
    inputs = {"query": query, "key": key, "key_padding_mask": padding, "scale": scale}
    total = call(OP, backend.inputs(inputs)).sum().item()
    torch.testing.assert_close(total, 16.0, rtol=1e-3, atol=0)


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("width", (20, 72, 130, 600))
def test_wide_heads(backend, width, dtype):
    options = {"queries": 5, "tokens": 70, "padding": "scattered", "ragged": True}
    inputs = backend.inputs(attention_inputs(width=width, dtype=dtype, **options))
    expected = backend.expected(OP, inputs)
    torch.testing.assert_close(call(OP, inputs), expected, rtol=3e-5, atol=1e-6)
