"""Processes of bench.gpu: programs that are ended in time, and pytest until each test has ended.

What one of them has filed is taken while it runs.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench.outcomes import BROKEN

ROOT = Path(__file__).parents[1]
TAIL = 40  # lines kept of what failed
TICK = 5.0  # seconds between looks at what a process has filed
GOOD = ("passed", "nothing to run")
BAD = ("failed", "error")
STOP = threading.Event()  # set where bench.gpu itself is to end


class Asked(NamedTuple):
    """How bench.gpu was called."""

    device: str
    quick: bool
    chosen: str  # benchmarks, an expression for -k
    save: Callable[[], None]


class Ended(NamedTuple):
    status: str  # "passed", "failed", "timed out", "nothing to run"
    seconds: float
    output: str
    code: int | None = None  # of a program that ended by itself

    def summary(self) -> dict[str, Any]:
        """Returns the status, the seconds, and the end of the output where it did not pass."""
        found: dict[str, Any] = {"status": self.status, "seconds": round(self.seconds, 1)}
        if self.status not in GOOD:
            found["tail"] = end_of(self.output)
        return found


def end_of(text: str) -> list[str]:
    """Returns the last lines, without paths of this machine."""
    for path, name in ((str(ROOT), "."), (sys.prefix, "PREFIX"), (sys.base_prefix, "PREFIX")):
        text = text.replace(path, name)
    return text.splitlines()[-TAIL:]


_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it


def _die_with_parent() -> None:
    # where this process is killed, tests must not go on and keep the GPU busy
    if _prctl is not None:
        _prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def run(
    command: list[str], until: float, look: Callable[[], None] = lambda: None, **environment: str
) -> Ended:
    """Runs a program in the repository's root, until a time of time.monotonic().

    `look` is called now and then while it runs.
    """
    start = time.monotonic()
    if until <= start:
        return Ended("timed out", 0.0, "no time was left to start it")
    with tempfile.TemporaryFile() as output:  # what was printed until then is kept
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to end it with all that it has started
            preexec_fn=_die_with_parent,
        )
        status, code = "timed out", None
        try:
            while time.monotonic() < until and not STOP.is_set():
                try:
                    code = process.wait(max(0, min(TICK, until - time.monotonic())))
                except subprocess.TimeoutExpired:
                    look()
                    continue
                status = {0: "passed", 5: "nothing to run"}.get(code, "failed")
                break
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")  # a process that crashes says anything
        return Ended(status, time.monotonic() - start, said, code)


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *arguments]


class _Lines:
    """Reads what bench.outcomes writes: which tests have ended, and which one has only started."""

    def __init__(self, file: Path, take: Callable[[dict], None]) -> None:
        file.touch()
        self.file = file.open("rb")
        self.take = take
        self.ended: set[str] = set()
        self.started: str | None = None

    def read(self) -> None:
        for line in self.file.read().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # the rest is still to come
                self.file.seek(-len(line), os.SEEK_CUR)
                break
            self.add(json.loads(line))

    def add(self, line: dict) -> None:
        if "started" in line:
            self.started = line["started"]
        elif "outcome" in line:
            self.started = None
            self.ended.add(line["test"])
        self.take(line)


def each_test(
    command: list[str],
    until: float,
    take: Callable[[dict], None],
    done: Iterable[str] = (),
    last: Iterable[str] = (),
    **environment: str,
) -> Ended:
    """Runs pytest, and again without what has ended as long as a test took its process along.

    Args:
        command: of `pytest`; "{lines}" in it stands for the file that bench.outcomes writes.
        take: is given the lines in there, as they come.
        done: tests to leave out.
        last: tests to run behind all others.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, plan = Path(folder) / "lines", Path(folder) / "plan"
        command = [word.replace("{lines}", str(file)) for word in command]
        command += ["-p", "bench.outcomes", f"--outcomes={file}", f"--plan={plan}"]
        lines = _Lines(file, take)
        with lines.file:
            while True:
                left_out = sorted({*done, *lines.ended})
                plan.write_text(json.dumps({"done": left_out, "last": list(last)}))
                ended = run(command, until, lines.read, **environment)
                lines.read()
                if ended.status != "failed" or not (lines.started or ended.code == BROKEN):
                    return ended
                if lines.started:
                    why = f"its process ended:\n{_last_words(ended.output)}"
                    lines.add({"test": lines.started, "outcome": "failed", "why": why})


def _last_words(output: str) -> str:
    """Returns the top of the stack where Python printed one as it died, or all of the output."""
    at = max(output.rfind(words) for words in ("Fatal Python error", "Timeout ("))
    return output if at < 0 else "\n".join(output[at:].splitlines()[: TAIL - 1])


class Record:
    """Outcomes of tests, kept in a part of the JSON."""

    def __init__(self, part: dict) -> None:
        self.part = part
        self.outcomes: dict[str, str] = part.setdefault("outcomes", {})
        self.failures: dict[str, list[str]] = part.setdefault("failures", {})
        for file in [test for test in self.outcomes if "::" not in test]:
            del self.outcomes[file]  # it could not be read, and is read again
            self.failures.pop(file, None)
        part |= _counts(self.outcomes)

    def add(self, line: dict) -> None:
        """Files a test's outcome."""
        test, outcome = line["test"], line["outcome"]
        if test in self.outcomes:
            self.part[self.outcomes[test]] -= 1
        self.part[outcome] += 1
        self.outcomes[test] = outcome
        self.failures.pop(test, None)
        if outcome in BAD:
            self.failures[test] = end_of(line["why"])

    def done(self) -> list[str]:
        """Returns what need not run again."""
        return [test for test, outcome in self.outcomes.items() if outcome not in BAD]


def _counts(outcomes: dict[str, str]) -> dict[str, int]:
    every = list(outcomes.values())
    return {name: every.count(name) for name in ("passed", "failed", "skipped", "error")}


def joined_parts(first: dict, other: dict) -> dict:
    """Returns one part of the JSON of two that a Record wrote: the later one's outcomes count."""
    outcomes = first["outcomes"] | other["outcomes"]
    failures = {
        test: why
        for test, why in (first["failures"] | other["failures"]).items()
        if outcomes[test] in BAD
    }
    parts = (first, other) if other.get("complete") or not first.get("complete") else (other, first)
    found = {**parts[0], **parts[1], "outcomes": outcomes, "failures": failures}
    if "complete" in found:
        found["complete"] = found["complete"] and not failures
    return found | _counts(outcomes)
