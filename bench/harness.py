"""One set-up for every benchmark: check, then time ours and its peers in turns.

Traps avoided here:
- A wrong answer is fast: each variant's answer is checked first. Where ours is wrong nothing is
  timed; a peer that is wrong or fails is left out, and the row says why.
- A machine's speed drifts: variants take turns, ours, peer, peer, ours, ..., in one process, and
  ratios are those of medians. A slow variant sits some turns out.
- Fresh memory is slow: glibc hands large blocks back to the system when they are freed, and the
  next call pays for page faults, several times the cost of a copy. That is what plain PyTorch on a
  CPU costs its users, so it is the default here; `--keep-memory` makes glibc keep what is freed,
  for all variants alike. The report says which of the two it was.
- One variant's garbage is another's time: the small blocks that Python loops free are joined by the
  next large allocation, whoever asks for it (0.2 ms here, after the published formula). A large
  block is asked for and given back before each round, outside the time taken.
- A GPU answers late, and its L2 remembers: bench.gpu_rounds. Only a call's fixed cost is taken by
  the clock there.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sma_fast
from bench import memory, roofline
from bench.shapes import FULL_BATCH, SHAPES, Shape, scaled_down
from bench.variants import Rest, Variant, tidy_memory

BUDGET = 4.0  # seconds of timing for one benchmark, shared by its variants
FIXED_COST_CALLS = 500  # in a round, where only a call's fixed cost is left
GPU_BUDGET = 1.0  # in place of BUDGET
LOOPS = 1024  # samples, at most, that the published formula's Python loops are timed on there


@dataclasses.dataclass(frozen=True)
class Settings:
    """How this run was asked for."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int | str | None = None  # instead of each shape's own; "full" fills a large GPU
    quick: bool = False
    compile: bool = True
    keep_memory: bool = False

    def shape(self, name: str) -> Shape:
        shape = SHAPES[name]
        if self.batch is not None and not shape.fixed_batch:
            batch = FULL_BATCH[name] if self.batch == "full" else self.batch
            shape = dataclasses.replace(shape, batch=batch)
        return scaled_down(shape) if self.quick else shape

    def only_on_gpu(self) -> None:
        """Skips a benchmark whose shape is a GPU's."""
        if self.device == "cpu" and not self.quick:
            pytest.skip("a shape for GPUs")


@dataclasses.dataclass
class Case:
    """One benchmark: one op on one shape.

    `check(answer, ours)` raises where an answer is wrong. A peer that is a string was left out, and
    the string says why.
    """

    op: str
    part: str  # "forward", "backward", ...
    shape: Shape
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any] | str]
    check: Callable[[Any, bool], None]
    stages: list[roofline.Stage] = dataclasses.field(default_factory=list)
    calls: int = 1  # in a round, on the CPU


def compiled(settings: Settings, function: Callable, *args: Any) -> Callable[[], Any] | str:
    """Returns a call of `function` under torch.compile for just these shapes, or why not."""
    if not settings.compile:
        return "--no-compile"
    torch._dynamo.reset()  # the limit of recompilations counts over all shapes
    return functools.partial(torch.compile(function, dynamic=False), *args)


def backward(
    function: Callable, arguments: tuple, inputs: tuple, grad: torch.Tensor
) -> Callable[[], Any]:
    """Returns a call of the backward pass of `function` alone: the gradients of `inputs`."""
    output = function(*arguments)
    return functools.partial(torch.autograd.grad, output, inputs, grad, retain_graph=True)


def fixed_cost(case: Case, part: str) -> Case:
    """Returns `case`, of a tiny shape, as a measure of what a call costs beside its work."""
    eager = {"eager": case.peers["eager"]}
    return dataclasses.replace(case, part=part, peers=eager, stages=[], calls=FIXED_COST_CALLS)


def published_fits(shape: Shape, settings: Settings) -> str | None:
    """Returns why the (B, H, M, N) map of the published formula cannot be held, or None."""
    numbers = shape.batch * shape.heads * shape.queries * shape.tokens
    needed = 3 * numbers * settings.dtype.itemsize  # logits, their softmax, and what is reduced
    free = memory.free_bytes(settings.device)
    if needed <= free:
        return None
    return f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def reference(call: Callable[[], Any]) -> Any:
    """Returns the reference's answer; skips what it has no memory for."""
    try:
        with sma_fast.use_backend("reference"):
            return call()
    except torch.OutOfMemoryError:
        pytest.skip("the reference needs more memory than there is")


def our_backends(op: str, device: str) -> list[str]:
    """Returns the backends to time: first the one that answers, then the others that could.

    The reference is among them only where it answers, and Triton's interpreter never: its time
    means nothing.
    """
    if op not in sma_fast.backends():
        return ["model"]  # a whole step, of many ops
    states = sma_fast.backends()[op][device]
    answers = next(backend for backend, state in states.items() if state == "answers")
    ready = [backend for backend, state in states.items() if state == "ready"]
    left_out = ("reference", "triton") if device == "cpu" else ("reference",)
    return [answers, *(backend for backend in ready if backend not in left_out)]


def measure(benchmark: Any, settings: Settings, case: Case) -> None:
    """Checks all variants of `case`, times them in turns and files the result with `benchmark`.

    Raises:
        AssertionError: where ours is wrong; another backend of ours only after the rest is filed.
    """
    kernel = f"{case.op}_backward" if case.part == "backward" else case.op
    backend, *others = our_backends(kernel, settings.device)
    skipped = {name: why for name, why in case.peers.items() if isinstance(why, str)}
    if settings.device == "cuda" and case.shape.batch > LOOPS and "published" in case.peers:
        skipped["published"] = f"Python loops over {case.shape.batch} samples"

    def variant(name: str, call: Callable, ours: bool, forced: str | None = None) -> Variant:
        def check(answer: Any) -> None:
            case.check(answer, ours)

        return Variant(name, call, check, settings.device, ours, forced)

    ours = variant("ours", case.ours, True)
    every = [variant(f"ours ({name})", case.ours, True, name) for name in others]
    every += [
        variant(name, call, False) for name, call in case.peers.items() if name not in skipped
    ]
    rest = Rest(every, skipped)
    try:
        ours.answer()
    except AssertionError as error:
        where = f"{case.op} on {case.shape.name}"
        raise AssertionError(f"{where}: ours is wrong, nothing is timed: {error}") from error
    rest.each(Variant.answer)
    if benchmark.disabled:
        benchmark.pedantic(case.ours)
        _assert_none(rest.failed)
        return

    extra_bytes = memory.peak_of(case.ours, "cuda") if settings.device == "cuda" else None
    budget = GPU_BUDGET if settings.device == "cuda" else BUDGET
    given = (budget / (1 + len(rest.variants)), case.calls, case.part != "backward", settings.quick)
    ours.plan(*given)
    rest.each(lambda variant: variant.plan(*given))
    turns = itertools.count()

    def turn_of_the_rest() -> None:
        now = next(turns)

        def turn(variant: Variant) -> None:
            every = max(1, ours.rounds // variant.rounds)
            if now < ours.rounds and now % every == 0:
                variant.seconds.append(variant.round())

        rest.each(turn)
        tidy_memory()

    # pedantic times ours; its teardown, outside the time taken, gives the others their turn
    if ours.on_gpu:  # pedantic only counts the rounds
        benchmark.pedantic(
            lambda: ours.seconds.append(ours.round()),
            rounds=ours.rounds,
            teardown=turn_of_the_rest,
        )
    else:
        benchmark.pedantic(
            case.ours, rounds=ours.rounds, iterations=ours.calls, teardown=turn_of_the_rest
        )
        ours.seconds = list(benchmark.stats.stats.data)
    result = _result(case, settings, backend, ours, rest.variants, skipped)
    benchmark.extra_info.update(result, extra_bytes=extra_bytes)
    _assert_none(rest.failed)


def _assert_none(failed: list[str]) -> None:
    assert not failed, "; ".join(failed)


def _result(
    case: Case,
    settings: Settings,
    backend: str,
    ours: Variant,
    rest: list[Variant],
    skipped: dict[str, str],
) -> dict[str, Any]:
    # what goes into the JSON: one row of the report
    median = statistics.median(ours.seconds)
    rates = roofline.rates(settings.device, settings.dtype, settings.quick)
    floor = sum(stage.seconds(rates) for stage in case.stages)
    return {
        "op": case.op,
        "part": case.part,
        "shape": case.shape.name,
        "batch": case.shape.batch,
        "device": settings.device,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "backend": backend,
        "ours_s": median,
        "ours_min_s": min(ours.seconds),
        "timing": ours.timing,
        "rounds": len(ours.seconds),
        "bytes": sum(stage.bytes for stage in case.stages),
        "operations": sum(stage.operations for stage in case.stages),
        "stages": [{**s._asdict(), "floor_s": s.seconds(rates)} for s in case.stages],
        **rates._asdict(),
        "floor_s": floor if case.stages else None,
        "over_floor": median / floor if case.stages else None,
        "peers": {
            variant.name: {
                "median_s": statistics.median(variant.seconds),
                "min_s": min(variant.seconds),
                "timing": variant.timing,
                "rounds": len(variant.seconds),
                "ratio": statistics.median(variant.seconds) / median,
            }
            for variant in rest
        },
        "skipped": skipped,
    }


def measure_memory(benchmark: Any, settings: Settings, op: str, name: str) -> None:
    """Files the peak memory of one call, ours beside plain PyTorch's."""
    device, dtype, quick = settings.device, settings.dtype, settings.quick
    ours = benchmark.pedantic(memory.peak_bytes, ("ours", name, device, dtype, quick))
    eager = memory.peak_bytes("eager", name, device, dtype, quick)
    benchmark.extra_info.update(
        op=op,
        part="peak memory",
        shape=name,
        batch=SHAPES[name].batch,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        backend=our_backends(op, device)[0],
        peak_bytes=ours,
        peers={"eager": {"peak_bytes": eager}},
        skipped={},
    )
