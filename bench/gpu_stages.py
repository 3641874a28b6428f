"""The stages of bench.gpu: tests, benchmarks and compute-sanitizer, each in processes of their own.

A stage writes into its part of the result as it goes, so that one that is cut short has its share
there, and goes on with what is missing when it is run again.
"""

import re
import shutil
import time
from pathlib import Path

from bench.cubins import find_nvcc
from bench.gpu_benchmarks import benchmarks
from bench.gpu_processes import Asked, pytest, run
from bench.gpu_tests import tests

SANITIZED = (
    "tests/test_select_tokens.py",
    "tests/test_self_guided_masking.py",
    "tests/test_draw_queries.py",
    "tests/test_random_masking.py",
    "tests/test_gather_tokens.py",
    "tests/test_restore_tokens.py",
)
# literal answers, the cases of the tables, long rows: not those that draw examples or compile
SANITIZED_TESTS = (
    "test_literal or test_long_rows or test_is_the_three_ops_in_a_row or test_many_blocks"
    " or with_several_ids or test_backward_of_one_fill"
    " or test_cases and (float32 or bfloat16) and not (gather_tokens or restore_tokens)"
)
TOOLS = ("memcheck", "racecheck", "synccheck")
OURS = "3sma4cuda"  # the namespace sma::cuda, as the mangled names of its kernels have it


def sanitizer(result: dict, asked: Asked, until: float) -> bool:
    """Runs TOOLS over the tests of selection; returns whether none complains.

    Where there is no compute-sanitizer the result says so, and the stage fails: leave it out with
    `--only tests benchmarks`.
    """
    stage = result.setdefault("sanitizer", {})
    program = _compute_sanitizer()
    for number, tool in enumerate(TOOLS):
        if stage.get(tool, {}).get("status") == "passed":
            continue
        if program is None:
            stage[tool] = {"status": "not run: no compute-sanitizer on PATH or beside nvcc"}
            continue
        # only this project's kernels, or torch's take all of the time
        command = [program, "--tool", tool, "--kernel-name", f"kns={OURS}"]
        command += ["--error-exitcode", "99"]
        if tool == "memcheck":  # torch asks the driver for what it may not have
            command += ["--report-api-errors", "no"]
        tests = "test_literal" if asked.quick else SANITIZED_TESTS
        command += pytest(*SANITIZED, "-k", f"({tests}) and {asked.device}")
        environment = {"SMA_FAST_REQUIRE": asked.device}
        if tool == "memcheck":  # each tensor between bounds of its own
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        left = (until - time.monotonic()) / (len(TOOLS) - number)
        ended = run(command, time.monotonic() + left, **environment)
        stage[tool] = {
            "command": [Path(word).name if "/" in word else word for word in command],
            **ended.summary(),
            **_counts(ended.output),
            "said": re.findall(r"=+ (\w+ SUMMARY: .*)", ended.output),
        }
        if ended.status == "passed" and not stage[tool]["said"]:
            stage[tool]["status"] = "failed"  # it ran, but nothing was watched
        asked.save()
    return all(tool["status"] == "passed" for tool in stage.values())


def _compute_sanitizer() -> str | None:
    beside = (nvcc := find_nvcc()) and str(Path(nvcc).resolve().parent)
    name = "compute-sanitizer"
    return shutil.which(name) or (shutil.which(name, path=beside) if beside else None)


def _counts(output: str) -> dict[str, int]:
    """Returns how many tests passed, failed, ..., from pytest's last line."""
    lines = [line for line in output.splitlines() if re.search(r"\bin [\d.]+s\b", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else "")
    return {name: int(number) for number, name in found}


STAGES = {"tests": tests, "benchmarks": benchmarks, "sanitizer": sanitizer}
