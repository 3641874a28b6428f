"""The stages of bench.gpu: tests, benchmarks and compute-sanitizer, each in processes of their own.

A stage writes into its part of the result as it goes, so that one that is cut short has its share
there, and goes on with what is missing when it is run again.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TAIL = 40  # lines kept of what failed


class Asked(NamedTuple):
    """How bench.gpu was called."""

    device: str
    quick: bool
    chosen: str  # benchmarks, an expression for -k
    save: Callable[[], None]


class Run(NamedTuple):
    """One process of benchmarks."""

    name: str
    dtype: str
    batch: str | None  # "full", a number, or each shape's own
    which: str  # an expression for -k


# What does not depend on the tokens' type is timed in one of them. Most important first.
ONE_TYPE = "select_tokens or draw_queries or of_all_queries"
FIXED = "fixed_cost or peak_memory or pretraining_step"
RUNS = (
    Run(
        *("small batch", "bfloat16", "8"),
        f"bench_self_guided_masking and (protein or molecule) and not ({FIXED})",
    ),
    Run("bfloat16", "bfloat16", "full", f"not ({ONE_TYPE} or {FIXED})"),
    Run("rows", "float32", None, "select_tokens_of_many"),
    Run("all queries", "float16", None, "of_all_queries"),
    Run("float32", "float32", "full", f"not (of_many or of_all_queries or {FIXED})"),
    Run("step", "bfloat16", "full", "pretraining_step_of_pictures"),
    Run("fixed cost", "bfloat16", None, "bench_overhead"),
)
# What has targets comes first, should the time run out.
FILES = tuple(
    f"bench/bench_{name}.py"
    for name in (
        *("self_guided_masking", "attention_scores", "random_masking", "gather_tokens"),
        *("restore_tokens", "select_tokens", "bipartition", "pretraining_step"),
        *("informed_scores", "draw_queries", "aggregate_attention", "overhead"),
    )
)
SANITIZED = ("tests/test_select_tokens.py", "tests/test_self_guided_masking.py")
# literal answers, the cases of the tables, long rows: not those that draw examples or compile
SANITIZED_TESTS = (
    "test_literal or test_long_rows or test_is_the_three_ops_in_a_row"
    " or test_cases and (float32 or bfloat16)"
)
TOOLS = ("memcheck", "racecheck")


class Ended(NamedTuple):
    status: str  # "passed", "failed", "timed out", "nothing to run"
    seconds: float
    output: str

    def summary(self) -> dict[str, Any]:
        """Returns pytest's counts, and the end of its output where it did not pass."""
        counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", _last_line(self.output))
        found: dict[str, Any] = {"status": self.status, "seconds": round(self.seconds, 1)}
        found |= {name.replace("errors", "error"): int(number) for number, name in counts}
        if self.status not in ("passed", "nothing to run"):
            found["tail"] = _without_paths(self.output).splitlines()[-TAIL:]
        return found


def _without_paths(text: str) -> str:
    for path, name in ((str(ROOT), "."), (sys.prefix, "PREFIX"), (sys.base_prefix, "PREFIX")):
        text = text.replace(path, name)
    return text


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if re.search(r"\bin [\d.]+s\b", line)]
    return lines[-1] if lines else ""


_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it


def _die_with_parent() -> None:
    # where this process is killed, tests must not go on and keep the GPU busy
    if _prctl is not None:
        _prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def run(command: list[str], until: float, **environment: str) -> Ended:
    """Runs a program in the repository's root, until a time of time.monotonic()."""
    start = time.monotonic()
    if until <= start:
        return Ended("timed out", 0.0, "no time was left to start it")
    with tempfile.TemporaryFile("w+") as output:  # what was printed until then is kept
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to end it with all that it has started
            preexec_fn=_die_with_parent,
        )
        try:
            code = process.wait(until - start)
            status = {0: "passed", 5: "nothing to run"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Ended(status, time.monotonic() - start, output.read())


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *arguments]


def tests(result: dict, asked: Asked, until: float) -> bool:
    """Runs each file of tests that has not passed yet, several at a time; returns if all passed."""
    stage = result.setdefault("tests", {"require": "", "files": {}})
    stage["require"] = "cpu,triton,cuda" if asked.device == "cuda" else "cpu"
    every = sorted((ROOT / "tests").glob("test_*.py"), key=lambda file: -file.stat().st_size)
    names = [f"tests/{file.name}" for file in every]
    wanted = ["tests/test_testing.py"] if asked.quick else names
    done = {name for name, file in stage["files"].items() if file["status"] == "passed"}
    cores = os.cpu_count() or 1
    together = min(4, max(1, cores // 4))
    lock = threading.Lock()
    threads = {"OMP_NUM_THREADS": str(max(1, cores // together))} if together > 1 else {}

    def test(name: str) -> None:
        # through the folder, so that conftest.py may leave a file out
        others = [f"--ignore={other}" for other in names if other != name]
        command = pytest("tests", *others)
        ended = run(command, until, SMA_FAST_REQUIRE=stage["require"], **threads)
        with lock:
            stage["files"][name] = ended.summary()
            asked.save()

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(test, [name for name in wanted if name not in done]))
    for name in ("passed", "failed", "skipped", "error"):
        stage[name] = sum(file.get(name, 0) for file in stage["files"].values())
    return _all_passed(stage["files"])


def benchmarks(result: dict, asked: Asked, until: float) -> bool:
    """Runs what has no row yet of RUNS; returns whether every benchmark of them has one."""
    stage = result.setdefault("benchmarks", {})
    rows, rates = result.setdefault("rows", []), result.setdefault("rates", {})
    good = True
    for each in RUNS:
        which = f"({each.which}) and ({asked.chosen})" if asked.chosen else each.which
        command = [*FILES, "--benchmark-quiet", "--device", asked.device, "--dtype", each.dtype]
        command += ["-k", which, *(["--batch", each.batch] if each.batch else [])]
        command += ["--quick", "--no-compile"] if asked.quick else []
        done = [row["test"] for row in rows if row["run"] == each.name]
        command += [f"--deselect={test}" for test in done]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows"
            ended = run(pytest(*command, f"--rows={file}"), until)
            lines = file.read_text().splitlines() if file.exists() else []
        found = list(map(json.loads, lines))
        for row in (line for line in found if "op" in line):
            rows.append({"run": each.name, **row})
            measured = {name: row[name] for name in ("copy_rate", "matrix_rate") if name in row}
            if measured:
                rates.setdefault(each.dtype, measured)
        for line in (line for line in found if "rates" in line):
            rates.update(line["rates"])
        if ended.status != "nothing to run" or not done:
            stage[each.name] = {**each._asdict(), **ended.summary()}
        good = good and ended.status in ("passed", "nothing to run")
        asked.save()
    return good


def sanitizer(result: dict, asked: Asked, until: float) -> bool:
    """Runs memcheck and racecheck over the tests of selection; returns whether neither complains.

    Where there is no compute-sanitizer the result says so, which is no failure.
    """
    stage = result.setdefault("sanitizer", {})
    program = shutil.which("compute-sanitizer")
    for number, tool in enumerate(TOOLS):
        if program is None:
            stage[tool] = {"status": "not run: no compute-sanitizer on PATH"}
            continue
        # only this project's kernels, by their namespace, or torch's take all of the time
        command = [program, "--tool", tool, "--kernel-name", "kns=sma", "--error-exitcode", "99"]
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
            "said": re.findall(r"=+ (\w+ SUMMARY: .*)", ended.output),
        }
        if ended.status == "passed" and not stage[tool]["said"]:
            stage[tool]["status"] = "failed"  # it ran, but nothing was watched
        asked.save()
    return all(tool["status"].startswith(("passed", "not run")) for tool in stage.values())


def _all_passed(parts: dict[str, dict]) -> bool:
    return all(part["status"] in ("passed", "nothing to run") for part in parts.values())


STAGES = {"tests": tests, "benchmarks": benchmarks, "sanitizer": sanitizer}
