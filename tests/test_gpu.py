"""What only a GPU can show: streams, graphs, waiting, memory, sizes, several devices.

Without one the tests run dry: with the emulator and Triton's interpreter, on the stand-in of
machines.py and in smaller sizes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import emulation
import pytest
import torch
from conftest import Implementation, implementations, missing_backends
from machines import Gpu, StandIn, tensors_in
from torch import Tensor
from torch.utils import _pytree as pytree

import sma_fast
from sma_fast import _dispatch, _native, reference
from sma_fast._schema import SCHEMAS
from sma_fast.testing import (
    aggregate_inputs,
    assert_compiles_once,
    assert_same,
    attention_inputs,
    call,
    cut_inputs,
    gather_inputs,
    guarded,
    guided_inputs,
    informed_inputs,
    make_scores,
    padding_mask,
    random_inputs,
    restore_inputs,
    select_inputs,
    to_device,
)

pytestmark = [pytest.mark.emulated, pytest.mark.on_gpu]

HERE = Gpu() if torch.cuda.is_available() else StandIn()
DRY = isinstance(HERE, StandIn)
MIB = 1 << 20


def draw_inputs(batch: int = 3, tokens: int = 12, number: int = 4, **options: Any) -> dict:
    # of the registered op, which takes the noise
    rows = torch.arange(batch) * 3
    padding = padding_mask("left", batch, tokens)
    noise = make_scores("normal", (batch, tokens), torch.float32).sigmoid()
    return {"noise": noise, "number": number, "rows": rows, "padding": padding}


def gather_backward_inputs(dtype: torch.dtype = torch.float32, **options: Any) -> dict:
    inputs = gather_inputs(dtype, **options)
    tokens, ids = inputs["tokens"], inputs["ids"]
    number = min(ids.shape[1], tokens.shape[1])
    return {"grad": tokens[:, :number], "ids": ids[:, :number], "tokens": tokens.shape[1]}


def restore_backward_inputs(dtype: torch.dtype = torch.float32, **options: Any) -> dict:
    inputs = restore_inputs(dtype, **options)
    visible, ids, fill = inputs.values()
    grad = make_scores("normal", (*ids.shape, visible.shape[2]), dtype)
    width = None if fill.dim() == 1 else fill.shape[1]
    return {"grad": grad, "ids": ids, "visible": visible.shape[1], "fill": width}


# op -> how inputs are made; inputs that more than one kernel, or another one, must answer
SMALL = {
    "attention_scores": (attention_inputs, {"selected": 3, "padding": "left", "width": 16}),
    "aggregate_attention": (aggregate_inputs, {"selected": 3, "logits": True}),
    "select_tokens": (select_inputs, {"rows": [0, 5, 9], "random_fraction": 0.5}),
    "draw_queries": (draw_inputs, {}),
    "gather_tokens": (gather_inputs, {"trailing": (16,)}),
    "gather_tokens_backward": (gather_backward_inputs, {"trailing": (16,)}),
    "restore_tokens": (restore_inputs, {"width": 16}),
    "restore_tokens_backward": (restore_backward_inputs, {"width": 16}),
    "self_guided_masking": (
        guided_inputs,
        {"selected": 3, "many": True, "queries": 12, "mask_queries": True, "padding": "left"},
    ),
    "random_masking": (random_inputs, {"trailing": (16,)}),
    "bipartition": (cut_inputs, {"padding": "left", "width": 16}),
    "informed_scores": (informed_inputs, {"padding": "left", "width": 16}),
}
LARGE = {
    "attention_scores": {"tokens": 20_001, "width": 4, "batch": 2, "selected": 3},
    "aggregate_attention": {"tokens": 20_001, "selected": 3, "logits": True},
    "select_tokens": {"tokens": 70_001, "mask_ratio": 0.3, "pool_ratio": 0.5},
    "draw_queries": {"tokens": 20_001},
    "gather_tokens": {"tokens": 3000, "visible": 2000, "trailing": (3,)},
    "gather_tokens_backward": {"tokens": 3000, "visible": 2000, "trailing": (3,)},
    "restore_tokens": {"tokens": 3000, "masked": 1000, "fill": "rows"},
    "restore_tokens_backward": {"tokens": 3000, "masked": 1000, "fill": "rows"},
    "self_guided_masking": {"tokens": 20_001, "width": 4, "selected": 3, "trailing": (2,)},
    "random_masking": {"tokens": 20_001},
    "bipartition": {"tokens": 1300, "batch": 2, "width": 8},
    "informed_scores": {"tokens": 3000, "width": 700},
}


@dataclass(frozen=True)
class Run:
    """An op with inputs, and what answers it."""

    op: str
    implementation: Implementation
    large: bool = False

    def inputs(self, **changed: Any) -> dict:
        """Returns inputs that hold nothing to draw with, on the machine's device."""
        builder, options = SMALL[self.op]
        if self.large:
            options = LARGE[self.op]
        inputs = builder(**options | changed)
        inputs.pop("seed", None)
        return to_device(inputs, HERE.device)

    def __str__(self) -> str:
        return f"{self.op}-{self.implementation}{'-large' if self.large else ''}"


def runs(ops: Sequence[str] = tuple(SCHEMAS), large: Sequence[bool] = (False,)) -> list:
    """Returns each op with each way that a GPU's kernel answers it here.

    Triton's interpreter, which the other tests run, is left out.
    """
    found = []
    for op in ops:
        for implementation in implementations(op):
            on_gpu = implementation.device == "cuda" or implementation.emulated
            if on_gpu and implementation.backend in ("triton", "cuda"):
                each = [Run(op, implementation, size) for size in large]
                found += [pytest.param(run, id=str(run)) for run in each]
    return found


@pytest.fixture
def forced(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Forces the implementation of `run`; fails unless it ran."""
    find, ran = _dispatch.implementation, []

    def implementation(backend: str, op: str, device_type: str):
        emulated = run.implementation.emulated and backend == "cuda"
        function = emulation.implementation(op) if emulated else find(backend, op, device_type)

        def counted(*arguments):
            ran.append((backend, op))
            return function(*arguments)

        counted.dtypes = getattr(function, "dtypes", None)
        return counted

    monkeypatch.setattr(_dispatch, "implementation", implementation)
    if run.implementation.emulated:
        emulation.use(monkeypatch)
    monkeypatch.delenv("SMA_FAST_CHECK", raising=False)
    if DRY:  # as a GPU, which does not look at what indices hold
        for check in ("check_index", "check_finite"):
            monkeypatch.setattr(reference, check, lambda *_: None)
    _dispatch._choose.cache_clear()
    try:
        with sma_fast.use_backend(run.implementation.backend):
            yield run
        assert (run.implementation.backend, run.op) in ran
    finally:
        _dispatch._choose.cache_clear()


def perform(op: str, inputs: dict) -> Any:
    """Returns what `op` makes: the public one, where that takes all of its inputs."""
    if op == "draw_queries" or op.endswith("_backward"):
        return getattr(torch.ops.sma_fast, op)(*inputs.values())
    outputs = call(op, inputs)
    return outputs[:3] if op == "self_guided_masking" else outputs  # the rest are inputs


def changed(inputs: dict) -> dict:
    """Returns other inputs of the same shapes, as valid: samples in reverse, numbers below zero."""

    def other(name: str, x: Any) -> Any:
        if isinstance(x, list):
            return [other(name, y) for y in x]
        if not isinstance(x, Tensor):
            return x
        if name == "noise":
            return 1 - x.flip(0)
        return -x.flip(0) if x.is_floating_point() else x.flip(0)

    return {name: other(name, x) for name, x in inputs.items()}


def overwrite(inputs: Any, contents: Any) -> None:
    """Writes contents into the same tensors."""
    for x, y in zip(tensors_in(inputs), tensors_in(contents), strict=True):
        x.copy_(y)


def spoil(outputs: Any) -> None:
    """Fills the outputs with what no op returns everywhere."""
    for x in tensors_in(outputs):
        x.fill_(math.nan if x.is_floating_point() else True if x.dtype == torch.bool else -77)


def test_there_is_a_gpu():
    """The skip of a run without one; SMA_FAST_REQUIRE=cuda makes it an error (conftest.py)."""
    missing = missing_backends()
    if DRY:
        pytest.skip(f"dry on the CPU: {missing.get('cuda', 'no CUDA device that torch can use')}")
    answering = {param.values[0].implementation.backend for param in runs()}
    assert answering == {"cuda", "triton"} - set(missing)


def test_kernels_get_the_device_and_torch_s_stream(monkeypatch):
    """Of a tensor on any of several GPUs."""
    streams = {0: SimpleNamespace(cuda_stream=10), 3: SimpleNamespace(cuda_stream=13)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])
    for number, stream in ((0, 10), (3, 13)):
        x = SimpleNamespace(device=torch.device("cuda", number), is_cuda=True)
        assert _native._where(x) == (number, stream)


# Waiting


def test_waiting_shows():
    x = torch.ones(3, device=HERE.device)
    for wait in (Tensor.item, Tensor.nonzero):
        with pytest.raises(RuntimeError, match="synchroniz"), HERE.no_waiting():
            wait(x[:1])
    assert x[0].item() == 1  # and not afterwards
    with HERE.no_waiting():
        assert (x + 1).shape == (3,)
        assert torch.tensor(2.0).item() == 2  # on the host


@pytest.mark.parametrize("layout", ["packed", "transposed"])
@pytest.mark.parametrize("run", runs(large=(False, True)))
def test_waits_for_nothing(forced: Run, layout: str):
    inputs, assert_unchanged = guarded(forced.inputs(), layout)
    first = perform(forced.op, inputs)  # what is compiled and loaded once may wait
    with HERE.no_waiting():
        second = perform(forced.op, inputs)
    assert_same(second, first)
    assert_unchanged()


# Graphs and streams


@pytest.mark.parametrize("run", runs(large=(False, True)))
def test_graph(forced: Run):
    first = forced.inputs()
    contents = (changed(first), first)
    held = pytree.tree_map_only(Tensor, torch.clone, first)
    expected = [perform(forced.op, x) for x in contents]
    outputs, replay = HERE.capture(lambda: perform(forced.op, held))
    for given, right in zip(contents, expected, strict=True):
        overwrite(held, given)
        spoil(outputs)
        replay()
        HERE.synchronize()
        assert_same(outputs, right)
    with pytest.raises(AssertionError):
        assert_same(*expected)  # or the test would show nothing


@pytest.mark.skipif(DRY, reason="the stand-in has no graphs, in which draws could stand still")
def test_draws_in_a_graph_are_new_ones():
    inputs = to_device(guided_inputs(tokens=1000, queries=40, num_queries=9), HERE.device)
    del inputs["seed"]
    inputs |= {"random_fraction": 0.5, "head_reduce": "random"}
    outputs, replay = HERE.capture(lambda: call("self_guided_masking", inputs))
    seen = []
    for _ in range(2):
        replay()
        HERE.synchronize()
        drawn = (outputs.query_index, outputs.head_index, outputs.selection.mask)
        seen.append([x.clone() for x in drawn])
        assert bool((outputs.selection.num_masked == 400).all())
    assert not any(torch.equal(x, y) for x, y in zip(*seen, strict=True))


@pytest.mark.parametrize("run", runs(large=(False, True)))
def test_runs_behind_what_its_stream_does(forced: Run):
    first = forced.inputs()
    second = changed(first)
    expected = perform(forced.op, second)
    held = pytree.tree_map_only(Tensor, torch.clone, first)
    with HERE.busy_stream():
        overwrite(held, second)  # late: on another stream the op would find the first contents
        outputs = perform(forced.op, held)
        kept = pytree.tree_map_only(Tensor, torch.clone, outputs)
        overwrite(held, first)  # and the op must not be later than this
    assert_same(kept, expected)


# torch.compile

SIZES = {  # three of an op's, with as many tensors in each
    "attention_scores": [{"batch": b, "tokens": n} for b, n in ((4, 12), (6, 33), (7, 100))],
    "select_tokens": [
        {"rows": None, "mask_ratio": 0.4, "batch": b, "tokens": n}
        for b, n in ((4, 12), (6, 33), (7, 100))
    ],
    "self_guided_masking": [
        {"batch": b, "tokens": n, "queries": n} for b, n in ((4, 12), (6, 33), (7, 100))
    ],
}


@pytest.mark.parametrize("compiler", ["aot_eager"] if DRY else ["aot_eager", "inductor"])
@pytest.mark.parametrize("run", runs())
def test_one_graph_when_compiled(forced: Run, compiler: str):
    sizes = SIZES.get(forced.op, [{"batch": b, "tokens": n} for b, n in ((4, 12), (6, 33))])
    flat = [pytree.tree_flatten(forced.inputs(**size)) for size in sizes]
    shape = flat[0][1]
    is_tensor = [isinstance(x, Tensor) for x in flat[0][0]]
    others = [x for x in flat[0][0] if not isinstance(x, Tensor)]

    def function(*tensors: Tensor) -> Any:
        given, rest = iter(tensors), iter(others)
        leaves = [next(given) if tensor else next(rest) for tensor in is_tensor]
        return perform(forced.op, pytree.tree_unflatten(leaves, shape))

    assert_compiles_once(function, [tuple(tensors_in(leaves)) for leaves, _ in flat], compiler)


# Several devices


@pytest.mark.skipif(len(HERE.devices()) < 2, reason="there is one GPU")
@pytest.mark.parametrize("run", runs())
def test_on_another_device_than_the_current_one(forced: Run):
    inputs = forced.inputs()
    first, second = HERE.devices()[:2]
    expected = tensors_in(perform(forced.op, to_device(inputs, str(first))))
    for current, other in ((first, second), (second, first)):
        with HERE.on(current):
            outputs = tensors_in(perform(forced.op, to_device(inputs, str(other))))
            assert HERE.current() == current
            HERE.synchronize()
        assert all(x.device == other for x in outputs)
        assert_same([x.cpu() for x in outputs], [x.cpu() for x in expected])


# Memory

WIDTHS = ((64, 4096), (4096, 1024), (16_384, 16_384), (64, 1_048_576))  # M and N
BATCH, HEADS = 4, 4


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns a tensor of zeros; on the stand-in one of memory that is never touched."""
    make = torch.empty if DRY else torch.zeros
    return make(shape, dtype=dtype, device=HERE.device)


def memory_inputs(op: str, queries: int, tokens: int) -> dict:
    ids = empty(BATCH, tokens, dtype=torch.int64)
    noise = empty(BATCH, tokens, dtype=torch.float32)
    padding = empty(BATCH, tokens, dtype=torch.bool)
    rows = empty(BATCH, tokens, 65)  # not of 16 bytes, nor of 8
    half = tokens // 2
    index = empty(BATCH, queries, dtype=torch.int64)
    if op == "aggregate_attention":
        some = {"query_index": index, "head_index": index}
        return {"attention": empty(BATCH, HEADS, queries, tokens), "logits": True} | some
    if op == "select_tokens":
        some = {"mask_ratio": 0.5, "random_fraction": 0.5, "noise": noise}
        return {"scores": noise, "key_padding_mask": padding} | some
    if op == "draw_queries":
        return {"noise": noise, "number": 64, "rows": None, "padding": padding}
    if op == "gather_tokens":
        return {"tokens": rows, "ids": ids[:, :half].contiguous()}
    if op == "gather_tokens_backward":
        return {"grad": rows, "ids": ids, "tokens": tokens}
    if op == "restore_tokens":
        return {"visible": rows[:, :half], "ids_restore": ids, "fill": empty(65)}
    if op == "restore_tokens_backward":
        return {"grad": rows, "ids": ids, "visible": half, "fill": None}
    if op == "random_masking":
        return {"tokens": rows, "noise": noise, "mask_ratio": 0.5}
    if op == "bipartition":  # of no more patches than one block's memory holds
        patches = min(tokens, 1024)
        padding = padding[:, :patches].contiguous()
        return {"embeddings": empty(BATCH, patches, queries), "key_padding_mask": padding}
    if op == "informed_scores":
        return {"embeddings": rows, "labels": padding, "key_padding_mask": padding}
    attention = {
        "query": empty(BATCH, HEADS, queries, 64),
        "key": empty(BATCH, HEADS, tokens, 64),
        "key_padding_mask": padding,
    }
    if op == "attention_scores":
        return attention
    indices = {"query_index": index, "head_index": index}
    return attention | indices | {"tokens": [rows], "mask_ratio": 0.5}


class NoKernels:
    """A native module that computes nothing."""

    most_gathers = 16

    def __getattr__(self, name: str):
        return lambda *_: None


@pytest.fixture
def no_kernels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the kernels out where they would be emulated: what is allocated does not change."""
    if not DRY:
        return
    monkeypatch.setattr(_native, "_module", NoKernels)
    monkeypatch.setattr(_native, "_empty", lambda shape, dtype, _: torch.empty(shape, dtype=dtype))
    if run.implementation.backend == "triton":
        from triton.runtime.interpreter import InterpretedFunction

        monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)


def test_memory_shows():
    x = torch.zeros(MIB, dtype=torch.uint8, device=HERE.device)
    assert HERE.extra_bytes(lambda: x + x) == 0
    assert HERE.extra_bytes(lambda: (x + x).sum()) >= MIB
    assert HERE.extra_bytes(lambda: (x + x + x)[:1].clone()) >= 2 * MIB - 1


@pytest.mark.parametrize("queries, tokens", WIDTHS[::3] if DRY else WIDTHS)
@pytest.mark.parametrize("run", runs())
def test_memory(forced: Run, no_kernels: None, queries: int, tokens: int):
    inputs = memory_inputs(forced.op, queries, tokens)
    perform(forced.op, inputs)
    extra = HERE.extra_bytes(lambda: perform(forced.op, inputs))
    assert extra <= MIB, f"{extra} bytes"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("run", runs(("select_tokens",)))
def test_memory_of_half_precision(forced: Run, no_kernels: None, dtype: torch.dtype):
    inputs = memory_inputs(forced.op, *WIDTHS[-1])
    inputs["scores"] = empty(*inputs["scores"].shape, dtype=dtype)
    perform(forced.op, inputs)
    extra = HERE.extra_bytes(lambda: perform(forced.op, inputs))
    assert extra <= MIB, f"{extra} bytes"  # a float32 copy takes 16 MiB


@pytest.mark.parametrize("run", runs(("attention_scores", "aggregate_attention")))
def test_memory_of_views(forced: Run, no_kernels: None):
    """One index for 1024 samples, and features or keys that lie apart, are not copied."""
    index = torch.arange(256, device=HERE.device)
    if forced.op == "aggregate_attention":
        inputs = {"attention": empty(1024, 1, 8, 256).transpose(2, 3)}
    else:
        inputs = {"query": empty(1, 1, 256, 8), "key": empty(1024, 1, 8, 256).transpose(2, 3)}
    inputs["query_index"] = index
    perform(forced.op, inputs)
    extra = HERE.extra_bytes(lambda: perform(forced.op, inputs))
    assert extra <= MIB, f"{extra} bytes"


# Sizes

FAR = 1 << 31  # elements


def need(amount: int) -> None:
    """Skips where there is no room for so many bytes."""
    room = HERE.free_bytes()
    if amount > room:
        pytest.skip(f"needs {amount >> 30} GiB of memory, {room >> 30} are free")


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    """Returns integers that every dtype holds."""
    generator = torch.Generator(HERE.device).manual_seed(0)
    some = {"generator": generator, "device": HERE.device}
    if dtype == torch.float32:
        return torch.rand(shape, **some)
    return torch.randint(-128, 128, shape, dtype=torch.int8, **some).to(dtype)


def ids(batch: int, width: int, high: int) -> Tensor:
    generator = torch.Generator(HERE.device).manual_seed(1)
    return torch.randint(-1, high, (batch, width), generator=generator, device=HERE.device)


def many_rows(op: str, batch: int, tokens: int, width: int) -> dict:
    if op == "gather_tokens":
        rows = values(batch, tokens, width, dtype=torch.bfloat16)
        return {"tokens": rows, "ids": ids(batch, tokens, tokens)}
    if op == "restore_tokens":
        return {
            "visible": values(batch, tokens // 2, width, dtype=torch.bfloat16),
            "ids_restore": ids(batch, tokens, tokens),
            "fill": values(width, dtype=torch.bfloat16),
        }
    if op == "gather_tokens_backward":
        grad = values(batch, tokens, width, dtype=torch.bfloat16)
        return {"grad": grad, "ids": ids(batch, tokens, tokens), "tokens": tokens}
    if op == "restore_tokens_backward":
        grad = values(batch, tokens, width, dtype=torch.bfloat16)
        return {"grad": grad, "ids": ids(batch, tokens, tokens), "visible": 5, "fill": tokens - 5}
    if op == "random_masking":
        rows = values(batch, tokens, width, dtype=torch.bfloat16)
        noise = values(batch, tokens, dtype=torch.float32)
        return {"tokens": rows, "mask_ratio": 0.75, "noise": noise}
    return {"scores": values(batch, tokens * width, dtype=torch.float32), "mask_ratio": 0.3}


FAR_OPS = (
    *("gather_tokens", "gather_tokens_backward", "restore_tokens", "restore_tokens_backward"),
    *("random_masking", "select_tokens"),
)


@pytest.mark.large
@pytest.mark.parametrize("width", [8, 7])  # rows that are copied by 16 bytes, and by 2
@pytest.mark.parametrize("run", runs(FAR_OPS))
def test_more_elements_than_32_bits_count(forced: Run, width: int):
    tokens, elements, part = (8, 1 << 9, 3) if DRY else (128, FAR, 4096)
    batch = elements // (tokens * width) + part + 1
    bytes_of_one = 24 if forced.op == "select_tokens" else 8
    need(elements * bytes_of_one + (4 << 30) * (not DRY))
    inputs = many_rows(forced.op, batch, tokens, width)
    outputs = perform(forced.op, inputs)
    for first in (0, batch - part):  # the second one is what 32 bits do not reach

        def rows_of(x: Any, first: int = first) -> Any:
            return x[first : first + part] if isinstance(x, Tensor) and len(x) == batch else x

        some = {name: rows_of(x) for name, x in inputs.items()}
        with sma_fast.use_backend("reference"):
            expected = perform(forced.op, some)
        assert_same(pytree.tree_map(rows_of, outputs), expected)


def far_apart(x: Tensor) -> Tensor:
    """Returns x with its samples more than 2^31 elements apart."""
    if x.shape[0] < 2:
        return x
    step = FAR + 64
    buffer = torch.empty(step * (x.shape[0] - 1) + x[0].numel(), dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, (step, *x.contiguous().stride()[1:]))
    return view.copy_(x)


FAR_APART = {
    "attention_scores": ("query", "key"),
    "aggregate_attention": ("attention",),
    "gather_tokens": ("tokens",),
    "restore_tokens": ("visible", "fill"),
    "self_guided_masking": ("query", "key", "tokens"),
    "random_masking": ("tokens",),
}


@pytest.mark.large
@pytest.mark.parametrize("run", runs(FAR_APART))
def test_samples_far_apart(forced: Run):
    builder, options = SMALL[forced.op]
    more = {"fill": "rows"} if forced.op == "restore_tokens" else {"batch": 2}
    inputs = builder(torch.bfloat16, **options | more)
    inputs.pop("seed", None)
    inputs = to_device(inputs, HERE.device)
    expected = perform(forced.op, inputs)
    for name in FAR_APART[forced.op]:
        first = inputs[name][0] if isinstance(inputs[name], list) else inputs[name]
        if not DRY:  # where what is never touched takes no room
            need((len(first) - 1) * FAR * first.element_size() + (1 << 30))
        far = far_apart(first)
        given = [far, *inputs[name][1:]] if isinstance(inputs[name], list) else far
        assert_same(perform(forced.op, inputs | {name: given}), expected)
        del far, given


# Indices out of range

OUTSIDE = {  # argument, and how many there are of what it counts
    "attention_scores": ("query_index", lambda x: x["query"].shape[2]),
    "aggregate_attention": ("query_index", lambda x: x["attention"].shape[2]),
    "gather_tokens": ("ids", lambda x: x["tokens"].shape[1]),
    "gather_tokens_backward": ("ids", lambda x: x["tokens"]),
    "restore_tokens": ("ids_restore", lambda x: x["visible"].shape[1] + x["ids_restore"].shape[1]),
    "restore_tokens_backward": ("ids", lambda x: x["visible"] + x["ids"].shape[1]),
    "self_guided_masking": ("query_index", lambda x: x["query"].shape[2]),
}
BEYOND = (None, 2**31, 2**32, 2**32 + 1, 2**40, -(2**32), -(2**62))  # None: the first one outside
HEADS_OF = ("attention_scores", "aggregate_attention", "self_guided_masking")


@pytest.mark.parametrize("bad", BEYOND)
@pytest.mark.parametrize("run", runs(OUTSIDE))
def test_positions_out_of_range_read_nothing(forced: Run, bad: int | None):
    inputs = forced.inputs()
    name, count = OUTSIDE[forced.op]
    high = count(inputs)
    outside, nothing = inputs[name].clone(), inputs[name].clone()
    outside[0, 1] = high if bad is None else bad
    outside[-1, 0] = -2
    nothing[0, 1] = nothing[-1, 0] = -1
    outputs = perform(forced.op, inputs | {name: outside})
    expected = perform(forced.op, inputs | {name: nothing})
    assert_same(outputs, expected)


@pytest.mark.parametrize("bad", BEYOND)
@pytest.mark.parametrize("run", runs(HEADS_OF))
def test_heads_out_of_range_select_nothing(forced: Run, bad: int | None):
    inputs = forced.inputs(by_head=True)
    heads = inputs["attention" if forced.op == "aggregate_attention" else "query"].shape[1]
    head, query = inputs["head_index"].clone(), inputs["query_index"].clone()
    head[0, 1] = heads if bad is None else bad
    head[-1, 0] = -1
    query[0, 1] = query[-1, 0] = -1
    if forced.op == "self_guided_masking":  # or the query's own token would be masked first
        inputs["mask_queries"] = False
    outputs = perform(forced.op, inputs | {"head_index": head})
    expected = perform(forced.op, inputs | {"query_index": query})
    assert_same(outputs, expected)


@pytest.mark.parametrize("run", runs(("select_tokens", "draw_queries")))
def test_numbers_below_zero_are_zero(forced: Run):
    inputs = forced.inputs()
    name = "num_masked" if forced.op == "select_tokens" else "rows"
    rows = inputs[name]
    below, none = rows.clone(), rows.clone()
    below[-1], none[-1] = -(2**40), 0
    assert_same(
        perform(forced.op, inputs | {name: below}), perform(forced.op, inputs | {name: none})
    )


@pytest.mark.parametrize("run", runs(OUTSIDE))
def test_positions_out_of_range_raise_when_looked_at(forced: Run, monkeypatch):
    inputs = forced.inputs()
    name, count = OUTSIDE[forced.op]
    high = count(inputs)
    monkeypatch.setenv("SMA_FAST_CHECK", "1")
    monkeypatch.setattr(reference, "check_index", check_index)  # dry, too
    perform(forced.op, inputs)
    for value in (high, -2, 2**40):
        bad = inputs[name].clone()
        bad[-1, 0] = value
        with pytest.raises(ValueError, match=rf"^{name}.*: holds {value}, allowed is -1 to"):
            perform(forced.op, inputs | {name: bad})


check_index = reference.check_index  # before a test leaves it out


# One answer

ROWS = ((3, 100), (3, 9000)) if DRY else ((4096, 4096), (64, 262_144), (3, 1_048_576))
CHOICES = {
    "highest": {"mask_ratio": 0.3},
    "some at random": {"mask_ratio": 0.3, "random_fraction": 0.5},
    "of a pool": {"mask_ratio": 0.3, "pool_ratio": 0.6},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("scores", ["normal", "ties", "special", "last bits"])
@pytest.mark.parametrize("run", runs(("select_tokens",)))
def test_the_same_tokens_from_the_same_scores(forced: Run, scores: str, choice: str):
    for batch, tokens in ROWS:
        if DRY and tokens > 100 and forced.implementation.backend == "triton":
            continue  # in the interpreter
        inputs = select_inputs(
            batch=batch, tokens=tokens, scores=scores, padding="scattered", **CHOICES[choice]
        )
        inputs = to_device(inputs, HERE.device)
        outputs = call("select_tokens", inputs)
        with sma_fast.use_backend("reference"):
            assert_same(outputs, call("select_tokens", inputs))


@pytest.mark.parametrize("run", runs(("draw_queries", "random_masking")))
def test_the_same_draws_from_the_same_noise(forced: Run):
    for batch, tokens in ROWS:
        if DRY and tokens > 100:
            continue
        inputs = SMALL[forced.op][0](batch=batch, tokens=tokens)
        inputs = to_device(inputs, HERE.device)
        outputs = perform(forced.op, inputs)
        with sma_fast.use_backend("reference"):
            assert_same(outputs, perform(forced.op, inputs))
