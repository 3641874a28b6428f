"""Triton's scratch memory, which has one size, what is not copied, and rows of several programs."""

import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from conftest import device_of, why_missing

import sma_fast
from sma_fast.testing import (
    aggregate_inputs,
    assert_same,
    assert_same_selection,
    attention_inputs,
    call,
    draw_inputs,
    gather_inputs,
    guided_inputs,
    random_inputs,
    restore_inputs,
    select_inputs,
    to_device,
)

MISSING = why_missing("triton", "attention_scores")
DEVICE = device_of("triton")
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.on_gpu,
    pytest.mark.skipif(bool(MISSING), reason=str(MISSING)),
]

SMALL = {  # what makes rows of a few dozen tokens long ones, of several blocks and parts
    "attention_scores": {"up_to": 16},
    "attention_scores.row_statistics": {"tokens": 16, "rows": 16},
    "attention_scores.column_sums": {"tokens": 16, "rows": 16},
    "aggregate_attention": {"block": 16},
    "aggregate_attention.logits": {"up_to": 16},
    "aggregate_attention.long": {"block": 16},
    "select_tokens": {"up_to": 16},
    "select_tokens.long": {"block": 16},
    "select_tokens.few": {"tokens": 17, "programs": 12, "block": 16},
    "attention_scores.splits": {"tokens": 8},
    "draw_queries": {"up_to": 16},
    "draw_queries.long": {"block": 16},
    "random_masking": {"up_to": 16},
    "random_masking.long": {"block": 16},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[None]:
    """Forces Triton, with settings that make small inputs long ones."""
    from sma_fast.kernels import settings

    for entry, changed in SMALL.items():
        monkeypatch.setitem(settings.DEFAULT, entry, ({**settings.DEFAULT[entry][-1], **changed},))
    monkeypatch.setattr(settings, "MEASURED", {})
    with sma_fast.use_backend("triton"):
        yield


def shrink(monkeypatch: pytest.MonkeyPatch, scratch: int) -> None:
    from sma_fast.kernels import turns

    monkeypatch.setattr(turns, "SCRATCH", scratch)


def reference(op: str, inputs: dict) -> object:
    with sma_fast.use_backend("reference"):
        return call(op, inputs)


def test_turns() -> None:
    from sma_fast.kernels.turns import turns

    assert turns(3, 2, 5, 1000) == [(0, 3, 0, 2, 0, 5)]
    assert turns(3, 2, 5, 20) == [(0, 2, 0, 2, 0, 5), (2, 1, 0, 2, 0, 5)]
    assert turns(3, 2, 5, 1000, 2) == [(0, 2, 0, 2, 0, 5), (2, 1, 0, 2, 0, 5)]
    assert turns(1, 3, 5, 10) == [(0, 1, 0, 2, 0, 5), (0, 1, 2, 1, 0, 5)]
    assert turns(2, 1, 5, 3) == [(b, 1, 0, 1, r, n) for b in (0, 1) for r, n in ((0, 3), (3, 2))]
    assert turns(1, 1, 2, 0) == [(0, 1, 0, 1, 0, 1), (0, 1, 0, 1, 1, 1)]


SUMS = (
    {},
    {"selected": 17, "padding": "scattered"},
    {"selected": 17, "ragged": True, "by_head": True},
    {"head_reduce": "none"},
    {"query_batch": 1, "head_reduce": "sum"},
    {"values": "-inf keys", "padding": "scattered", "selected": 17},
)


@pytest.mark.parametrize("tokens, scratch", ((16, 1 << 20), (24, 1 << 20), (24, 250)))
@pytest.mark.parametrize("options", SUMS, ids=str)
def test_attention_scores_in_turns(small, monkeypatch, options, scratch, tokens):
    """Whatever the scratch memory, the answer; whatever the batch, the same bits."""
    shrink(monkeypatch, scratch)
    inputs = attention_inputs(batch=3, queries=19, tokens=tokens, heads=2, width=8, **options)
    inputs = to_device(inputs, DEVICE)
    scores = call("attention_scores", inputs)
    expected = reference("attention_scores", inputs)
    torch.testing.assert_close(scores, expected, rtol=3e-5, atol=1e-6, equal_nan=True)
    assert_same_bits_whatever_the_batch("attention_scores", inputs, scores, monkeypatch)


@pytest.mark.parametrize("tokens, scratch", ((16, 1 << 20), (24, 250)))
@pytest.mark.parametrize("options", SUMS[2:4], ids=str)
@pytest.mark.parametrize("logits", (False, True))
def test_aggregate_attention_in_turns(small, monkeypatch, options, scratch, tokens, logits):
    shrink(monkeypatch, scratch)
    inputs = aggregate_inputs(batch=3, queries=19, tokens=tokens, heads=2, logits=logits, **options)
    inputs = to_device(inputs, DEVICE)
    scores = call("aggregate_attention", inputs)
    expected = reference("aggregate_attention", inputs)
    torch.testing.assert_close(scores, expected, rtol=3e-5, atol=1e-6)
    assert_same_bits_whatever_the_batch("aggregate_attention", inputs, scores, monkeypatch)


def assert_same_bits_whatever_the_batch(
    op: str, inputs: dict, scores: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sma_fast.kernels import settings

    for sample in range(3):
        one = {
            name: x[sample : sample + 1] if isinstance(x, torch.Tensor) and len(x) == 3 else x
            for name, x in inputs.items()
        }
        assert_same(call(op, one), scores[sample : sample + 1])
    # as in a batch that fills the GPU: no head has a program of its own
    entry = ({**settings.DEFAULT["sum_heads"][0], "programs": 0},)
    monkeypatch.setitem(settings.DEFAULT, "sum_heads", entry)
    assert_same(call(op, inputs), scores)


@pytest.mark.parametrize("scratch", (1 << 20, 48, 8))
@pytest.mark.parametrize("offset", (0, 3))
def test_gather_tokens_backward_in_turns(small, monkeypatch, offset, scratch):
    """Rows of three floats hold no note of eight bytes."""
    from sma_fast.kernels import gather_tokens_backward

    shrink(monkeypatch, scratch)
    inputs = gather_inputs(batch=3, tokens=9, visible=20, trailing=(3,))
    ids = inputs["ids"].to(DEVICE)
    grad = torch.randn(3, 20, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = reference_backward(grad, ids, 9)
    actual = gather_tokens_backward.launch(grad, ids, 9 - offset, offset)
    torch.testing.assert_close(actual, expected[:, offset:], rtol=1e-6, atol=1e-6)


def reference_backward(grad: torch.Tensor, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    with sma_fast.use_backend("reference"):
        return torch.ops.sma_fast.gather_tokens_backward(grad, ids, tokens)


@pytest.mark.parametrize("scratch", (1 << 20, 64))
@pytest.mark.parametrize("width", (4, 300))
def test_tokens_of_several_ids(small, monkeypatch, width, scratch):
    """Also where one flag is that of several blocks of rows."""
    from sma_fast.kernels import gather_tokens_backward, settings

    entry = ({**settings.DEFAULT["gather_tokens_backward"][-1], "elements": 512},)
    monkeypatch.setitem(settings.DEFAULT, "gather_tokens_backward", entry)
    entry = ({**settings.DEFAULT["gather_tokens_backward.several"][0], "flags": 2, "ids": 16},)
    monkeypatch.setitem(settings.DEFAULT, "gather_tokens_backward.several", entry)
    shrink(monkeypatch, scratch)
    ids = torch.arange(40).repeat(3, 1)
    ids[0, 35:] = 2  # one block of one sample, whose flag may be others' too
    ids[2, 17] = 38  # a second one
    ids[1, 7] = -1
    ids, grad = ids.to(DEVICE), torch.randn(3, 40, width).to(DEVICE)
    actual = gather_tokens_backward.launch(grad, ids, 41)
    torch.testing.assert_close(actual, reference_backward(grad, ids, 41), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scratch", (1 << 20, 256))
def test_restore_tokens_backward_in_turns(small, monkeypatch, scratch):
    shrink(monkeypatch, scratch)
    inputs = to_device(restore_inputs(), DEVICE)
    ids, visible = inputs["ids_restore"], inputs["visible"]
    grad = torch.randn(*ids.shape, 50, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = (grad, ids, visible.shape[1], None)
    actual = torch.ops.sma_fast.restore_tokens_backward(*arguments)
    with sma_fast.use_backend("reference"):
        expected = torch.ops.sma_fast.restore_tokens_backward(*arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


FEW = {
    "ratio": {"mask_ratio": 0.3},
    "none": {"mask_ratio": 0.0},
    "all": {"num_masked": 40},
    "rows": {"rows": [0, 33, 5]},
    "random": {"mask_ratio": 0.4, "random_fraction": 0.5},
    "all random": {"mask_ratio": 0.4, "random_fraction": 1.0},
    "pool": {"mask_ratio": 0.2, "pool_ratio": 0.6},
}


@pytest.mark.parametrize(
    "programs, padding, scores",
    ((264, None, "special"), (4, "scattered", "last bits")),
)
@pytest.mark.parametrize("name", FEW)
def test_parts_of_rows(small, monkeypatch, name, scores, padding, programs):
    from sma_fast.kernels import settings

    entry = ({**settings.DEFAULT["select_tokens.few"][0], "programs": programs},)
    monkeypatch.setitem(settings.DEFAULT, "select_tokens.few", entry)
    shrink(monkeypatch, 17_000)  # of one or two rows with a random share
    inputs = select_inputs(batch=3, tokens=40, scores=scores, padding=padding, **FEW[name])
    inputs = to_device(inputs, DEVICE)
    assert_same_selection(call("select_tokens", inputs), reference("select_tokens", inputs))


@pytest.mark.parametrize("share", ({}, {"random_fraction": 0.5}, {"pool_ratio": 0.6}), ids=str)
def test_masked_queries_go_first_in_parts_of_rows(small, share):
    inputs = guided_inputs(
        batch=3, tokens=60, queries=60, num_queries=7, mask_queries=True, **share
    )
    inputs = to_device(inputs, DEVICE)
    actual = call("self_guided_masking", inputs)
    assert_same_selection(actual.selection, reference("self_guided_masking", inputs).selection)


OPS = {  # and bytes of scratch that their turns fit in
    "attention_scores": (
        500,
        lambda: attention_inputs(batch=3, queries=30, tokens=40, heads=2),
    ),
    "aggregate_attention": (
        500,
        lambda: aggregate_inputs(batch=3, queries=30, tokens=40, heads=2, logits=True),
    ),
    "select_tokens": (
        9_000,
        lambda: select_inputs(batch=3, tokens=40, random_fraction=0.5, mask_ratio=0.5),
    ),
    "draw_queries": (100, lambda: draw_inputs(candidates=40, num_queries=2)),
    "gather_tokens": (200, lambda: gather_inputs(tokens=40, trailing=(9,))),
    "restore_tokens": (200, lambda: restore_inputs(tokens=40, width=9)),
    "random_masking": (100, lambda: random_inputs(tokens=40)),
}


@pytest.mark.parametrize("op", OPS)
def test_scratch_memory_has_one_size(small, monkeypatch, op):
    limit, build = OPS[op]
    shrink(monkeypatch, limit)
    inputs = to_device(build(), DEVICE)
    tensors = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for x in tensors:
        x.requires_grad_(op in ("gather_tokens", "restore_tokens"))
    held = Held(monkeypatch)
    outputs = [
        x for x in torch.utils._pytree.tree_leaves(call(op, inputs)) if isinstance(x, torch.Tensor)
    ]
    assert 0 < held.most <= limit + sum(x.nbytes for x in outputs)
    if outputs[0].requires_grad:
        held.most = held.now = 0
        outputs[0].sum().backward()
        assert 0 < held.most <= limit + sum(x.nbytes for x in tensors)


APART = {
    "keys": lambda x: x | {"key": x["key"].mT.contiguous().mT},
    "queries": lambda x: x | {"query": x["query"].mT.contiguous().mT},
    "samples": lambda x: x | {"key": x["key"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)},
}


@pytest.mark.parametrize("width, tokens", ((8, 16), (16, 40), (20, 40)))  # held, kept, in blocks
@pytest.mark.parametrize("name", APART)
def test_features_apart_are_not_copied(small, monkeypatch, name, width, tokens):
    sizes = {"tokens": tokens, "queries": 20, "heads": 4, "kv_heads": 2, "width": width}
    given = attention_inputs(batch=3, selected=7, shared=True, padding="scattered", **sizes)
    inputs = to_device(APART[name](given), DEVICE)
    expected = reference("attention_scores", inputs)
    nothing_copied(monkeypatch)
    scores = call("attention_scores", inputs)
    torch.testing.assert_close(scores, expected, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("logits", (False, True))
@pytest.mark.parametrize("tokens", (16, 40))  # of logits, held and not
def test_maps_apart_are_not_copied(small, monkeypatch, tokens, logits):
    given = aggregate_inputs(batch=3, tokens=tokens, queries=20, selected=7, shared=True)
    inputs = to_device(given | {"attention": given["attention"].mT.contiguous().mT}, DEVICE)
    inputs["logits"] = logits
    expected = reference("aggregate_attention", inputs)
    nothing_copied(monkeypatch)
    scores = call("aggregate_attention", inputs)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_one_index_is_not_copied(small, monkeypatch):
    inputs = guided_inputs(batch=3, tokens=20, queries=20, mask_queries=True)
    del inputs["num_queries"]
    inputs["query_index"] = torch.tensor([3, -1, 7])
    inputs = to_device(inputs, DEVICE)
    expected = reference("self_guided_masking", inputs).selection
    nothing_copied(monkeypatch)
    assert_same_selection(call("self_guided_masking", inputs).selection, expected)


def nothing_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a kernel's module makes a tensor contiguous that is not."""
    contiguous = torch.Tensor.contiguous

    def without_copy(x: torch.Tensor) -> torch.Tensor:
        if sys._getframe(1).f_globals["__name__"].startswith("sma_fast.kernels"):
            assert x.is_contiguous()
        return contiguous(x)

    monkeypatch.setattr(torch.Tensor, "contiguous", without_copy)


class Held:
    """The bytes that the kernels' modules have asked torch for and not given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = self.most = 0
        for owner, name in (
            *((torch, "empty"), (torch, "zeros"), (torch, "empty_like")),
            *((torch.Tensor, "new_empty"), (torch.Tensor, "new_zeros")),
        ):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, allocate):
        def allocated(*args, **kwargs):
            found = allocate(*args, **kwargs)
            if sys._getframe(1).f_globals["__name__"].startswith("sma_fast.kernels"):
                self.now += found.nbytes
                self.most = max(self.most, self.now)
                weakref.finalize(found, self.freed, found.nbytes)
            return found

        return allocated

    def freed(self, number: int) -> None:
        self.now -= number
