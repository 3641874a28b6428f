"""Files each test's outcome as it ends: `pytest -p bench.outcomes --outcomes FILE`.

FILE gets a JSON line where a test starts and one where it ends. What a process leaves that dies, or
that is ended, is all outcomes until then, and which test it was in.

A GPU that has failed answers nothing more in that process (errors of kernels stay): the test is
filed as failed and the process ends, so that the rest can go on in another one. It ends too where a
capture has failed, which a test may have expected.
"""

import argparse
import faulthandler
import json
import os
import sys
import zlib
from pathlib import Path

import pytest

BROKEN = 70  # exit status: the GPU answers no more
ENDLESS = 240.0  # seconds after which a test on the GPU is taken for one that never ends
STDERR = os.dup(2)  # before pytest takes what is written there


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcomes")
    group.addoption("--outcomes", type=Path, metavar="FILE", help="add a line for each test to it")
    group.addoption(
        "--plan", type=Path, metavar="JSON", help='lists of tests: "done" (left out) and "last"'
    )
    group.addoption("--part", type=_part, default=(0, 1), metavar="I/N", help="from 0/N on")


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is such as 0/4 to 3/4")
    return int(number), int(parts)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.outcomes:
        config.pluginmanager.register(_Outcomes(config.option.outcomes))


@pytest.hookimpl(trylast=True)  # behind the conftest.py that marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps this part's tests that are not done; those on the GPU come first, "last" ones last."""
    number, parts = config.option.part
    plan = json.loads(config.option.plan.read_text()) if config.option.plan else {}
    done, last = set(plan.get("done", ())), set(plan.get("last", ()))
    files = list(dict.fromkeys(item.path for item in items))
    place = {file: i for i, file in enumerate(files)}
    start = len(files) * number // parts  # not all parts compile the same kernels at a time
    part = [item for item in items if _part_of(item, parts) == number]
    if config.option.outcomes:
        _file(config.option.outcomes, {"collected": len(part)})

    def order(item: pytest.Item) -> tuple:
        turn = (place[item.path] - start) % len(files)
        return item.nodeid in last, item.get_closest_marker("on_gpu") is None, turn

    chosen = sorted((item for item in part if item.nodeid not in done), key=order)
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def _part_of(item: pytest.Item, parts: int) -> int:
    if item.get_closest_marker("large"):
        return 0
    return zlib.crc32(item.nodeid.encode()) % parts


class _Outcomes:
    """The hooks that write."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            why = report.longreprtext
            _file(self.file, {"test": report.nodeid, "outcome": "error", "why": why})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self.outcome, self.why = "passed", ""
        _file(self.file, {"started": item.nodeid})
        if item.get_closest_marker("on_gpu"):
            faulthandler.dump_traceback_later(ENDLESS, exit=True, file=STDERR)
        done = yield
        error = _gpu_error()
        if error and self.outcome not in ("failed", "error"):
            self.outcome = "failed"
        faulthandler.cancel_dump_traceback_later()
        why = "\n".join(filter(None, (self.why, error)))
        _file(self.file, {"test": item.nodeid, "outcome": self.outcome, "why": why})
        if error or not _memory_is_given_back():
            sys.stdout.flush()
            os._exit(BROKEN)
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome = "failed" if report.when == "call" else "error"
            self.why += report.longreprtext
        elif report.skipped and self.outcome == "passed":
            self.outcome = "skipped"


def _gpu_error() -> str:
    """Returns what the GPU says after its last work, nothing where that was good."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _memory_is_given_back() -> bool:
    """Returns whether the GPU's memory is there for others; after a failed capture torch refuses.

    It would refuse all captures to come, too.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def _file(file: Path, line: dict) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")
