"""The stage of bench.gpu that runs the tests, in several processes side by side."""

import functools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from bench.gpu_processes import GOOD, TICK, Asked, Record, each_test, pytest

FOLDER = "tests"
QUICK = "tests/test_testing.py"
MOST = 16  # processes: each holds a context of the GPU, and some GiB of the host's memory


def at_once(cores: int) -> int:
    """Returns how many processes go side by side: what takes long is one thread that compiles."""
    return max(1, min(MOST, cores - 1))


def tests(result: dict, asked: Asked, until: float) -> bool:
    """Runs each test that has not passed yet; returns if all passed.

    The tests are dealt out to the processes by their names, those on the GPU first.
    """
    stage = result.setdefault("tests", {})
    if stage.get("left") == 0 and not stage["failures"]:
        return True
    record = Record(stage)
    stage["require"] = "cpu,triton,cuda" if asked.device == "cuda" else "cpu"
    cores = os.cpu_count() or 1
    parts = 1 if asked.quick else at_once(cores)
    environment = {"SMA_FAST_REQUIRE": stage["require"]}
    if parts > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, cores // parts))
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    stage["parts"] = {}
    collected: dict[int, int] = {}  # tests of each part
    done, last = record.done(), list(record.failures)
    lock = threading.Lock()
    saved = time.monotonic()

    def take(part: int, line: dict) -> None:
        nonlocal saved
        with lock:
            if "collected" in line:
                collected[part] = line["collected"]
            elif "outcome" in line:
                record.add(line)
            if time.monotonic() > saved + TICK:
                asked.save()
                saved = time.monotonic()

    def run(part: int) -> None:
        # through the folder, so that conftest.py may leave a file out
        command = pytest(QUICK if asked.quick else FOLDER, f"--part={part}/{parts}")
        command.append("--continue-on-collection-errors")
        took = functools.partial(take, part)
        ended = each_test(command, until, took, done, last, **environment)
        with lock:
            stage["parts"][f"{part}/{parts}"] = ended.summary()
            asked.save()

    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(run, range(parts)))
    ran = sum("::" in test for test in record.outcomes)
    stage["left"] = sum(collected.values()) - ran if len(collected) == parts else None
    ended = all(part["status"] in GOOD for part in stage["parts"].values())
    return ended and stage["left"] == 0 and not record.failures
