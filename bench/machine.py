"""What is measured on what: the machine, its rates, the versions and the sources.

`python -m bench.machine cpu|cuda` prints it as JSON, in a process of its own, so that bench.gpu
holds no memory of the GPU while others are timed there.
"""

import contextlib
import datetime
import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import torch

import sma_fast
from bench import harness, roofline
from bench.cubins import find_nvcc
from bench.runs import processor

ROOT = pathlib.Path(__file__).parents[1]
# what a measurement depends on; everything else may change beside it
MEASURED = ("csrc", "kernels", "sma_fast", "bench", "tests", "setup.py", "pyproject.toml")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh", ".toml")


def session(settings: harness.Settings) -> dict[str, Any]:
    """Returns what is the same for all benchmarks of a run: machine, versions, choices and rates.

    The rates are measured again: where those after differ from those before, the run was disturbed.
    """
    asked = (settings.device, settings.dtype, settings.quick)
    before, after = roofline.rates(*asked), roofline.measure_rates(*asked)
    rates = before._asdict() | {f"{name}_after": rate for name, rate in after._asdict().items()}
    if settings.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{processor()}, {torch.get_num_threads()} threads"
    return {
        "machine": machine,
        "memory": "kept when freed" if settings.keep_memory else "as the system gives it",
        "quick": settings.quick,
        "rates": {str(settings.dtype).removeprefix("torch."): rates},
        "config": config(),
    }


def config() -> dict[str, str]:
    """Returns what sma_fast.show_config() prints, without paths."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        sma_fast.show_config()
    found = dict(line.split(": ", 1) for line in printed.getvalue().splitlines())
    return {name: value for name, value in found.items() if "/" not in value}


def described(device: str) -> dict[str, Any]:
    """Returns the head of bench.gpu's JSON."""
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "device": device,
        "sources": sources(),
        **commit(),
        "config": config(),
        "nvcc": _first(r"release ([\d.]+)", [find_nvcc() or "nvcc", "--version"]),
        "cuda": torch.version.cuda,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "machine": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _first(r"([\d.]+)", query),
        }
    return found


def sources() -> str:
    """Returns a hash of all that a measurement depends on, the same with and without git."""
    files = [
        file
        for name in MEASURED
        for file in ([ROOT / name] if "." in name else (ROOT / name).rglob("*"))
        if file.suffix in SUFFIXES and file.is_file()
    ]
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def commit() -> dict[str, Any]:
    """Returns the commit checked out here, None where there is no git, and if it is changed."""
    head = _first(r"([0-9a-f]{40})", ["git", "rev-parse", "HEAD"])
    if head is None:
        return {"commit": None, "uncommitted_changes": None}
    status = ["git", "status", "--porcelain", "--", *MEASURED]
    done = subprocess.run(status, capture_output=True, text=True, cwd=ROOT)
    return {"commit": head, "uncommitted_changes": bool(done.stdout.strip())}


def _first(pattern: str, command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return None
    found = re.search(pattern, done.stdout) if done.returncode == 0 else None
    return found and found[1]


if __name__ == "__main__":
    print(json.dumps(described(*sys.argv[1:])))
