"""`make gpu`'s program on a CPU: stages, processes that die, what a later call does."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from bench import (
    gpu,
    gpu_benchmarks,
    gpu_processes,
    gpu_stages,
    gpu_tests,
    machine,
    report,
    report_gpu,
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
    run = gpu_benchmarks.Run("rows", "float32", None, "bench_gather_tokens and vit")
    monkeypatch.setattr(gpu_benchmarks, "RUNS", (run,))
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
    assert memcheck["passed"] > 0 and "kns=3sma4cuda" in memcheck["command"]
    assert result["rates"]["float32"].keys() >= {"copy_rate", "matrix_rate", "copy_rate_after"}
    tests = [row["test"].partition("::")[2] for row in result["rows"]]
    assert tests == ["bench_gather_tokens[vit]", "bench_gather_tokens_backward[vit]"]
    wanted = {"op", "shape", "batch", "dtype", "bytes", "operations", "floor_s", "over_floor"}
    assert all(row.keys() > wanted and row["peers"]["eager"]["ratio"] for row in result["rows"])
    assert str(gpu_processes.ROOT) not in json.dumps(result)
    assert result["tests"]["left"] == 0 and "outcomes" not in result["tests"]

    # again: nothing is left to do, and nothing is lost
    for stage in (gpu_tests, gpu_benchmarks):
        monkeypatch.setattr(stage, "each_test", lambda *_, **__: pytest.fail("it ran again"))
    status, again = call(out, "--only", "tests", "benchmarks")
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
    for stage in (gpu_tests, gpu_benchmarks, gpu_stages):
        monkeypatch.setattr(stage, "pytest", lambda *_: nonsense[:])
    status, result = call(tmp_path)
    assert status == 1
    assert result["tests"]["parts"]["0/1"]["status"] == "failed" and result["tests"]["left"] is None
    assert "nonsense" in "".join(result["benchmarks"]["rows"]["tail"])
    assert result["rows"] == [] and set(result["sanitizer"]) == {"memcheck"}
    assert "tests: FAILED" in capsys.readouterr().out


def test_no_sanitizer_is_no_proof(
    a_single_run: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(gpu_stages, "_compute_sanitizer", lambda: None)
    status, result = call(tmp_path, "--only", "sanitizer")
    assert status == 1 and "sanitizer: FAILED" in capsys.readouterr().out
    assert result["sanitizer"]["memcheck"]["status"].startswith("not run: no compute-sanitizer")


def test_benchmarks_go_on_with_what_is_missing(
    a_single_run: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    result: dict = {"rows": [], "rates": {}}
    asked = gpu_processes.Asked("cpu", True, "", lambda: None)
    told: list[tuple] = []
    filed = [
        [
            {"test": "f::a", "op": "x", "ours_s": 1.0, "copy_rate": 2.0, "matrix_rate": 3.0},
            {"test": "f::a", "outcome": "passed", "why": ""},
            {"test": "f::b", "outcome": "failed", "why": "its process ended"},
            {"test": "f::c", "op": "x", "ours_s": 1.0},  # another backend of ours failed
            {"test": "f::c", "outcome": "failed", "why": "ours (triton): a wrong answer"},
        ],
        [
            *({"test": f"f::{name}", "op": "x", "ours_s": 4.0} for name in "bc"),
            *({"test": f"f::{name}", "outcome": "passed", "why": ""} for name in "bc"),
            {"rates": {"float32": {"copy_rate": 5.0}}},
        ],
    ]

    def each_test(command, until, take, done, last):
        told.append((done, last))
        for line in filed[len(told) - 1]:
            take(line)
        return gpu_processes.Ended("passed", 1.0, "")

    monkeypatch.setattr(gpu_benchmarks, "each_test", each_test)
    assert not gpu_benchmarks.benchmarks(result, asked, 0.0)
    run = result["benchmarks"]["rows"]
    assert (run["passed"], run["failed"], run["complete"]) == (1, 2, False)
    assert run["failures"]["f::b"] == ["its process ended"]
    assert [row["test"] for row in result["rows"]] == ["f::a", "f::c"]
    assert result["rates"] == {"float32": {"copy_rate": 2.0, "matrix_rate": 3.0}}
    for _ in range(2):  # the second time nothing is started
        assert gpu_benchmarks.benchmarks(result, asked, 0.0)
    assert told == [([], []), (["f::a"], ["f::b", "f::c"])]
    assert run["complete"] and run["failures"] == {} and run["passed"] == 3
    assert [(row["test"], row["ours_s"]) for row in result["rows"]] == [
        *(("f::a", 1.0), ("f::b", 4.0), ("f::c", 4.0))
    ]


def test_a_program_out_of_time_is_ended_with_what_it_printed() -> None:
    program = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    ended = gpu_processes.run([sys.executable, "-c", program], start + 2)
    assert ended.status == "timed out" and ended.output == "begun\n"
    assert time.monotonic() - start < 30
    assert ended.summary()["tail"] == ["begun"]
    assert gpu_processes.run([], time.monotonic() - 1).status == "timed out"
    gpu_processes.STOP.set()  # as SIGTERM does
    try:
        program = [sys.executable, "-c", "import time; time.sleep(60)"]
        assert gpu_processes.run(program, time.monotonic() + 60).status == "timed out"
    finally:
        gpu_processes.STOP.clear()
    assert time.monotonic() - start < 30


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
    first = a_result(rows=[row], rates={"float32": 1})
    later = {"sanitizer": {"memcheck": 1}, "commit": "c"}
    later |= {"rows": [{**row, "ours_s": 2.0}, {**row, "test": "b"}]}
    joined = gpu.joined(first, a_result(**later))
    assert [row["ours_s"] for row in joined["rows"]] == [2.0, 1.0]
    assert joined["sanitizer"] and joined["commit"] == "c" and joined["rates"] == {"float32": 1}
    with pytest.raises(ValueError, match="sources: got y beside x"):
        gpu.joined(first, a_result(sources="y"))


def a_part(outcomes: dict[str, str], **others) -> dict:
    failures = {test: ["why"] for test, outcome in outcomes.items() if outcome == "failed"}
    return {"outcomes": outcomes, "failures": failures, **others}


def test_join_of_tests() -> None:
    first = a_part({"f::a": "passed", "f::b": "failed", "f::c": "failed"}, left=3)
    later = a_part({"f::b": "passed", "f::d": "skipped"}, left=None)
    for results in ((first, later), (later, first)):
        joined = gpu.joined(*(a_result(tests=part) for part in results))["tests"]
        assert joined["left"] == 2 and joined["outcomes"].keys() == {f"f::{x}" for x in "abcd"}
    joined = gpu.joined(a_result(tests=first), a_result(tests=later))["tests"]
    assert (joined["passed"], joined["failed"], joined["skipped"]) == (2, 1, 1)
    assert joined["failures"] == {"f::c": ["why"]}
    without = {"passed": 3, "failures": {}}  # of whose tests only the JSON was brought along
    assert gpu.joined(a_result(tests=first), a_result(tests=without))["tests"] == without


def test_join_of_benchmarks() -> None:
    first = a_part({"f::a": "passed", "f::b": "failed"}, complete=False, which="x")
    later = a_part({"f::b": "passed"}, complete=True, which="x")
    joined = gpu.joined(*(a_result(benchmarks={"run": part}) for part in (first, later)))
    run = joined["benchmarks"]["run"]
    assert run["complete"] and run["failures"] == {} and run["passed"] == 2
    swapped = gpu.joined(*(a_result(benchmarks={"run": part}) for part in (later, first)))
    assert not swapped["benchmarks"]["run"]["complete"]


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
    result |= {"tests": {"failures": {"f::a": ["E why"]}, "passed": 7, "failed": 1, "left": 3}}
    result["benchmarks"] = {"rows": {"complete": False, "failures": {"b::a": ["E other"]}}}
    printed = report_gpu.markdown(result)
    line = "1 ms (cuda) | 1.11 | ours (triton) 1.25 | ≥ 85% of the copy rate | yes |"
    assert f"| `gather_tokens` | vit | forward | 4096 | bfloat16 | {line}" in printed
    assert "7 passed, 1 failed, 0 error, 0 skipped, 3 not run; benchmarks: 1 rows" in printed
    assert "1 rows (rows: 1 failed)" in printed
    assert "f::a: E why\nrows: b::a: E other" in report_gpu.text(result)
    assert "`gather_tokens` 3 MiB on vit, bfloat16 (NO)" in printed
    assert "compute-sanitizer: not run" in printed
    assert "targets met: 1 of 1" in report_gpu.text(result)
    assert report.file_name(result) == "2026-01-01-a-gpu.json"
