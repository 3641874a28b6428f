"""Every CUDA source compiled by nvcc for GPUs that are not here, for bench.kernels_report."""

import concurrent.futures
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.cubins import Row, Usage, find_nvcc, usages, usages_of_module

FOLDER = Path(__file__).parents[1] / "csrc" / "cuda"
COMPILERS = 2  # at a time
# as setup.py compiles them
FLAGS = ("-std=c++17", "-O3", "-cubin")


def architectures(nvcc: str) -> list[str]:
    """Returns what setup.py compiles for by default: 80, 90a and the newest that nvcc has."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = sorted({int(code.removeprefix("sm_").rstrip("af")) for code in listed.stdout.split()})
    return ["80", *["90a"] * (90 in known), str(known[-1])]


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cu"))


def written() -> set[str]:
    """Returns the kernels that all sources and headers define, each for every architecture."""
    found = set()
    for file in [*sources(), *sorted(FOLDER.glob("*.h"))]:
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", file.read_text(), flags=re.S)
        found |= {_name(declaration) for declaration in re.findall(r"__global__([^;{]*)", code)}
    return found


def _name(declaration: str) -> str:
    # the first word before an opening parenthesis that is no attribute, nor within one's
    depth, start = 0, 0
    for place, letter in enumerate(declaration):
        if letter == "(" and depth == 0:
            name = re.findall(r"\w+", declaration[start:place])[-1]
            if not name.startswith("__"):
                return name
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 0:
            start = place
    raise ValueError(f"__global__{declaration}: no name found")


def compiled(source: Path, architecture: str) -> dict[str, Usage]:
    """Returns what each kernel of a source takes when compiled for an architecture, such as "90a".

    Raises:
        RuntimeError: where nvcc refuses it, with what nvcc says.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source.stem}.cubin"
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        command = [find_nvcc(), *FLAGS, "-gencode", target, "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} for sm_{architecture}: {done.stderr}{done.stdout}")
        found = usages(cubin)
    return dict(zip(_short(list(found)), found.values(), strict=True))


def built() -> dict[str, dict[str, Usage]]:
    """Returns what the installed module's kernels take, by architecture; nothing if it is older.

    It is compiled from the same sources with the same flags: reading it saves minutes.
    """
    spec = importlib.util.find_spec("sma_fast._C")
    if spec is None or FOLDER.parents[1] != Path(spec.origin).parents[1]:
        return {}
    changed = max(path.stat().st_mtime for path in FOLDER.parent.rglob("*") if path.is_file())
    if Path(spec.origin).stat().st_mtime < changed:
        return {}
    found = usages_of_module(Path(spec.origin))
    return {
        architecture: dict(zip(_short(list(of)), of.values(), strict=True))
        for architecture, of in found.items()
    }


def rows(only: str = "", wanted: list[str] | None = None) -> Iterator[Row]:
    """Yields a row for each kernel with `only` in its name, for each architecture wanted.

    From the installed module, where it holds what the sources are now, else compiled.
    """
    wanted = wanted or architectures(find_nvcc())
    ready = built()
    for architecture in filter(ready.get, wanted):
        for name, usage in ready[architecture].items():
            if only in name:
                yield Row(name, f"sm_{architecture}", usage)
    wanted = [architecture for architecture in wanted if architecture not in ready]
    every = [(source, architecture) for source in sources() for architecture in wanted]
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        done = [pool.submit(compiled, *each) for each in every]
        for (_, architecture), future in zip(every, done, strict=True):
            for name, usage in future.result().items():
                if only in name:
                    yield Row(name, f"sm_{architecture}", usage)


def _short(mangled: list[str]) -> list[str]:
    """Returns `name<template arguments>` of each."""
    if not mangled:
        return []
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return [short_name(name) for name in done.stdout.splitlines()]


def short_name(demangled: str) -> str:
    """Returns `name<template arguments>`, without result, namespaces and parameters."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\([\w: ]+\)(?=-?\d)", "", name)  # casts: "(int)4"
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    return re.sub(r"\b(\w+::)+", "", name)
