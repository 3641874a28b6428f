"""Triton's kernels as a whole: one for each op, compiled for GPUs that are not here."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sma_fast import reference
from sma_fast._schema import SCHEMAS

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 90, 100)

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_op_has_one_with_the_reference_s_arguments(op: str) -> None:
    module = __import__(f"sma_fast.kernels.{op}", fromlist=["launch"])
    expected = list(inspect.signature(getattr(reference, op)).parameters)
    assert list(inspect.signature(module.launch).parameters)[: len(expected)] == expected


def test_kernels_compile_without_spills() -> None:
    """For three architectures, in the variants that the benchmarks' shapes start."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-m", "bench.kernels_report", "--architectures", *map(str, ARCHITECTURES)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    row = r"^\| (\w+_kernel)\b.*\| sm_(\d+) \| (\d+) \| \d+ \| (\d+) \|$"
    rows = re.findall(row, ended.stdout, re.M)
    assert all(int(registers) > 0 and spilled == "0" for _, _, registers, spilled in rows)
    written = {
        name
        for file in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    }
    for architecture in ARCHITECTURES:
        assert {name for name, sm, _, _ in rows if int(sm) == architecture} == written
