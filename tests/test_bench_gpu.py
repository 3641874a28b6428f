"""`make gpu`'s program on a CPU, and its rounds with a GPU played by the clock."""

import functools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
sys.path.append(str(Path(__file__).parent.parent))  # where bench lies, behind what is installed

from bench import (  # noqa: E402
    bench_gather_tokens,
    bench_select_tokens,
    gpu,
    gpu_rounds,
    gpu_stages,
    harness,
    machine,
    memory,
    report,
    report_gpu,
    roofline,
    shapes,
    targets,
)

SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
while [ "$1" != "-m" ]; do program=$1; shift; done
"$program" "$@" || exit
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def a_single_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu_stages.Run("rows", "float32", None, "bench_gather_tokens and vit")
    monkeypatch.setattr(gpu_stages, "RUNS", (run,))
    monkeypatch.setattr(gpu_stages, "SANITIZED", ("tests/test_fixtures.py",))
    monkeypatch.setattr(gpu_stages, "TOOLS", ("memcheck",))


def call(folder: Path, *options: str) -> tuple[int, dict]:
    """Returns the status and the JSON of a quick call on the CPU."""
    status = gpu.main(["--quick", "--device", "cpu", "--out", str(folder), *options])
    (file,) = folder.glob("*.json")
    return status, json.loads(file.read_text())


def test_all_stages(
    a_single_run: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(SANITIZER)
    (tools / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu_stages, "SANITIZED", ("tests/test_select_tokens.py",))
    status, result = call(out)
    assert status == 0, capsys.readouterr().out
    assert result["tests"]["passed"] > 5 and result["tests"]["failed"] == 0
    assert result["sources"] == machine.sources() and result["quick"] and result["config"]["torch"]
    memcheck = result["sanitizer"]["memcheck"]
    assert memcheck["status"] == "passed" and memcheck["said"] == ["ERROR SUMMARY: 0 errors"]
    assert memcheck["passed"] > 0 and "kns=sma" in memcheck["command"]
    assert result["rates"]["float32"].keys() >= {"copy_rate", "matrix_rate", "copy_rate_after"}
    tests = [row["test"].partition("::")[2] for row in result["rows"]]
    assert tests == ["bench_gather_tokens[vit]", "bench_gather_tokens_backward[vit]"]
    wanted = {"op", "shape", "batch", "dtype", "bytes", "operations", "floor_s", "over_floor"}
    assert all(row.keys() > wanted and row["peers"]["eager"]["ratio"] for row in result["rows"])
    assert str(gpu_stages.ROOT) not in json.dumps(result)

    # again: nothing is left to do, and nothing is lost
    monkeypatch.setattr(gpu_stages, "pytest", lambda *_: pytest.fail("a test ran again"))
    status, again = call(out, "--only", "tests")
    assert status == 0 and again == result
    printed = report_gpu.markdown(again)
    for target in targets.GPU_TARGETS:
        assert (
            f"| `{target.op}` | {target.shape} | {target.part} | {target.batch_size} |" in printed
        )


def test_failures_are_kept_and_do_not_stop_the_next(
    a_single_run: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    nonsense = [sys.executable, "-m", "pytest", "--nonsense"]
    monkeypatch.setattr(gpu_stages, "pytest", lambda *_: nonsense)
    status, result = call(tmp_path)
    assert status == 1
    assert result["tests"]["files"]["tests/test_testing.py"]["status"] == "failed"
    assert "nonsense" in "".join(result["benchmarks"]["rows"]["tail"])
    assert result["rows"] == [] and set(result["sanitizer"]) == {"memcheck"}
    assert "tests: FAILED" in capsys.readouterr().out


def test_a_program_out_of_time_is_ended_with_what_it_printed() -> None:
    program = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    ended = gpu_stages.run([sys.executable, "-c", program], start + 2)
    assert ended.status == "timed out" and ended.output == "begun\n"
    assert time.monotonic() - start < 30
    assert ended.summary()["tail"] == ["begun"]
    assert gpu_stages.run([], time.monotonic() - 1).status == "timed out"


def a_result(**changed) -> dict:
    given = {"date": "2026-01-01", "machine": "A GPU", "sources": "x", "commit": None}
    return {
        **given,
        "uncommitted_changes": None,
        "rows": [],
        "rates": {},
        "quick": False,
        **changed,
    }


def test_join() -> None:
    row = {"run": "rows", "test": "a", "ours_s": 1.0}
    first = a_result(rows=[row], tests={"files": {"a": 1}, "passed": 1}, rates={"float32": 1})
    later = {"tests": {"files": {"b": 2}, "passed": 3}, "sanitizer": {"memcheck": 1}}
    later |= {"rows": [{**row, "ours_s": 2.0}, {**row, "test": "b"}], "commit": "c"}
    joined = gpu.joined(first, a_result(**later))
    assert [row["ours_s"] for row in joined["rows"]] == [2.0, 1.0]
    assert joined["tests"] == {"files": {"a": 1, "b": 2}, "passed": 3}
    assert joined["sanitizer"] and joined["commit"] == "c" and joined["rates"] == {"float32": 1}
    with pytest.raises(ValueError, match="sources: got y beside x"):
        gpu.joined(first, a_result(sources="y"))


def test_commit_comes_in_where_the_sources_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "commit", lambda: {"commit": "c", "uncommitted_changes": False})
    assert gpu.with_commit(a_result())["commit"] is None
    assert gpu.with_commit(a_result(sources=machine.sources()))["commit"] == "c"


def test_a_quick_run_is_not_saved_among_the_results(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--quick"])
    assert "--out: got none" in capsys.readouterr().err


def test_readme_s_table_of_a_gpu() -> None:
    rate = {"copy_rate": 4e12, "matrix_rate": 8e14}
    row = {"op": "gather_tokens", "part": "forward", "shape": "vit", "dtype": "bfloat16"}
    row |= {"batch": 4096, "device": "cuda", "backend": "cuda", "ours_s": 1e-3, "bytes": 3.6e9}
    row |= {"floor_s": 9e-4, "over_floor": 1.11, "skipped": {}, "extra_bytes": 3 * 2**20, **rate}
    row |= {"peers": {"ours (triton)": {"ratio": 1.25}}}
    config = {"torch": "2", "triton": "3", "python": "3"}
    result = a_result(rows=[row], rates={"bfloat16": rate}, config=config, nvcc="13.0", commit="c")
    result |= {"tests": {"files": {"f": {"status": "timed out"}}, "passed": 7, "failed": 1}}
    printed = report_gpu.markdown(result)
    line = "1 ms (cuda) | 1.11 | ours (triton) 1.25 | ≥ 85% of the copy rate | yes |"
    assert f"| `gather_tokens` | vit | forward | 4096 | bfloat16 | {line}" in printed
    assert "7 passed, 1 failed, 0 error, 0 skipped, out of time: f" in printed
    assert "`gather_tokens` 3 MiB on vit, bfloat16 (NO)" in printed
    assert "compute-sanitizer: not run" in printed
    assert "targets met: 1 of 1" in report_gpu.text(result)
    assert report.file_name(result) == "2026-01-01-a-gpu.json"


def test_microseconds_on_a_gpu_are_those_of_graph_replay() -> None:
    (target,) = (
        t for t in targets.GPU_TARGETS if t.measure == "microseconds" and t.shape == "protein"
    )
    row = {"ours_s": 20e-6, "timing": "graph"}
    assert target.met(row) and not target.met({**row, "ours_s": 26e-6})
    assert target.met({**row, "timing": "events"}) is None


def test_no_benchmark_is_left_out() -> None:
    there = {f"bench/{file.name}" for file in (gpu_stages.ROOT / "bench").glob("bench_*.py")}
    assert set(gpu_stages.FILES) == there


def test_targets_name_shapes_at_their_batch() -> None:
    assert set(shapes.FULL_BATCH) == {*shapes.ALL, "patches", "vit-b16"}
    for target in targets.GPU_TARGETS:
        batches = {shapes.FULL_BATCH.get(target.shape), shapes.SHAPES[target.shape].batch, 8}
        assert target.device == "cuda" and target.batch_size in batches


# A GPU played by the clock


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


def test_full_batch_leaves_shapes_that_name_theirs() -> None:
    full = harness.Settings(batch="full")
    assert full.shape("protein").batch == 1024 and full.shape("2x16").batch == 2
    assert full.shape("4096x4096").batch == 4096
    assert harness.Settings(batch=8).shape("long").batch == 8
    quick = harness.Settings(quick=True, compile=False, batch="full")
    assert bench_gather_tokens.forward(quick, "vit").ours().shape == (3, 16, 8)
