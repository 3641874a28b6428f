"""restore_tokens: all tokens in their order again, fill where they were masked."""

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
    assert_gradients,
    assert_reproducible,
    assert_same,
    call,
    guarded,
    make_scores,
    restore_inputs,
)

OP = "restore_tokens"
FILLS = ("token", "rows")
LARGE = ((torch.float32, 512), (torch.float32, 511), (torch.bfloat16, 1023), (torch.float64, 256))
OPCHECK = ((torch.float32, "packed"), (torch.bfloat16, "transposed"))

A, B, ZERO = [1.0, 2.0], [3.0, 4.0], [0.0, 0.0]
X, Y, Z = [0.1, 0.2], [0.3, 0.4], [0.5, 0.6]
LITERALS = {  # visible, ids_restore, fill, answer
    "one mask token": ([[A, B]], [[2, 0, 3, 1]], X, [[X, A, X, B]]),
    "a row for each": ([[A, B]], [[2, 0, 3, 1]], [[X, Y]], [[X, A, Y, B]]),
    "padding gives zeros": ([[A, B]], [[-1, 1, 2, 0, -1]], X, [[ZERO, B, X, A, ZERO]]),
    "padding gives zeros, rows": ([[A]], [[-1, 1, 0]], [[Y]], [[ZERO, Y, A]]),
    "nothing visible": ([[]], [[0, 1]], [[X, Y]], [[X, Y]]),
    "nothing masked": ([[B, A]], [[1, 0]], [[]], [[A, B]]),
    "a row beyond N is still fill": ([[A]], [[0, 2, 1]], X, [[A, X, X]]),
    "more fill rows than masked": ([[A]], [[3, 0]], [[X, Y, Z]], [[Z, A]]),
    "each sample by its own": ([[A], [B]], [[1, 0], [0, 1]], X, [[X, A], [B, X]]),
}


def three_dims(rows: list) -> torch.Tensor:
    x = torch.tensor(rows)
    return x.reshape(1, 0, 2) if x.numel() == 0 else x


@pytest.mark.parametrize("name", LITERALS)
def test_literal(backend, name):
    visible, ids, fill, answer = LITERALS[name]
    inputs = backend.inputs(
        {"visible": three_dims(visible), "ids": torch.tensor(ids), "fill": three_dims(fill)}
    )
    assert_same(sma_fast.restore_tokens(*inputs.values()).cpu(), torch.tensor(answer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_cases(backend, case, dtype):
    backend.assert_same_as_oracle(OP, case.build(dtype))


def large(dtype: torch.dtype, width: int, fill: str) -> dict:
    # outputs of more than 8 MiB may be written past the caches
    return restore_inputs(dtype, batch=2, tokens=2300, masked=50, width=width, fill=fill)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype, width", LARGE)
@pytest.mark.parametrize("fill", FILLS)
def test_large(backend, four_threads, fill, dtype, width):
    backend.assert_same_as_oracle(OP, large(dtype, width, fill))


@pytest.mark.not_interpreted
@pytest.mark.needs("restore_tokens_backward")
@pytest.mark.parametrize("dtype, width", LARGE[1:3])
@pytest.mark.parametrize("fill", FILLS)
def test_large_backward(backend, four_threads, fill, dtype, width):
    ids = large(dtype, width, fill)["ids_restore"].to(backend.device)
    grad = make_scores("normal", (2, 2300, width), dtype).to(backend.device)
    sizes = (2250, 50 if fill == "rows" else None)
    backward = torch.ops.sma_fast.restore_tokens_backward
    actual = backward(grad, ids, *sizes)
    with sma_fast.use_backend("reference"):
        plain, exact = backward(grad, ids, *sizes), backward(grad.double(), ids, *sizes)
    for x, y, z in zip(actual, exact, plain, strict=True):
        assert_close(x, y, z)


@pytest.mark.not_interpreted
@given(
    batch=st.integers(0, 4),
    tokens=st.sampled_from((0, 1, 2, 7, 33, 65)),
    share=st.sampled_from((0.0, 0.3, 0.75, 1.0)),
    width=st.integers(0, 18),
    fill=st.sampled_from(FILLS),
    ids=st.sampled_from(("selection", "any", "nothing")),
    padding=st.sampled_from(PADDINGS),
    values=st.sampled_from(("normal", "special")),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_input(backend, layout, dtype, tokens, share, **options):
    masked = round(share * tokens)
    inputs = restore_inputs(dtype, tokens=tokens, masked=masked, **options)
    backend.assert_same_as_oracle(OP, inputs, layout)


def assert_gradients_of(inputs: dict, layout: str = "packed") -> None:
    ids = inputs["ids_restore"]
    assert_gradients(
        lambda visible, fill: [sma_fast.restore_tokens(visible, ids, fill)],
        [inputs["visible"], inputs["fill"]],
        layout,
    )


@pytest.mark.needs("restore_tokens_backward")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES[OP] if "values" not in c.options], ids=str)
def test_gradients(backend, case, dtype):
    assert_gradients_of(backend.inputs(case.build(dtype)))
    assert backend.ran["restore_tokens_backward"] > 0


@pytest.mark.needs("restore_tokens_backward")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_gradients_of_any_layout(backend, dtype, fill, layout):
    assert_gradients_of(backend.inputs(restore_inputs(dtype, fill=fill, tokens=33)), layout)


@pytest.mark.parametrize("ids", ("selection", "any"))
@pytest.mark.parametrize("fill", FILLS)
def test_gradcheck(fill, ids):
    inputs = restore_inputs(
        torch.float64, batch=2, tokens=5, masked=3, width=2, fill=fill, ids=ids, padding="left"
    )
    inputs["visible"].requires_grad_(), inputs["fill"].requires_grad_()
    arguments = (sma_fast.restore_tokens, tuple(inputs.values()))
    assert torch.autograd.gradcheck(*arguments)
    assert torch.autograd.gradgradcheck(*arguments)


@pytest.mark.parametrize("only", ("visible", "fill"))
def test_gradient_of_one_of_the_two(only):
    inputs = restore_inputs(torch.float64, batch=2, tokens=5, masked=3, width=2, fill="rows")
    inputs[only].requires_grad_()
    assert torch.autograd.gradcheck(sma_fast.restore_tokens, tuple(inputs.values()))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("batch, tokens", ((5, 700), (1, 20_001)))
def test_reproducible(backend, batch, tokens):
    inputs = restore_inputs(batch=batch, tokens=tokens, masked=tokens // 3, fill="rows")
    assert_reproducible(sma_fast.restore_tokens, *backend.inputs(inputs).values())


@pytest.mark.not_interpreted
@pytest.mark.needs("restore_tokens_backward")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("fill", FILLS)
def test_backward_reproducible(backend, fill, dtype):
    inputs = backend.inputs(restore_inputs(dtype, tokens=700, masked=300, batch=5))
    grad = inputs["visible"].repeat(1, 2, 1)[:, :700]
    backward = torch.ops.sma_fast.restore_tokens_backward
    if fill == "rows":
        assert_reproducible(lambda g, i: backward(g, i, 400, 300), grad, inputs["ids_restore"])
    else:  # the token's gradient is a sum over samples, so they cannot be taken apart
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        one = backward(grad, inputs["ids_restore"], 400, None)
        torch.set_num_threads(2)
        two = backward(grad, inputs["ids_restore"], 400, None)
        torch.set_num_threads(threads)
        assert_same(one, two)


@pytest.mark.not_interpreted
@pytest.mark.needs("restore_tokens_backward")
@pytest.mark.parametrize("dtype, width", ((torch.float32, 256), (torch.float64, 41)), ids=str)
def test_backward_of_one_fill_in_turns(backend, monkeypatch, dtype, width):
    """Where the sums of a row are more than a GPU's scratch memory holds: it has one size."""
    monkeypatch.setattr(_native, "_SCRATCH", 768)
    inputs = restore_inputs(dtype, batch=3, tokens=500, masked=400, width=width, padding="left")
    ids = backend.inputs(inputs)["ids_restore"]
    grad = make_scores("normal", (3, 500, width), dtype).to(backend.device)
    backward = torch.ops.sma_fast.restore_tokens_backward
    _, to_fill = backward(grad, ids, 100, None)
    with sma_fast.use_backend("reference"):
        _, expected = backward(grad, ids, 100, None)
        _, exact = backward(grad.double(), ids, 100, None)
    assert_close(to_fill, exact, expected)


@pytest.mark.one_instruction_set
@pytest.mark.needs("restore_tokens_backward")
@pytest.mark.parametrize("dtype, layout", OPCHECK)
@pytest.mark.parametrize("fill", FILLS)
def test_opcheck(backend, fill, dtype, layout):
    inputs = restore_inputs(dtype, fill=fill, padding="left")
    inputs, _ = guarded(backend.inputs(inputs), layout)
    inputs["visible"].requires_grad_(), inputs["fill"].requires_grad_()
    torch.library.opcheck(torch.ops.sma_fast.restore_tokens.default, tuple(inputs.values()))


@pytest.mark.one_instruction_set
@pytest.mark.needs("restore_tokens_backward")
@pytest.mark.parametrize("dtype, layout", OPCHECK)
@pytest.mark.parametrize("num_fill", (None, 6))
def test_opcheck_backward(backend, num_fill, dtype, layout):
    inputs = restore_inputs(dtype, ids="any", tokens=12, masked=0)
    inputs, _ = guarded(backend.inputs(inputs), layout)
    torch.library.opcheck(
        torch.ops.sma_fast.restore_tokens_backward.default,
        (inputs["visible"].requires_grad_(), inputs["ids_restore"], 8, num_fill),
    )


@pytest.mark.parametrize("fill", FILLS)
def test_compile(fill):
    inputs = [restore_inputs(tokens=n, masked=k, fill=fill) for n, k in ((12, 4), (33, 9), (64, 7))]
    for x in inputs:
        x["visible"].requires_grad_(), x["fill"].requires_grad_()
    assert_compiles_once(sma_fast.restore_tokens, [tuple(x.values()) for x in inputs])


@pytest.mark.parametrize("fill", FILLS)
def test_mixed_dtypes_are_promoted(backend, fill):
    # under autocast the encoder gives bfloat16 and the mask token is a float32 parameter
    inputs = backend.inputs(restore_inputs(torch.float32, fill=fill))
    half = inputs | {"visible": inputs["visible"].bfloat16()}
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        result = call(OP, half)
    assert_same(result, backend.expected(OP, half | {"visible": half["visible"].float()}))


@pytest.mark.needs("restore_tokens_backward")
def test_gradients_of_mixed_dtypes(backend):
    inputs = backend.inputs(restore_inputs(torch.float32))
    visible, fill = inputs["visible"].bfloat16().requires_grad_(), inputs["fill"].requires_grad_()
    sma_fast.restore_tokens(visible, inputs["ids_restore"], fill).sum().backward()
    assert_same(visible.grad, torch.ones_like(visible))
    assert_same(fill.grad, torch.full_like(fill, 15.0))  # 3 samples, 5 masked tokens each


IDS = torch.zeros(2, 5, dtype=torch.int64)


def arguments(**changed):
    inputs = {"visible": torch.zeros(2, 3, 4), "ids_restore": IDS, "fill": torch.zeros(4)}
    return inputs | changed


BAD = {
    "visible, not a tensor": ("visible", TypeError, {"visible": [[[1.0]]]}),
    "visible, rank 2": ("visible", ValueError, {"visible": torch.zeros(2, 3)}),
    "visible, rank 4": ("visible", ValueError, {"visible": torch.zeros(2, 3, 4, 1)}),
    "visible, ints": ("visible", TypeError, {"visible": torch.zeros(2, 3, 4).long()}),
    "ids, not a tensor": ("ids_restore", TypeError, {"ids_restore": [[0]]}),
    "ids, rank": ("ids_restore", ValueError, {"ids_restore": torch.zeros(2).long()}),
    "ids, floats": ("ids_restore", TypeError, {"ids_restore": torch.zeros(2, 5)}),
    "ids, int32": ("ids_restore", TypeError, {"ids_restore": torch.zeros(2, 5).int()}),
    "ids, batch": ("ids_restore", ValueError, {"ids_restore": torch.zeros(1, 5).long()}),
    "ids, device": ("ids_restore", ValueError, {"ids_restore": IDS.to("meta")}),
    "fill, not a tensor": ("fill", TypeError, {"fill": 0.0}),
    "fill, rank 0": ("fill", ValueError, {"fill": torch.zeros(())}),
    "fill, rank 2": ("fill", ValueError, {"fill": torch.zeros(1, 4)}),
    "fill, width": ("fill", ValueError, {"fill": torch.zeros(3)}),
    "fill rows, width": ("fill", ValueError, {"fill": torch.zeros(2, 2, 3)}),
    "fill rows, batch": ("fill", ValueError, {"fill": torch.zeros(1, 2, 4)}),
    "fill, ints": ("fill", TypeError, {"fill": torch.zeros(4).long()}),
    "fill, sparse": ("fill", TypeError, {"fill": torch.zeros(4).to_sparse()}),
    "visible, sparse": ("visible", TypeError, {"visible": torch.zeros(2, 3, 4).to_sparse()}),
    "fill, device": ("fill", ValueError, {"fill": torch.zeros(4, device="meta")}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(nothing_runs, name):
    argument, error, changed = BAD[name]
    with pytest.raises(error, match=rf"^{argument}: .*allowed is"):
        sma_fast.restore_tokens(**arguments(**changed))


OUT_OF_RANGE = (("token", 3 + 5, 7), ("rows", 3 + 2, 4), ("token", -2, 7), ("rows", -2, 4))


@pytest.mark.parametrize("fill, bad, last", OUT_OF_RANGE)
def test_id_out_of_range(backend, fill, bad, last):
    inputs = arguments(fill=torch.zeros(4) if fill == "token" else torch.zeros(2, 2, 4))
    inputs["ids_restore"] = IDS.index_fill(1, torch.tensor(2), bad)
    with pytest.raises(ValueError, match=rf"^ids_restore: holds {bad}, allowed is -1 to {last}"):
        call(OP, backend.inputs(inputs))


@pytest.mark.needs("restore_tokens_backward")
@pytest.mark.parametrize("fill, bad, last", OUT_OF_RANGE)
def test_id_out_of_range_backward(backend, fill, bad, last):
    ids = IDS.index_fill(1, torch.tensor(2), bad).to(backend.device)
    grad = torch.zeros(2, 5, 4, device=backend.device)
    with pytest.raises(ValueError, match=rf"^ids_restore: holds {bad}, allowed is -1 to {last}"):
        torch.ops.sma_fast.restore_tokens_backward(grad, ids, 3, 2 if fill == "rows" else None)


@pytest.mark.parametrize("bad", (6, -2, 2**40))
@pytest.mark.parametrize("fill", ([9.0], [[[9.0]] * 2]), ids=FILLS)
def test_unchecked_id_out_of_range_gives_zeros(unchecked_reference, fill, bad):
    visible, fill, ids = torch.tensor([[[1.0]]]), torch.tensor(fill), torch.tensor([[1, 0, bad]])
    assert sma_fast.restore_tokens(visible, ids, fill).flatten().tolist() == [9.0, 1.0, 0.0]
    num_fill = 2 if fill.dim() == 3 else None
    grad = torch.tensor([[[5.0], [6.0], [7.0]]])
    back = torch.ops.sma_fast.restore_tokens_backward(grad, ids, 1, num_fill)
    assert back[0].flatten().tolist() == [6.0]
    assert back[1].flatten().tolist() == ([5.0, 0.0] if num_fill else [5.0])


@pytest.mark.parametrize("none", ("visible", "fill"))
def test_no_rows_of_a_strided_view(backend, none):
    rows, ids = torch.randn(2, 9, 6), torch.stack([torch.randperm(9) for _ in range(2)])
    inputs = {"visible": rows, "ids_restore": ids, "fill": rows}
    inputs[none] = torch.randn(2, 4, 12)[..., ::2][:, :0]
    expected = rows.gather(1, ids[..., None].expand(-1, -1, 6))
    assert_same(call(OP, backend.inputs(inputs)).cpu(), expected)
