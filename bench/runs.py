"""What bench.science and bench.pictures share: runs in processes of their own, and their summary.

Needs the [train] extra, and nothing that only benchmarks need.
"""

import datetime
import functools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def at_a_time() -> int:
    """Returns how many runs go side by side: as many as there are cores, or 1 on a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def in_processes(
    run: Callable[[tuple], None], jobs: Sequence[tuple], processes: int, each: int = 8
) -> None:
    """Does jobs side by side and says on stderr which one is done, or how it failed.

    A job that fails is not raised: what it should have written is missing.

    Args:
        run: does one job; a function of a module, or functools.partial of one.
        jobs: tuples, whose parts are printed.
        processes: at a time.
        each: jobs that a process does before a new one takes its place.
    """
    if not jobs:
        return
    attempt = functools.partial(_attempt, run)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=one_thread, maxtasksperchild=each) as pool:
        for done, (job, error) in enumerate(pool.imap_unordered(attempt, jobs)):
            text = f"failed: {error}" if error else ""
            print(f"{done + 1}/{len(jobs)} {' '.join(map(str, job))} {text}", file=sys.stderr)


def _attempt(run: Callable[[tuple], None], job: tuple) -> tuple[tuple, str]:
    try:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):
            run(job)
    except Exception:  # said, and the exit code is 1; the other runs are not lost with this one
        return job, traceback.format_exc()
    return job, ""


def one_thread() -> None:
    """Keeps this process on one core where there is no GPU.

    With small models a second thread costs more than it saves, another run does not.
    """
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def begin(folder: Path) -> None:
    """Makes the folder of runs, with the commit of the first of them, which others are added to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "commit").exists():
        (folder / "commit").write_text(commit())


def commit() -> str:
    """Returns the commit checked out here, with "-dirty" where tracked files differ; "" without."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        ended = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return ended.stdout.strip()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ", 1)[1].strip()
    return platform.machine()


def described(folder: Path, scale: str, processes: int) -> dict[str, Any]:
    """Returns the head of a summary: date, commit, machine, versions and scale.

    Args:
        folder: that `begin` made.
        scale: of the runs.
        processes: runs at a time.
    """
    import torch

    import sma_fast

    device = f"{processor()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": (folder / "commit").read_text(),
        "machine": f"{device}, {processes} runs at a time",
        "versions": {
            "sma_fast": sma_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "scale": scale,
    }


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Returns mean and standard deviation (None of a single one) beside the values."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": spread, "seeds": values}


def cell(entry: dict[str, Any], digits: int = 3) -> str:
    """Returns what `over_seeds` did as the text of a table."""
    spread = "" if entry["std"] is None else f" ± {entry['std']:.{digits}f}"
    return f"{entry['mean']:.{digits}f}{spread}"


def save(what: str, summary: dict[str, Any], figures: Sequence[Path] = ()) -> None:
    """Writes a summary into bench/results, named after what was run, its date and its scale.

    Figures go beside it, with their own names behind that one.
    """
    path = RESULTS / f"{what}-{summary['date']}-{summary['scale']}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    for figure in figures:
        shutil.copyfile(figure, path.with_name(f"{path.stem}-{figure.name}"))
    print(f"saved: {path}")
