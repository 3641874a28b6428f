"""Proof on a GPU: tests, benchmarks and compute-sanitizer into one JSON: `python -m bench.gpu`.

A part of it is enough (`--only tests`), and a later call adds to the JSON of an earlier one: that
of the same day and machine in `--out`, or the one named with `--start`. What has passed or has been
measured there is not done again. `--join` joins what several calls wrote and runs nothing. The JSON
says what ran; which tests have passed lies beside it (.outcomes), for a call that goes on. Nothing
in it is typed by hand: where it was measured without git, the commit comes in when a checkout with
the same sources touches the file.

Ends with status 1 where a stage failed.
"""

import argparse
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine, report, report_gpu
from bench.gpu_processes import STOP, Asked, joined_parts
from bench.gpu_stages import STAGES

SHORT_OF_TIME = """
Where a GPU is there for minutes at a time: what has targets is measured first, tests on the GPU run
first, and both files are written as they go, so that a call may be ended at any time.

    make gpu GPU="--only benchmarks --limit 420 --out FOLDER"    installs, then measures
    python -m bench.gpu --only tests --limit 200 --out FOLDER    on the same machine

Later, or on a fresh machine, go on from the two files that these wrote (--start JSON, or in
FOLDER), with make gpu first; compute-sanitizer wants some minutes of its own:

    make gpu GPU="--only sanitizer tests --limit 400 --out FOLDER"

Without a network, what is to be compared with needs to be there: PYTHONPATH is passed on as it is.
"""
LIMITS = {"tests": 1800, "benchmarks": 3600, "sanitizer": 600}  # seconds
OUTCOMES = ".outcomes"
SAME = ("machine", "device", "sources", "quick", "nvcc", "cuda", "config", "driver")


def begun(device: str, quick: bool) -> dict[str, Any]:
    """Returns a result without stages: the machine, the versions and the sources."""
    command = [sys.executable, "-m", "bench.machine", device]
    done = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:])} failed: see above")
    return {**json.loads(done.stdout.splitlines()[-1]), "quick": quick, "rates": {}, "rows": []}


def joined(first: dict, *others: dict) -> dict:
    """Returns one result of several: stages, files and rows of the later ones replace earlier ones.

    Raises:
        ValueError: where they are not of one machine, one set of versions and the same sources.
    """
    for other in others:
        for name in SAME:
            if other.get(name) != first.get(name):
                raise ValueError(f"{name}: got {other.get(name)} beside {first.get(name)}")
        rows = {(row["run"], row["test"]): row for row in (*first["rows"], *other["rows"])}
        first = {**first, "rows": list(rows.values()), "rates": first["rates"] | other["rates"]}
        for name in set(STAGES) & set(other):
            first[name] = JOINED[name](first[name], other[name]) if name in first else other[name]
        first["commit"] = first["commit"] or other["commit"]
        if first["uncommitted_changes"] is None:
            first["uncommitted_changes"] = other["uncommitted_changes"]
    return first


def _tests(first: dict, other: dict) -> dict:
    if "outcomes" not in first or "outcomes" not in other:  # the file beside the JSON is missing
        return other
    knows = other if other.get("left") is not None else first
    found = {**joined_parts(first, other), "left": knows.get("left")}
    if found["left"] is not None:
        found["left"] -= len(found["outcomes"]) - len(knows["outcomes"])
    return found


def _benchmarks(first: dict, other: dict) -> dict:
    both = {name: joined_parts(first[name], other[name]) for name in set(first) & set(other)}
    return {**first, **other, **both}


def _sanitizer(first: dict, other: dict) -> dict:
    return {**first, **other}


JOINED = {"tests": _tests, "benchmarks": _benchmarks, "sanitizer": _sanitizer}


def with_commit(result: dict) -> dict:
    """Returns the result with this checkout's commit, where it has none and the sources agree."""
    if result["commit"] is None and result["sources"] == machine.sources():
        return {**result, **machine.commit()}
    return result


def _load(file: Path) -> dict:
    result = json.loads(file.read_text())
    if "sources" not in result:
        raise ValueError(f"{file}: not a JSON of bench.gpu")
    beside = file.with_suffix(OUTCOMES)
    if "tests" in result and beside.exists():
        result["tests"]["outcomes"] = json.loads(beside.read_text())
    return result


def _save(result: dict, file: Path) -> None:
    """Writes the JSON, and beside it the outcomes of the tests: they are thousands of names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if "outcomes" in result.get("tests", {}):
        tests = dict(result["tests"])
        _write(file.with_suffix(OUTCOMES), tests.pop("outcomes"))
        result = {**result, "tests": tests}
    _write(file, report.rounded(result))


def _write(file: Path, content: dict) -> None:
    # in one step: what ends this process must not leave half a file
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        epilog=SHORT_OF_TIME,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--benchmarks", default="", metavar="TEXT", help="as pytest's -k")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for each stage")
    parser.add_argument("--start", type=Path, metavar="JSON", help="an earlier call's")
    parser.add_argument("--join", nargs="+", type=Path, metavar="JSON", help="run nothing")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: bench/results")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it works")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.quick or options.device == "cpu") and options.out is None:
        parser.error("--out: got none, a quick run or one of the CPU needs a folder of its own")
    try:
        if options.join:
            result = joined(*map(_load, options.join))
        else:
            result = begun(options.device, options.quick)
        file = (options.out or report.RESULTS) / report.file_name(result)
        if options.start:
            result = joined(_load(options.start), result)
        elif not options.join and file.exists():
            earlier = _load(file)
            if all(earlier.get(name) == result.get(name) for name in SAME):
                result = joined(earlier, result)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    result = with_commit(result)

    save = functools.partial(_save, result, file)
    save()
    good = True
    asked = Asked(options.device, options.quick, options.benchmarks, save)
    for name in () if options.join else options.only:
        if name == "tests" and options.skip_tests:
            continue
        start = time.monotonic()
        passed = STAGES[name](result, asked, start + (options.limit or LIMITS[name]))
        good = good and passed
        outcome = "passed" if passed else "FAILED"
        print(f"{name}: {outcome} in {time.monotonic() - start:.0f} s", flush=True)
        save()
    print(report_gpu.text(report.rounded(result)))
    print(f"saved as {file.name}")
    return int(not good)


def _stop(*_) -> None:
    STOP.set()  # ends the processes it started, too
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
