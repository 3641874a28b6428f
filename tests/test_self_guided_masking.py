"""self_guided_masking: scores, selection and gathered tokens in one pass."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sma_fast
from sma_fast import _native, reference
from sma_fast.testing import (
    CASES,
    DTYPES,
    LAYOUTS,
    NATIVE_DTYPES,
    PADDINGS,
    assert_close,
    assert_compiles_once,
    assert_consistent,
    assert_gradients,
    assert_reproducible,
    assert_same,
    assert_same_selection,
    assert_selection_up_to_near_ties,
    call,
    chi_square,
    guarded,
    guided_inputs,
    plain_attention_scores,
)

OP = "self_guided_masking"


def logs(*weights: float) -> list[list[float]]:
    """Returns keys of width 1 whose softmax under query 1 is `weights` over their sum."""
    return [[math.log(w)] for w in weights]


# query (M, 1) and key (N, 1) of one head, options -> scores, ids_masked, ids_visible; the tokens
# are their own numbers plus 10
LITERALS = {
    "the key of most attention": (
        [[1.0], [0.0]],
        logs(1, 2, 4, 1),
        {"query_index": [0], "mask_ratio": 0.25},
        ([0.125, 0.25, 0.5, 0.125], [2], [0, 1, 3]),
    ),
    "two queries": (
        [[1.0], [-1.0]],
        logs(1, 2, 4, 4),  # 4/2/1/1 of 8 for the second
        {"query_index": [0, 1], "mask_ratio": 0.5},
        ([1 / 11 + 4 / 8, 2 / 11 + 2 / 8, 4 / 11 + 1 / 8, 4 / 11 + 1 / 8], [0, 2], [1, 3]),
    ),
    "-1 selects nothing": (
        [[1.0], [-1.0]],
        logs(1, 1, 2, 4),
        {"query_index": [0, -1], "mask_ratio": 0.25},
        ([0.125, 0.125, 0.25, 0.5], [3], [0, 1, 2]),
    ),
    "no query: all ties": (
        [[1.0]],
        logs(1, 2, 3, 4),
        {"query_index": [-1], "mask_ratio": 0.5},
        ([0.0, 0.0, 0.0, 0.0], [0, 1], [2, 3]),
    ),
    "padding": (
        [[1.0]],
        logs(1, 3, 99, 4),
        {
            "query_index": [0],
            "mask_ratio": 0.5,
            "key_padding_mask": [False, False, True, False],
        },
        ([0.125, 0.375, 0.0, 0.5], [1, 3], [0, -1]),  # round(1.5) = 2 of 3
    ),
    "masked queries first": (
        [[1.0], [0.0], [1.0], [0.0]],
        logs(1, 1, 2, 4),
        {"query_index": [0], "mask_ratio": 0.5, "mask_queries": True},
        ([0.125, 0.125, 0.25, 0.5], [0, 3], [1, 2]),
    ),
    "masked queries before scores above 1": (
        [[1.0], [1.0], [1.0], [1.0]],
        logs(1, 1, 2, 12),
        {"query_index": [0, 1], "mask_ratio": 0.5, "mask_queries": True},
        ([0.125, 0.125, 0.25, 1.5], [0, 1], [2, 3]),
    ),
    "more masked queries than K": (
        [[0.0], [0.0], [0.0], [0.0]],
        logs(1, 2, 3, 4),
        {"query_index": [1, 2, 3], "mask_ratio": 0.5, "mask_queries": True},
        ([0.75, 0.75, 0.75, 0.75], [1, 2], [0, 3]),
    ),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    query, key, options, (scores, masked, visible) = LITERALS[name]
    inputs = {"query": torch.tensor(query)[None, None], "key": torch.tensor(key)[None, None]}
    inputs["tokens"] = [torch.arange(10.0, 10.0 + len(key))[None]]
    for argument, x in options.items():
        inputs[argument] = torch.tensor([x]) if isinstance(x, list) else x
    result = call(OP, backend.inputs(inputs))
    torch.testing.assert_close(result.scores.cpu(), torch.tensor([scores]), rtol=1e-6, atol=1e-7)
    assert result.selection.ids_masked.tolist() == [masked]
    assert result.selection.ids_visible.tolist() == [visible]
    assert result.visible[0].tolist() == [[0.0 if j < 0 else 10.0 + j for j in visible]]


def assert_result(backend, inputs: dict, layout: str = "packed") -> None:
    """Asserts scores by tolerance, and everything that follows from the scores bit for bit."""
    inputs, assert_unchanged = guarded(backend.inputs(inputs), layout)
    if backend.refuses(OP, inputs):
        return
    expected = backend.expected(OP, inputs)
    result = call(OP, inputs)
    query, key, tokens, query_index, head_index, padding, noise, ratio, scale, reduce, *rest = (
        backend.arguments[OP]
    )
    mask_queries, random_fraction, pool_ratio = rest
    assert torch.equal(result.query_index, expected.query_index)
    assert torch.equal(result.query_index, query_index) and result.head_index is head_index

    scores_of = (query, key, query_index, head_index, padding, scale, reduce)
    exact = plain_attention_scores(*scores_of, dtype=torch.float64)
    plain = plain_attention_scores(*scores_of, dtype=torch.float32)
    bound = assert_close(result.scores, exact, plain)

    wanted = result.scores.clone()
    if mask_queries:
        for b, row in enumerate(query_index.tolist()):
            wanted[b, [j for j in row if j >= 0]] = math.inf
    with sma_fast.use_backend("reference"):
        own = sma_fast.TokenSelection(
            *reference.select_tokens(
                wanted, padding, noise, ratio, None, None, None, random_fraction, pool_ratio
            )
        )
        visible = [sma_fast.gather_tokens(x, own.ids_visible) for x in tokens]
    assert_same_selection(result.selection, own)
    assert_consistent(result.selection, padding)
    assert_same(result.visible, tuple(visible))
    if random_fraction == 0 and pool_ratio is None:
        wanted = torch.where(wanted == math.inf, wanted, exact)
        assert_selection_up_to_near_ties(result.selection, expected.selection, wanted, bound)
    assert_unchanged()


@pytest.mark.parametrize(
    "case, dtype",
    [pytest.param(case, dtype, id=f"{case}-{dtype}") for case in CASES[OP] for dtype in DTYPES],
)
def test_cases(backend, case, dtype):
    assert_result(backend, case.build(dtype))


LARGE = {  # outputs of more than 8 MiB; rows of attention of more than 16; all threads on a sample
    "tokens": {"tokens": 3600, "trailing": (511,), "selected": 3, "padding": "scattered"},
    "rows": {
        **{"batch": 1, "heads": 8, "kv_heads": 1, "tokens": 9000, "width": 4},
        **{"queries": 64, "num_queries": 64},
    },
    "another number of rows in each head": {
        **{"batch": 1, "heads": 8, "tokens": 9000, "queries": 40, "num_queries": 30},
        **{"head_reduce": "random"},
    },
    # in float32, what a cluster of 16 blocks holds of a GPU
    "wide keys": {"batch": 1, "heads": 1, "tokens": 8192, "width": 64, "selected": 3},
    "few samples, many keys": {"batch": 5, "tokens": 4500, "num_queries": 3, "many": True},
}


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large(backend, four_threads, name, dtype):
    assert_result(backend, guided_inputs(dtype, **LARGE[name]))


@pytest.mark.not_interpreted
@given(
    batch=st.integers(0, 3),
    latents=st.booleans(),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(0, 20),
    tokens=st.sampled_from((0, 1, 2, 7, 16, 33, 65)),
    width=st.sampled_from((1, 3, 8, 16, 17)),
    number=st.integers(0, 20),
    given_index=st.booleans(),
    ragged=st.booleans(),
    padding=st.none() | st.sampled_from(PADDINGS),
    query_padding=st.none() | st.sampled_from(PADDINGS),
    values=st.sampled_from(("normal", "equal", "sharp", "NaN key")),
    head_reduce=st.sampled_from(("mean", "sum", "random")),
    mask_queries=st.booleans(),
    mask_ratio=st.floats(0, 1),
    share=st.sampled_from((None, "random", "pool")),
    second=st.floats(0, 1),
    many=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_input(
    backend, dtype, layout, latents, kv_heads, group, number, given_index, share, second, **options
):
    if options["mask_queries"]:
        options["queries"] = options["tokens"]
    number = min(number, options["queries"])
    if given_index:
        options["selected"] = number
        options["query_padding"] = None
    else:
        options["num_queries"] = number
        options["ragged"] = False
    if share == "random":
        options["random_fraction"] = second
    elif share == "pool":
        options["pool_ratio"] = max(options["mask_ratio"], second)
    options |= {"heads": kv_heads * group, "kv_heads": kv_heads}
    options["query_batch"] = 1 if latents else options["batch"]
    assert_result(backend, guided_inputs(dtype, **options), layout)


@pytest.mark.parametrize("options", ({}, {"padding": "left", "random_fraction": 0.5}), ids=str)
def test_is_the_three_ops_in_a_row(backend, options):
    # near ties aside, which these inputs do not have
    inputs = backend.inputs(guided_inputs(tokens=63, selected=3, **options))
    result = call(OP, inputs)
    padding = inputs.get("key_padding_mask")
    with sma_fast.use_backend("reference"):
        scores = sma_fast.attention_scores(
            inputs["query"],
            inputs["key"],
            query_index=inputs["query_index"],
            key_padding_mask=padding,
        )
        selection = sma_fast.select_tokens(
            scores,
            mask_ratio=inputs["mask_ratio"],
            key_padding_mask=padding,
            random_fraction=inputs["random_fraction"],
            noise=backend.arguments[OP][6],
        )
        visible = sma_fast.gather_tokens(inputs["tokens"][0], selection.ids_visible)
    torch.testing.assert_close(result.scores, scores)
    assert_same_selection(result.selection, selection)
    assert_same(result.visible, (visible,))


def test_any_number_of_tokens(backend):
    inputs = backend.inputs(guided_inputs(num_queries=2))
    assert call(OP, inputs | {"tokens": []}).visible == ()
    twice = call(OP, inputs | {"tokens": inputs["tokens"] * 2}).visible
    assert_same(twice[0], twice[1])


def test_masked_queries_take_the_keys_padding(backend):
    # drawn only among the valid tokens, and all of them masked
    inputs = guided_inputs(
        batch=5, queries=12, num_queries=3, padding="left", mask_queries=True, mask_ratio=1.0
    )
    result = call(OP, backend.inputs(inputs))
    drawn, padding = result.query_index, inputs["key_padding_mask"].to(backend.device)
    inside = drawn >= 0
    assert bool((inside.sum(dim=1) == (~padding).sum(dim=1).clamp(max=3)).all())
    assert not bool((padding.gather(1, drawn.clamp(min=0)) & inside).any())
    assert bool((result.selection.mask.gather(1, drawn.clamp(min=0)) | ~inside).all())


WIDE_HEADS = [
    *((torch.float32, 512, 100), (torch.float32, 400, 120), (torch.float32, 800, 40)),
    *((torch.bfloat16, 1024, 100), (torch.bfloat16, 4000, 0)),
]
MANY_QUERIES = {"batch": 2, "heads": 1, "queries": 4200, "selected": 4200, "width": 4}
GRADIENTS = [
    pytest.param(c, marks=pytest.mark.not_interpreted if c.name == "long" else (), id=str(c))
    for c in CASES[OP]
    if "values" not in c.options
]


@pytest.mark.not_interpreted
@pytest.mark.one_instruction_set
@pytest.mark.parametrize("queries", (8, 9, 30))
@pytest.mark.parametrize("dtype, width, tokens", WIDE_HEADS, ids=str)
def test_wide_heads(backend, dtype, width, tokens, queries):
    """Of few tokens: a GPU's blocks that share them have few warps each."""
    options = {"queries": queries, "selected": queries, "tokens": tokens, "width": width}
    inputs = backend.inputs(guided_inputs(dtype, **options))
    expected = backend.expected(OP, inputs)
    try:
        found = call(OP, inputs)
    except RuntimeError as error:
        said = "too wide for this GPU's shared memory" in str(error)
        if not said or width * dtype.itemsize <= _native._WIDE_HEAD:
            raise
        pytest.skip(str(error))
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.not_interpreted
@pytest.mark.one_instruction_set
@pytest.mark.parametrize("tokens", (0, 30))
def test_more_queries_than_a_block_lists(backend, tokens):
    inputs = backend.inputs(guided_inputs(**MANY_QUERIES, tokens=tokens))
    found, expected = call(OP, inputs), backend.expected(OP, inputs)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    assert found.visible[0].shape == expected.visible[0].shape


@pytest.mark.needs("gather_tokens_backward", "gather_tokens")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(backend, case, dtype):
    inputs = backend.inputs(case.build(dtype))
    leaves = [x for x in inputs["tokens"] if x.dtype in NATIVE_DTYPES]
    ids = call(OP, inputs).selection.ids_visible
    assert_gradients(
        lambda *tokens: list(call(OP, inputs | {"tokens": list(tokens)}).visible),
        leaves,
        oracle=lambda *tokens: [sma_fast.gather_tokens(x, ids) for x in tokens],
    )
    assert backend.ran["gather_tokens_backward"] > 0


@pytest.mark.parametrize("options", ({"padding": "left"}, {"random_fraction": 0.5}), ids=str)
def test_gradcheck(options):
    inputs = guided_inputs(torch.float64, tokens=5, num_queries=2, trailing=(2,), **options)
    other = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def visible(*tokens):
        return call(OP, inputs | {"tokens": [*tokens, torch.arange(10).reshape(2, 5)]}).visible[:2]

    leaves = (inputs["tokens"][0].requires_grad_(), other)
    assert torch.autograd.gradcheck(visible, leaves)
    assert torch.autograd.gradgradcheck(visible, leaves)


@pytest.mark.needs("gather_tokens_backward")
def test_only_the_tokens_carry_gradients(backend):
    inputs = backend.inputs(guided_inputs(many=True, num_queries=2))
    for x in (inputs["query"], inputs["key"], inputs["tokens"][0]):
        x.requires_grad_()
    result = call(OP, inputs)
    assert not result.scores.requires_grad
    assert not any(x.requires_grad for x in result.selection)
    assert [x.requires_grad for x in result.visible][0]
    result.visible[0].sum().backward()
    assert inputs["query"].grad is None and inputs["key"].grad is None
    seen = (~result.selection.mask)[:, :, None].expand_as(inputs["tokens"][0])
    assert torch.equal(inputs["tokens"][0].grad, seen.to(inputs["tokens"][0].dtype))


REPRODUCIBLE = {
    "plain": {},
    "padding": {"padding": "left"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "masked queries": {"queries": 4500, "mask_queries": True},
}


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", REPRODUCIBLE)
@pytest.mark.parametrize("batch", (1, 5))
def test_reproducible(backend, batch, name):
    options = {"queries": 20, "tokens": 4500, "selected": 17, "heads": 3} | REPRODUCIBLE[name]
    inputs = backend.inputs(guided_inputs(batch=batch, **options))
    inputs.setdefault("key_padding_mask", torch.zeros_like(inputs["key"][:, 0, :, 0]).bool())

    def run(query, key, tokens, index, padding, noise):
        return torch.ops.sma_fast.self_guided_masking(
            query, key, [tokens], index, None, padding, noise, 0.3, 0.35, "mean",
            inputs["mask_queries"], 0.5, None,
        )  # fmt: skip

    noise = torch.rand(batch, 4500, generator=torch.Generator().manual_seed(1))
    assert_reproducible(
        run,
        inputs["query"],
        inputs["key"],
        inputs["tokens"][0],
        inputs["query_index"],
        inputs["key_padding_mask"],
        noise.to(backend.device),
    )


def test_seeds(backend):
    inputs = backend.inputs(
        guided_inputs(tokens=63, num_queries=2, random_fraction=0.5, head_reduce="random")
    )
    assert_same(call(OP, inputs), call(OP, inputs))
    assert not torch.equal(
        call(OP, inputs).selection.mask, call(OP, inputs | {"seed": 1}).selection.mask
    )
    torch.manual_seed(4)
    del inputs["seed"]
    first, second = call(OP, inputs), call(OP, inputs)
    assert_same(first, call(OP, inputs | {"seed": 4}))
    assert not torch.equal(first.selection.mask, second.selection.mask)


def test_random_heads_are_uniform():
    inputs = guided_inputs(
        batch=1000, heads=6, queries=3, num_queries=3, tokens=2, width=1, head_reduce="random"
    )
    result = call(OP, inputs)
    assert result.head_index.shape == (1000, 3)
    counts = torch.bincount(result.head_index.flatten(), minlength=6)
    assert chi_square(counts, 3000) < 20.5  # 5 degrees of freedom, p = .001


OPCHECK = {  # layout and options
    "plain": ("packed", {}),
    "many tokens": ("transposed", {"many": True, "padding": "left"}),
    "random share": ("packed", {"random_fraction": 0.5, "by_head": True}),
    "masked queries": ("transposed", {"queries": 12, "mask_queries": True, "query_batch": 1}),
}


@pytest.mark.one_instruction_set
@pytest.mark.needs("gather_tokens_backward")
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(backend, name):
    layout, options = OPCHECK[name]
    inputs = guided_inputs(selected=3, **options)
    inputs["noise"] = torch.rand(2, 12)
    inputs, _ = guarded(backend.inputs(inputs), layout)
    optional = [inputs.get(k) for k in ("query_index", "head_index", "key_padding_mask", "noise")]
    rest = [0.4, 0.35, "mean", inputs["mask_queries"], inputs["random_fraction"], None]
    op = torch.ops.sma_fast.self_guided_masking.default
    arguments = (inputs["query"], inputs["key"], inputs["tokens"], *optional, *rest)
    torch.library.opcheck(op, arguments)
    inputs["tokens"][0].requires_grad_()
    torch.library.opcheck(op, arguments)


COMPILED = {
    "drawn": {},
    "random heads and share": {"head_reduce": "random", "random_fraction": 0.5},
    "pool, masked queries": {"pool_ratio": 0.8, "mask_queries": True},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name):
    def mask(query, key, tokens, other):
        return sma_fast.self_guided_masking(
            query, key, tokens, other, mask_ratio=0.4, num_queries=3, **COMPILED[name]
        )

    arguments = []
    for b, n in ((4, 12), (6, 33), (7, 100)):
        inputs = guided_inputs(batch=b, queries=n, tokens=n, selected=3)
        tokens = inputs["tokens"][0].requires_grad_()
        arguments.append((inputs["query"], inputs["key"], tokens, torch.ones(b, n).bool()))
    assert_compiles_once(mask, arguments)


@pytest.mark.parametrize("half", ("query", "key"))
def test_mixed_dtypes_meet_in_autocast(backend, half):
    inputs = backend.inputs(guided_inputs(tokens=33, num_queries=3))
    mixed = inputs | {half: inputs[half].bfloat16()}
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        inside = call(OP, mixed)
    both = {name: inputs[name].bfloat16() for name in ("query", "key")}
    assert_same(inside, call(OP, inputs | both))
    with pytest.raises(TypeError, match="^key: got torch"):
        call(OP, mixed)


def arguments(**changed):
    return {
        "query": torch.zeros(2, 4, 6, 8),
        "key": torch.zeros(2, 2, 6, 8),
        "tokens": [torch.zeros(2, 6, 3)],
        "mask_ratio": 0.5,
        "num_queries": 2,
    } | changed


INDEX = torch.zeros(2, 3, dtype=torch.int64)
PADDING = torch.zeros(2, 6, dtype=torch.bool)
GIVEN = {"num_queries": None, "query_index": INDEX}
NAN = math.nan
BAD = {
    "query, not a tensor": ("query", TypeError, {"query": None}),
    "query, rank": ("query", ValueError, {"query": torch.zeros(2, 6, 8)}),
    "query, batch": ("query", ValueError, {"query": torch.zeros(3, 4, 6, 8)}),
    "query, width": ("query", ValueError, {"query": torch.zeros(2, 4, 6, 7)}),
    "key, ints": ("key", TypeError, {"key": torch.zeros(2, 2, 6, 8).long()}),
    "key, heads": ("key", ValueError, {"key": torch.zeros(2, 3, 6, 8)}),
    "key, dtype": ("key", TypeError, {"key": torch.zeros(2, 2, 6, 8).bfloat16()}),
    "key, device": ("key", ValueError, {"key": torch.zeros(2, 2, 6, 8, device="meta")}),
    "tokens, not a tensor": (r"tokens\[0\]", TypeError, {"tokens": [[1.0]]}),
    "tokens, rank": (r"tokens\[0\]", ValueError, {"tokens": [torch.zeros(2)]}),
    "tokens, batch": (r"tokens\[0\]", ValueError, {"tokens": [torch.zeros(1, 6, 3)]}),
    "tokens, number": (
        r"tokens\[1\]",
        ValueError,
        {"tokens": [torch.zeros(2, 6), torch.zeros(2, 5)]},
    ),
    "tokens, device": (r"tokens\[0\]", ValueError, {"tokens": [torch.zeros(2, 6, device="meta")]}),
    "ratio, below 0": ("mask_ratio", ValueError, {"mask_ratio": -0.1}),
    "ratio, above 1": ("mask_ratio", ValueError, {"mask_ratio": 1.1}),
    "ratio, NaN": ("mask_ratio", ValueError, {"mask_ratio": NAN}),
    "ratio, bool": ("mask_ratio", TypeError, {"mask_ratio": True}),
    "ratio, None": ("mask_ratio", TypeError, {"mask_ratio": None}),
    "queries, neither": ("num_queries, query_index", ValueError, {"num_queries": None}),
    "queries, both": ("num_queries, query_index", ValueError, {"query_index": INDEX}),
    "R > M": ("num_queries", ValueError, {"num_queries": 7}),
    "number, negative": ("num_queries", ValueError, {"num_queries": -1}),
    "number, float": ("num_queries", TypeError, {"num_queries": 2.0}),
    "number, bool": ("num_queries", TypeError, {"num_queries": True}),
    "rows, floats": ("num_queries", TypeError, {"num_queries": torch.ones(2)}),
    "rows, batch": ("num_queries", ValueError, {"num_queries": torch.ones(3).long()}),
    "rows, device": ("num_queries", ValueError, {"num_queries": INDEX[:, 0].to("meta")}),
    "index, floats": ("query_index", TypeError, GIVEN | {"query_index": INDEX.float()}),
    "index, batch": ("query_index", ValueError, GIVEN | {"query_index": INDEX[:1]}),
    "index, R > M": ("query_index", ValueError, GIVEN | {"query_index": INDEX.repeat(1, 3)}),
    "index, device": ("query_index", ValueError, GIVEN | {"query_index": INDEX.to("meta")}),
    "head, width": ("head_index", ValueError, GIVEN | {"head_index": INDEX[:, :2]}),
    "head, floats": ("head_index", TypeError, GIVEN | {"head_index": INDEX.float()}),
    "head, beside random": (
        "head_index",
        ValueError,
        GIVEN | {"head_index": INDEX, "head_reduce": "random"},
    ),
    "reduce, unknown": ("head_reduce", ValueError, {"head_reduce": "max"}),
    "reduce, none": ("head_reduce", ValueError, {"head_reduce": "none"}),
    "padding, ints": ("key_padding_mask", TypeError, {"key_padding_mask": PADDING.int()}),
    "padding, shape": ("key_padding_mask", ValueError, {"key_padding_mask": PADDING[:, 1:]}),
    "padding, device": ("key_padding_mask", ValueError, {"key_padding_mask": PADDING.to("meta")}),
    "query padding, ints": ("query_padding_mask", TypeError, {"query_padding_mask": INDEX}),
    "query padding, shape": (
        "query_padding_mask",
        ValueError,
        {"query_padding_mask": PADDING[:, 1:]},
    ),
    "query padding beside an index": (
        "query_padding_mask",
        ValueError,
        GIVEN | {"query_padding_mask": PADDING},
    ),
    "tokens, sparse": (r"tokens\[0\]", TypeError, {"tokens": [torch.zeros(2, 6).to_sparse()]}),
    "mask_queries, an int": ("mask_queries", TypeError, {"mask_queries": 1}),
    "mask_queries, cross-attention": (
        "mask_queries",
        ValueError,
        {"mask_queries": True, "query": torch.zeros(2, 4, 5, 8)},
    ),
    "share, above 1": ("random_fraction", ValueError, {"random_fraction": 1.5}),
    "share, NaN": ("random_fraction", ValueError, {"random_fraction": NAN}),
    "pool, below the ratio": ("pool_ratio", ValueError, {"pool_ratio": 0.4}),
    "share and pool": (
        "random_fraction, pool_ratio",
        ValueError,
        {"random_fraction": 0.5, "pool_ratio": 0.7},
    ),
    "scale, NaN": ("scale", ValueError, {"scale": NAN}),
    "scale, no float holds it": ("scale", ValueError, {"scale": 10**400}),
    "scale, str": ("scale", TypeError, {"scale": "1"}),
    "generator, nothing drawn": ("generator", TypeError, GIVEN | {"generator": 3}),
    "generator": ("generator", TypeError, {"generator": 3}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^{argument}(, key)?: .*allowed "):
        call(OP, arguments(**changed))


@pytest.mark.parametrize("bad", (6, -2))
def test_query_out_of_range(backend, bad):
    index = INDEX.index_fill(1, torch.tensor(1), bad)
    with pytest.raises(ValueError, match=rf"^query_index: holds {bad}, allowed is -1 to 5"):
        call(OP, backend.inputs(arguments(num_queries=None, query_index=index)))


@pytest.mark.parametrize("bad", (4, -1))
def test_head_out_of_range(backend, bad):
    index = INDEX.index_fill(1, torch.tensor(1), bad)
    with pytest.raises(ValueError, match=rf"^head_index: holds {bad}, allowed is 0 to 3"):
        call(OP, backend.inputs(arguments(**GIVEN, head_index=index)))


@pytest.mark.needs("draw_queries")
def test_negative_number_of_a_row(backend):
    rows = torch.tensor([1, -3])
    with pytest.raises(ValueError, match="^num_queries: holds -3, allowed is at least 0"):
        call(OP, backend.inputs(arguments(num_queries=rows)))


def test_more_tokens_than_one_native_call_takes(backend):
    tokens = [torch.randn(2, 9, 3) for _ in range(18)]
    inputs = backend.inputs({"query": torch.randn(1, 1, 4, 8), "key": torch.randn(2, 1, 9, 8)})
    tokens = [x.to(inputs["key"].device) for x in tokens]
    out = sma_fast.self_guided_masking(*inputs.values(), *tokens, mask_ratio=0.3, num_queries=2)
    assert len(out.visible) == 18
    for x, visible in zip(tokens, out.visible, strict=True):
        assert torch.equal(visible, sma_fast.gather_tokens(x, out.selection.ids_visible))


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("share", [{}, {"random_fraction": 0.5}])
def test_drawn_tokens_of_long_rows_are_masked_first(backend, share):
    """Rows too long for a GPU's registers, where a kernel of its own selects."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 1, 4500, 8, generator=generator)
    index = torch.tensor([[4, 2048, 4499], [7, 8, -1]])
    inputs = backend.inputs({"query": keys, "key": keys, "query_index": index})
    masking = sma_fast.self_guided_masking(**inputs, **share, mask_ratio=0.01, mask_queries=True)
    mask = masking.selection.mask.cpu()
    assert mask.sum(1).tolist() == [45, 45]
    drawn = [mask[row, index[row][index[row] >= 0]] for row in range(2)]
    assert all(bool(part.all()) for part in drawn)
