"""How a GPU is timed, with one played by the clock."""

import contextlib
import functools
import itertools
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

import sma_fast
from bench import (
    bench_gather_tokens,
    bench_select_tokens,
    gpu_rounds,
    harness,
    memory,
    roofline,
    shapes,
    variants,
)


class ClockEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "ClockEvent") -> float:
        return (end.time - self.time) * 1e3


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An L2 of 1000 bytes, and graphs that call what they hold."""
    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "Event", ClockEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_rounds, "synchronises", lambda call: False)

    def captured(calls):
        replay = functools.partial(gpu_rounds._one_by_one, calls)
        return SimpleNamespace(replay=replay), calls[0]()

    monkeypatch.setattr(gpu_rounds, "captured", captured)


def test_copies_are_other_memory_and_enough() -> None:
    x, y = torch.arange(10.0), torch.arange(5.0)
    call = functools.partial(torch.add, x, other=y.repeat(2))
    found = gpu_rounds.copies(call, 200)  # 80 bytes a call
    assert len(found) == 3 and found[0] is call
    assert all(torch.equal(one(), call()) for one in found)
    assert len({one.args[0].data_ptr() for one in found}) == 3
    assert len({one.keywords["other"].data_ptr() for one in found}) == 3
    assert len(gpu_rounds.copies(call, 80)) == 1
    assert len(gpu_rounds.copies(call, 10**9)) == gpu_rounds.MAX_COPIES
    assert gpu_rounds.copies(functools.partial(torch.rand, 3), 10**9)[1:] == []
    trained = functools.partial(torch.neg, torch.zeros(1, requires_grad=True))
    assert gpu_rounds.copies(trained, 10**9) == [trained]


@pytest.mark.parametrize("graph", (True, False))
def test_rounds(played_gpu: None, graph: bool) -> None:
    used: list[int] = []
    answers: list[torch.Tensor] = []

    def work(x: torch.Tensor) -> torch.Tensor:
        used.append(x.data_ptr())
        return x + 1

    rounds = gpu_rounds.Rounds(functools.partial(work, torch.zeros(100)), answers.append, graph)
    assert rounds.timing == ("graph" if graph else "events")
    assert rounds.copies == 10 <= rounds.calls <= gpu_rounds.MAX_CALLS
    assert [float(answer[0]) for answer in answers] == [1.0] * graph
    used.clear()
    assert 0 < rounds.seconds() < 1
    assert len(used) == 2 * rounds.calls  # one round goes ahead
    assert len(set(used[:10])) == 10


def test_slow_calls_are_not_captured(played_gpu: None) -> None:
    x = torch.zeros(10_000)
    call = functools.partial(lambda x: time.sleep(2 * gpu_rounds.GRAPH_BELOW), x)
    rounds = gpu_rounds.Rounds(call, pytest.fail, True)
    assert (rounds.timing, rounds.copies, rounds.calls) == ("events", 1, 1)


class Benchmark:
    """What harness.measure needs of pytest-benchmark's fixture."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict = {}

    def pedantic(self, target, rounds: int, teardown) -> None:
        for _ in range(rounds):
            target()
            teardown()


@pytest.mark.parametrize("shape", ("physics", "4096x4096"))
def test_benchmarks_take_their_times_from_the_gpu(
    played_gpu: None, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    benchmark = Benchmark()
    case = bench_select_tokens.set_up(harness.Settings(quick=True, compile=False), shape)
    if shape == "4096x4096":
        case.shape = shapes.SHAPES[shape]  # as many samples as loops are not timed on

    def without_memory():
        raise torch.OutOfMemoryError

    case.peers["eager"] = without_memory
    monkeypatch.setattr(harness, "our_backends", lambda op, device: ["cuda"])
    monkeypatch.setattr(memory, "peak_of", lambda call, device: 7)
    monkeypatch.setattr(roofline, "rates", lambda *_: roofline.Rates(1e9, 1e9))
    harness.measure(benchmark, harness.Settings(device="cuda", quick=True), case)
    row = benchmark.extra_info
    assert row["device"] == "cuda" and row["extra_bytes"] == 7 and row["timing"] == "graph"
    assert row["rounds"] == 2 and row["ours_s"] > 0 and row["over_floor"] > 0
    assert row["peers"]["topk+scatter+nonzero"]["ratio"] > 0
    assert row["skipped"]["eager"] == "out of memory"
    loops = row["skipped"].get("published")
    assert loops == ("Python loops over 4096 samples" if shape == "4096x4096" else None)


def test_what_goes_wrong_with_others_leaves_our_row(
    played_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers are left out; another backend of ours fails the benchmark, once the rest is filed."""
    benchmark = Benchmark()
    case = bench_select_tokens.set_up(harness.Settings(quick=True, compile=False), "physics")
    good = case.peers["eager"]
    forced, timing = [], []

    def wrong():
        mask, ids = good()
        return ~mask, ids

    def not_captured():
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def at_first_good(fail):
        calls = itertools.count()
        return lambda: fail() if next(calls) else good()

    def good_until_the_rounds():
        return not_captured() if timing else good()

    def no_memory():
        raise torch.OutOfMemoryError

    case.peers = {
        "good": good,
        "wrong": wrong,
        "wrong later": at_first_good(wrong),
        "without a plan": at_first_good(not_captured),
        "no memory": at_first_good(no_memory),
        "in a round": good_until_the_rounds,
    }
    case.peers = {name: functools.partial(call) for name, call in case.peers.items()}
    case.peers["not at all"] = "not measured: pip install it"
    ours = case.ours

    def answer():
        selection = ours()
        return selection._replace(mask=~selection.mask) if forced else selection

    case.ours = functools.partial(answer)

    @contextlib.contextmanager
    def use_backend(name: str):
        if name == "triton":
            forced.append(name)
        yield
        forced.clear()

    def pedantic(*arguments, **options):
        timing.append(True)
        Benchmark.pedantic(benchmark, *arguments, **options)

    benchmark.pedantic = pedantic

    monkeypatch.setattr(sma_fast, "use_backend", use_backend)
    monkeypatch.setattr(harness, "our_backends", lambda op, device: ["cuda", "triton"])
    monkeypatch.setattr(memory, "peak_of", lambda call, device: 7)
    monkeypatch.setattr(roofline, "rates", lambda *_: roofline.Rates(1e9, 1e9))
    with pytest.raises(AssertionError, match=r"^ours \(triton\): a wrong answer"):
        harness.measure(benchmark, harness.Settings(device="cuda", quick=True), case)
    row = benchmark.extra_info
    assert row["ours_s"] > 0 and row["peers"].keys() == {"good"}
    assert row["skipped"].pop("ours (triton)").startswith("a wrong answer")
    for name in ("wrong", "wrong later"):
        assert row["skipped"].pop(name).startswith("a wrong answer: ")
    said = "RuntimeError: operation not permitted when stream is capturing"
    assert row["skipped"] == {
        "without a plan": said,
        "no memory": "out of memory",
        "in a round": said,
        "not at all": "not measured: pip install it",
    }


def test_ours_that_is_wrong_is_not_timed() -> None:
    case = bench_select_tokens.set_up(harness.Settings(quick=True, compile=False), "physics")
    ours = case.ours
    case.ours = lambda: ours()._replace(mask=~ours().mask)
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="select_tokens on physics: ours is wrong, nothing"):
        harness.measure(benchmark, harness.Settings(quick=True, compile=False), case)
    assert benchmark.extra_info == {}


def test_a_peer_that_breaks_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    skipped: dict[str, str] = {}
    rest = variants.Rest([variants.Variant("peer", broken, print, "cuda", ours=False)], skipped)
    with pytest.raises(RuntimeError, match="^peer broke the GPU's context: .*illegal memory"):
        rest.each(lambda variant: variant.call())


def test_a_capture_that_fails_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ["first"]
    side = SimpleNamespace(wait_stream=lambda other: None)
    first = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(graph, stream):
        streams.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: first)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    calls = itertools.count()

    def call():
        if next(calls):
            raise RuntimeError("not in a capture")

    with pytest.raises(RuntimeError, match="not in a capture"):
        gpu_rounds.captured([call])
    assert streams == ["first", side, first]


def test_rates_are_those_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls in a row: the host's time for one, and to wait for it, is not counted."""
    now = {"host": 0.0, "gpu": 0.0}
    took = iter([5.0, *[1.0, 1.0] * roofline.IN_A_ROW, *[3.0, 0.5] * roofline.IN_A_ROW * 9])

    def call():
        now["host"] += 0.1
        now["gpu"] = max(now["gpu"], now["host"]) + next(took)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            self.time = max(now["gpu"], now["host"])

        def synchronize(self) -> None:
            now["host"] = max(now["host"], self.time) + 100.0

        def elapsed_time(self, end: "Event") -> float:
            return (end.time - self.time) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert roofline._best(call, 5, "cuda") == pytest.approx(1.0)


def test_full_batch_leaves_shapes_that_name_theirs() -> None:
    full = harness.Settings(batch="full")
    assert full.shape("protein").batch == 1024 and full.shape("2x16").batch == 2
    assert full.shape("4096x4096").batch == 4096
    assert harness.Settings(batch=8).shape("long").batch == 8
    quick = harness.Settings(quick=True, compile=False, batch="full")
    assert bench_gather_tokens.forward(quick, "vit").ours().shape == (3, 16, 8)
