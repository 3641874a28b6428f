"""gather_tokens: rows by id, -1 gives zeros."""

import math
import warnings

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
    assert_close,
    assert_compiles_once,
    assert_gradients,
    assert_reproducible,
    assert_same,
    call,
    gather_inputs,
    guarded,
    make_scores,
)

OP = "gather_tokens"
OPCHECK = ((torch.float32, "packed"), (torch.bfloat16, "transposed"))
LARGE = ((torch.float32, 512), (torch.float32, 511), (torch.bfloat16, 1023), (torch.float64, 256))
OTHER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64)

LITERALS = {  # tokens, ids, answer
    "rows of a matrix": (
        [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]],
        [[2, 0]],
        [[[5.0, 6.0], [1.0, 2.0]]],
    ),
    "-1 gives zeros": ([[[1.0], [3.0]]], [[-1, 1, -1]], [[[0.0], [3.0], [0.0]]]),
    "-1 beside inf gives zeros": ([[[math.inf], [3.0]]], [[-1, 1]], [[[0.0], [3.0]]]),
    "each row by its own ids": ([[1.0, 2.0], [3.0, 4.0]], [[1], [0]], [[2.0], [3.0]]),
    "one id many times": ([[7.0, 8.0]], [[1, 1, 1]], [[8.0, 8.0, 8.0]]),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    tokens, ids, answer = (torch.tensor(x, device=backend.device) for x in LITERALS[name])
    assert_same(sma_fast.gather_tokens(tokens, ids), answer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases(backend, case, dtype):
    backend.assert_same_as_oracle(OP, case.build(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_other_dtypes(backend, dtype, layout):
    backend.assert_same_as_oracle(OP, gather_inputs(dtype, trailing=(3, 2)), layout)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype, width", LARGE)
def test_large(backend, four_threads, dtype, width):
    # an output of more than 8 MiB may be written past them
    inputs = gather_inputs(dtype, batch=2, tokens=2200, visible=2200, trailing=(width,))
    backend.assert_same_as_oracle(OP, inputs)


@pytest.mark.not_interpreted
@given(
    batch=st.integers(0, 4),
    tokens=st.sampled_from((0, 1, 2, 7, 33, 65)),
    visible=st.integers(0, 20),
    trailing=st.lists(st.integers(0, 9), max_size=3),
    ids=st.sampled_from(("any", "ascending", "nothing")),
    values=st.sampled_from(("normal", "special", "denormals")),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_input(backend, layout, dtype, **options):
    backend.assert_same_as_oracle(OP, gather_inputs(dtype, **options), layout)


GRADIENTS = [
    pytest.param(c, marks=pytest.mark.not_interpreted if c.name == "long" else (), id=str(c))
    for c in CASES[OP]
    if "values" not in c.options
]


@pytest.mark.needs("gather_tokens_backward")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(backend, case, dtype):
    inputs = backend.inputs(case.build(dtype))
    assert_gradients(lambda x: [sma_fast.gather_tokens(x, inputs["ids"])], [inputs["tokens"]])
    assert backend.ran["gather_tokens_backward"] > 0


@pytest.mark.needs("gather_tokens_backward")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_gradients_of_any_layout(backend, dtype, layout):
    inputs = backend.inputs(gather_inputs(dtype, visible=40, trailing=(3, 2)))
    function, tokens = sma_fast.gather_tokens, inputs["tokens"]
    assert_gradients(lambda x: [function(x, inputs["ids"])], [tokens], layout)


@pytest.mark.not_interpreted
@pytest.mark.needs("gather_tokens_backward")
@pytest.mark.parametrize("dtype, width", LARGE)
def test_large_backward(backend, four_threads, dtype, width):
    inputs = gather_inputs(dtype, batch=2, tokens=2200, visible=2200, trailing=(width,))
    grad, ids = backend.inputs(inputs).values()
    backward = torch.ops.sma_fast.gather_tokens_backward
    actual = backward(grad, ids, 2200)
    with sma_fast.use_backend("reference"):
        plain, exact = backward(grad, ids, 2200), backward(grad.double(), ids, 2200)
    assert_close(actual, exact, plain)


@pytest.mark.not_interpreted
@pytest.mark.needs("gather_tokens_backward")
@pytest.mark.parametrize("dtype, width", (*LARGE, (torch.float16, 1), (torch.float64, 3)), ids=str)
def test_backward_of_tokens_with_several_ids(backend, dtype, width):
    """A few of many, which on a GPU several blocks have parts of."""
    ids = torch.arange(2900).repeat(2, 1)
    ids[0, 1000:1003] = 7
    ids[1, 2899], ids[1, 11] = 2000, -1
    grad = make_scores("normal", (2, 2900, width), dtype)
    ids, grad = ids.to(backend.device), grad.to(backend.device)
    backward = torch.ops.sma_fast.gather_tokens_backward
    actual = backward(grad, ids, 2901)
    with sma_fast.use_backend("reference"):
        plain, exact = backward(grad, ids, 2901), backward(grad.double(), ids, 2901)
    assert_close(actual, exact, plain)


@pytest.mark.parametrize("trailing", ((), (2,), (2, 3)), ids=str)
def test_gradcheck(trailing):
    inputs = gather_inputs(torch.float64, batch=2, tokens=4, visible=5, trailing=trailing)
    tokens = inputs["tokens"].requires_grad_()
    arguments = (sma_fast.gather_tokens, (tokens, inputs["ids"]))
    assert torch.autograd.gradcheck(*arguments)
    assert torch.autograd.gradgradcheck(*arguments)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("batch, tokens", ((5, 700), (1, 5001)))
def test_reproducible(backend, batch, tokens):
    # wide enough for two threads
    inputs = gather_inputs(batch=batch, tokens=tokens, visible=tokens // 2, trailing=(40,))
    inputs = backend.inputs(inputs)
    assert_reproducible(sma_fast.gather_tokens, inputs["tokens"], inputs["ids"])


@pytest.mark.not_interpreted
def test_large_outputs_are_not_used_again_while_alive(backend):
    # freed outputs of 1 MiB and more may be handed out again, but not in deterministic mode
    torch.use_deterministic_algorithms(False)
    inputs = backend.inputs(gather_inputs(tokens=1500, visible=1500, trailing=(64,)))
    other = inputs | {"tokens": inputs["tokens"] + 1}
    expected = backend.expected(OP, inputs), backend.expected(OP, other)
    first = call(OP, inputs)
    for _ in range(3):
        assert_same(call(OP, other), expected[1])  # freed at once
    assert_same(first, expected[0])
    row = first[1]  # a view keeps it alive
    del first
    assert_same(call(OP, other), expected[1])
    assert_same(row, expected[0][1])


@pytest.mark.not_interpreted
@pytest.mark.needs("gather_tokens_backward")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_backward_reproducible(backend, dtype):
    inputs = gather_inputs(dtype, batch=5, tokens=90, visible=700, trailing=(80,))  # repeated ids
    inputs = backend.inputs(inputs)
    ids, grad = inputs["ids"], inputs["tokens"].repeat(1, 8, 1)[:, :700]
    assert_reproducible(lambda g, i: torch.ops.sma_fast.gather_tokens_backward(g, i, 90), grad, ids)


@pytest.mark.one_instruction_set
@pytest.mark.needs("gather_tokens_backward")
@pytest.mark.parametrize("dtype, layout", OPCHECK)
@pytest.mark.parametrize("trailing", ((), (5,), (2, 3)), ids=str)
def test_opcheck(backend, trailing, dtype, layout):
    inputs, _ = guarded(backend.inputs(gather_inputs(dtype, trailing=trailing)), layout)
    torch.library.opcheck(
        torch.ops.sma_fast.gather_tokens.default,
        (inputs["tokens"].requires_grad_(), inputs["ids"]),
    )


@pytest.mark.one_instruction_set
@pytest.mark.needs("gather_tokens_backward")
@pytest.mark.parametrize("dtype, layout", OPCHECK)
@pytest.mark.parametrize("trailing", ((), (2, 3)), ids=str)
def test_opcheck_backward(backend, trailing, dtype, layout):
    inputs = gather_inputs(dtype, trailing=trailing, tokens=7, visible=7)
    inputs, _ = guarded(backend.inputs(inputs), layout)
    torch.library.opcheck(
        torch.ops.sma_fast.gather_tokens_backward.default,
        (inputs["tokens"].requires_grad_(), inputs["ids"], 9),
    )


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compile(compiler):
    sizes = ((12, 7), (33, 9), (64, 20))
    inputs = [gather_inputs(tokens=n, visible=v) for n, v in sizes]
    assert_compiles_once(
        sma_fast.gather_tokens,
        [(x["tokens"].requires_grad_(), x["ids"]) for x in inputs],
        compiler,
    )


def test_autocast_keeps_the_dtype():
    inputs = gather_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(OP, inputs)
    assert_same(inside, call(OP, inputs))


def arguments(**changed):
    return {"tokens": torch.zeros(2, 5, 3), "ids": torch.zeros(2, 4, dtype=torch.int64)} | changed


NESTED = torch.nested.nested_tensor([torch.ones(5, 3)] * 2, layout=torch.jagged)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a prototype, says torch
    NESTED_STRIDED = torch.nested.nested_tensor([torch.ones(5, 3)] * 2, layout=torch.strided)
BAD = {
    "tokens, not a tensor": ("tokens", TypeError, {"tokens": [[1.0]]}),
    "tokens, rank": ("tokens", ValueError, {"tokens": torch.zeros(5)}),
    "ids, not a tensor": ("ids", TypeError, {"ids": [[0]]}),
    "ids, None": ("ids", TypeError, {"ids": None}),
    "ids, rank 1": ("ids", ValueError, {"ids": torch.zeros(2, dtype=torch.int64)}),
    "ids, rank 3": ("ids", ValueError, {"ids": torch.zeros(2, 4, 1, dtype=torch.int64)}),
    "ids, floats": ("ids", TypeError, {"ids": torch.zeros(2, 4)}),
    "ids, int32": ("ids", TypeError, {"ids": torch.zeros(2, 4, dtype=torch.int32)}),
    "ids, bool": ("ids", TypeError, {"ids": torch.zeros(2, 4, dtype=torch.bool)}),
    "ids, batch": ("ids", ValueError, {"ids": torch.zeros(3, 4, dtype=torch.int64)}),
    "ids, batch 1": ("ids", ValueError, {"ids": torch.zeros(1, 4, dtype=torch.int64)}),
    "ids, sparse": ("ids", TypeError, {"ids": arguments()["ids"].to_sparse()}),
    "tokens, sparse": ("tokens", TypeError, {"tokens": torch.zeros(2, 5, 3).to_sparse()}),
    "tokens, nested": ("tokens", TypeError, {"tokens": NESTED}),
    "tokens, nested and strided": ("tokens", TypeError, {"tokens": NESTED_STRIDED}),
    "ids, device": ("ids", ValueError, {"ids": arguments()["ids"].to("meta")}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        sma_fast.gather_tokens(**arguments(**changed))


@pytest.mark.parametrize("tokens, bad", ((5, 5), (5, -2), (5, 2**40), (0, 0)))
def test_id_out_of_range(backend, tokens, bad):
    inputs = gather_inputs(tokens=tokens)
    inputs["ids"][1, 2] = bad
    with pytest.raises(ValueError, match=rf"^ids: holds {bad}, allowed is -1"):
        call(OP, backend.inputs(inputs))


@pytest.mark.needs("gather_tokens_backward")
@pytest.mark.parametrize("bad", (7, -2, 2**40))
def test_id_out_of_range_backward(backend, bad):
    grad = torch.zeros(2, 3, 4, device=backend.device)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=backend.device)
    ids[1, 2] = bad
    with pytest.raises(ValueError, match=rf"^ids: holds {bad}, allowed is -1 to 6"):
        torch.ops.sma_fast.gather_tokens_backward(grad, ids, 7)


@pytest.mark.parametrize("bad", (3, -2, 2**40))
def test_unchecked_id_out_of_range_gives_zeros(unchecked_reference, bad):
    tokens, ids = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2, bad]])
    assert sma_fast.gather_tokens(tokens, ids).tolist() == [[3.0, 0.0]]
    backward = torch.ops.sma_fast.gather_tokens_backward(torch.tensor([[5.0, 7.0]]), ids, 3)
    assert backward.tolist() == [[0.0, 0.0, 5.0]]


def test_size_that_no_memory_holds():
    ids = torch.full((1, 8), -1)
    with pytest.raises(RuntimeError):
        sma_fast.gather_tokens(torch.empty(1, 0, 2**61), ids)
    assert sma_fast.gather_tokens(torch.ones(1, 1, 2), ids).sum() == 0


@pytest.mark.skipif(not _native.cpu_instruction_sets(), reason="needs the native module")
def test_large_outputs_stay_apart_and_are_given_again():
    tokens = torch.randn(4, 512, 256)
    ids = torch.arange(512).expand(4, 512).contiguous()
    with sma_fast.use_backend("cpu"):
        kept = [sma_fast.gather_tokens(tokens, ids) for _ in range(3)]
        where = {x.data_ptr() for x in kept}
        assert len(where) == 3
        assert all(torch.equal(x, tokens) for x in kept)
        del kept
        others = [torch.empty_like(tokens) for _ in range(4)]  # would take what malloc got back
        again = sma_fast.gather_tokens(tokens * 2, ids)
    assert torch.equal(again, tokens * 2)
    assert again.data_ptr() in where
    assert where.isdisjoint(x.data_ptr() for x in others)


def test_no_tokens_of_a_strided_view(backend):
    tokens = torch.randn(2, 4, 12)[..., ::2][:, :0]
    inputs = backend.inputs({"tokens": tokens, "ids": torch.full((2, 3), -1)})
    assert_same(call(OP, inputs).cpu(), torch.zeros(2, 3, 6))
