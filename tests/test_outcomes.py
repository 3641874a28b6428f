"""Tests that take their process along, as bench.gpu runs them: nothing else is lost."""

import json
import time
from pathlib import Path

import pytest

from bench import gpu_processes, gpu_tests
from bench.gpu_processes import Asked, Record

# torch with a GPU that fails when it is told to
CONFTEST = """
import sys
from types import SimpleNamespace

import pytest

from bench import outcomes

outcomes.ENDLESS = 2.0
wrong = SimpleNamespace(context=False, capture=False)


def synchronize():
    if wrong.context:
        raise RuntimeError("CUDA error: an illegal memory access")


def empty_cache():
    if wrong.capture:
        raise RuntimeError("captures_underway.empty()")


cuda = SimpleNamespace(
    is_initialized=lambda: True, synchronize=synchronize, empty_cache=empty_cache
)
sys.modules["torch"] = SimpleNamespace(cuda=cuda)


@pytest.fixture
def gpu():
    return wrong


def pytest_configure(config):
    for name in ("on_gpu", "large"):
        config.addinivalue_line("markers", name)
"""
DYING = """
import os
import time

import pytest


def test_first():
    pass


def test_aborts():
    os.abort()


def test_breaks_the_gpu(gpu):
    gpu.context = True


def test_fails_in_a_capture(gpu):
    gpu.capture = True


def test_needs_a_good_gpu(gpu):
    assert not gpu.context and not gpu.capture


@pytest.mark.on_gpu
def test_never_ends():
    time.sleep(60)


def test_is_wrong():
    assert 1 == 2


def test_skips():
    pytest.skip("why not")


@pytest.fixture
def unclean():
    yield
    raise ValueError("unclean")


def test_cannot_clean_up(unclean):
    pass


def test_last():
    pass
"""
# In order of their files; the first letter says what is marked.
MANY = """
import pytest


@pytest.mark.parametrize("number", range(20))
def test_plain(number):
    pass


@pytest.mark.on_gpu
@pytest.mark.parametrize("number", range(20))
def test_gpu(number):
    pass


@pytest.mark.large
@pytest.mark.parametrize("number", range(5))
def test_large(number):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # the root of the names
    (tmp_path / "conftest.py").write_text(CONFTEST)
    monkeypatch.setattr(gpu_tests, "FOLDER", str(tmp_path))
    monkeypatch.setattr(gpu_tests, "at_once", lambda cores: 1)
    return tmp_path


def run(result: dict, seconds: float = 120) -> bool:
    asked = Asked("cpu", False, "", lambda: None)
    return gpu_tests.tests(result, asked, time.monotonic() + seconds)


def by_name(of_tests: dict) -> dict:
    return {test.rpartition("::test_")[2]: value for test, value in of_tests.items()}


def test_a_test_that_takes_its_process_along_is_filed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "test_dying.py").write_text(DYING)
    result: dict = {}
    assert not run(result)
    stage = result["tests"]
    bad = {name: "failed" for name in ("aborts", "breaks_the_gpu", "never_ends", "is_wrong")}
    bad["cannot_clean_up"] = "error"
    good = ("first", "fails_in_a_capture", "needs_a_good_gpu", "last")
    assert by_name(stage["outcomes"]) == dict.fromkeys(good, "passed") | bad | {"skips": "skipped"}
    assert (stage["passed"], stage["failed"], stage["error"], stage["skipped"]) == (4, 4, 1, 1)
    assert stage["left"] == 0
    why = {name: "\n".join(lines) for name, lines in by_name(stage["failures"]).items()}
    assert why.keys() == bad.keys()
    assert "Fatal Python error: Aborted" in why["aborts"] and "in test_aborts" in why["aborts"]
    assert "an illegal memory access" in why["breaks_the_gpu"]
    assert "in test_never_ends" in why["never_ends"]  # where it was
    assert "assert 1 == 2" in why["is_wrong"] and "unclean" in why["cannot_clean_up"]

    # again: only what has not passed, and what has failed comes behind the rest
    names = ("aborts", "breaks_the_gpu", "never_ends", "is_wrong", "cannot_clean_up", "is_new")
    every = (*good, "skips", *names)
    mended = "".join(f"def test_{name}(): pass\n" for name in every)
    (folder / "test_dying.py").write_text(mended)
    started = []
    each_test = gpu_tests.each_test

    def watched(command, until, take, *others, **environment):
        def see(line):
            started.extend(filter(None, [line.get("started")]))
            take(line)

        return each_test(command, until, see, *others, **environment)

    monkeypatch.setattr(gpu_tests, "each_test", watched)
    assert run(result)
    assert [test.rpartition("::test_")[2] for test in started] == [
        *("is_new", "aborts", "breaks_the_gpu", "never_ends", "is_wrong", "cannot_clean_up")
    ]
    assert stage["failures"] == {} and stage["passed"] == 10 and stage["failed"] == 0


def test_what_has_ended_in_time_is_kept(folder: Path) -> None:
    (folder / "test_slow.py").write_text(
        "import time\n\ndef test_a(): pass\n\ndef test_b(): time.sleep(60)\n\ndef test_c(): pass\n"
    )
    result: dict = {}
    assert not run(result, seconds=6)
    stage = result["tests"]
    assert by_name(stage["outcomes"]) == {"a": "passed"} and stage["failures"] == {}
    assert stage["left"] == 2 and stage["parts"]["0/1"]["status"] == "timed out"


def test_a_file_that_cannot_be_read_stops_no_other(folder: Path) -> None:
    (folder / "test_bad.py").write_text("import nonsense\n")
    (folder / "test_good.py").write_text("def test_a(): pass\n")
    result: dict = {}
    assert not run(result)
    stage = result["tests"]
    assert stage["outcomes"] == {"test_bad.py": "error", "test_good.py::test_a": "passed"}
    assert "No module named 'nonsense'" in "\n".join(stage["failures"]["test_bad.py"])
    (folder / "test_bad.py").write_text("def test_b(): pass\n")
    assert run(result) and stage["error"] == 0 and stage["passed"] == 2


def test_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is in one part, large ones in the first; those on the GPU come first."""
    for name in "abc":
        (folder / f"test_{name}.py").write_text(MANY)
    started: list[list[str]] = []
    for part in range(3):
        lines: list[dict] = []
        command = gpu_processes.pytest(str(folder), f"--part={part}/3")
        ended = gpu_processes.each_test(command, time.monotonic() + 60, lines.append)
        assert ended.status == "passed"
        started.append([line["started"] for line in lines if "started" in line])
        assert {"collected": len(started[-1])} in lines
    everything = [test for part in started for test in part]
    assert len(set(everything)) == len(everything) == 3 * 45
    assert all("large" not in test for part in started[1:] for test in part)
    for part, first in zip(started, ("test_a.py", "test_b.py", "test_c.py"), strict=True):
        on_gpu = ["test_gpu" in test for test in part]
        assert on_gpu == sorted(on_gpu, reverse=True) and 10 < sum(on_gpu) < 30
        assert part[0].startswith(first)


@pytest.mark.parametrize("part", ["4", "4/4", "a/2", "-1/3"])
def test_parts_that_are_none(part: str) -> None:
    ended = gpu_processes.run(
        gpu_processes.pytest("-p", "bench.outcomes", f"--part={part}"), time.monotonic() + 60
    )
    assert ended.status == "failed" and f"got '{part}', allowed is such as 0/4" in ended.output


def test_half_a_line_is_taken_when_it_is_whole(tmp_path: Path) -> None:
    file, taken = tmp_path / "lines", []
    lines = gpu_processes._Lines(file, taken.append)
    with lines.file, file.open("a") as writer:
        line = json.dumps({"test": "f::a", "outcome": "passed"})
        for text, number in ((line[:7], 0), (line[7:], 0), ("\n", 1), (f"{line}\n", 2)):
            writer.write(text)
            writer.flush()
            lines.read()
            assert len(taken) == number
    assert lines.ended == {"f::a"}


def test_counts_follow_the_outcomes() -> None:
    part: dict = {"outcomes": {"f::a": "passed", "f::b": "failed"}, "failures": {"f::b": ["why"]}}
    record = Record(part)
    record.add({"test": "f::b", "outcome": "passed", "why": ""})
    record.add({"test": "f::a", "outcome": "error", "why": "x\ny"})
    assert (part["passed"], part["failed"], part["error"]) == (1, 0, 1)
    assert part["failures"] == {"f::a": ["x", "y"]} and record.done() == ["f::b"]
