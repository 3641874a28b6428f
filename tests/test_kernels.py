"""The GPUs' kernels as a whole: one for each op, compiled for GPUs that are not here."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sma_fast import reference
from sma_fast._schema import SCHEMAS

ROOT = Path(__file__).parent.parent

from bench import cubins, gpu_stages, kernels_cuda  # noqa: E402

MOST_SHARED = {"80": 166912, "90": 232448}  # bytes of a block, and of later ones


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_op_has_one_with_the_reference_s_arguments(op: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    module = __import__(f"sma_fast.kernels.{op}", fromlist=["launch"])
    expected = list(inspect.signature(getattr(reference, op)).parameters)
    assert list(inspect.signature(module.launch).parameters)[: len(expected)] == expected


def reported(*options: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `make kernels-report`'s program."""
    return run("-m", "bench.kernels_report", *options, **environment)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python where Triton compiles."""
    inherited = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited | environment,
    )


UNDECIDED = """
from bench.kernels_triton import launches
every = launches(90)
print(len(every), [str(x) for x in every if "enable_fp_fusion" not in dict(x.options)])
"""


def test_every_launch_says_how_products_are_rounded() -> None:
    """Else Triton's versions differ, and warn of it."""
    pytest.importorskip("triton", reason="triton is not installed")
    ended = run("-c", UNDECIDED)
    assert re.fullmatch(r"[1-9]\d+ \[\]\n", ended.stdout), ended.stdout + ended.stderr


def rows(ended: subprocess.CompletedProcess, spills: int = 0) -> list[tuple[str, str]]:
    """Returns (kernel, architecture) of a report's lines, all of which must fit the machine.

    Args:
        spills: bytes that are allowed, but on sm_90.
    """
    assert ended.returncode == 0, ended.stdout + ended.stderr
    row = r"^\| (\w+)\b[^|]*\| sm_(\w+) \| (\d+) \| (\d+) \| (\d+) \|$"
    found = re.findall(row, ended.stdout, re.M)
    for name, architecture, registers, shared, spilled in found:
        most = MOST_SHARED.get(architecture[:2], MOST_SHARED["90"])
        assert int(registers) > 0, name
        assert int(spilled) <= (spills if architecture != "90" else 0), (name, architecture)
        assert int(shared) <= most, (name, architecture, shared)
    return [(name, architecture) for name, architecture, *_ in found]


@pytest.mark.parametrize("architecture", (80, 90, 100))
def test_triton_kernels_compile_without_spills(architecture: int) -> None:
    """In the variants that the benchmarks' shapes start."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    # the compilers of older ones leave a few bytes of some kernels (3.6: 64 at most, none on sm_90)
    older = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    spills = 64 if older else 0
    options = ("--architectures", str(architecture), "--allow", str(spills))
    found = rows(reported("triton", *options), spills)
    written = {
        name
        for file in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    }
    assert set(found) == {(name, str(architecture)) for name in written}


@pytest.fixture
def nvcc() -> str:
    found = cubins.find_nvcc()
    if found is None:
        pytest.skip("no nvcc")  # with SMA_FAST_REQUIRE=nvcc, conftest.py refuses to start
    return found


def test_cuda_kernels_compile_without_spills(nvcc: str) -> None:
    """For 80, 90a and the newest: every kernel of every source."""
    found = rows(reported("cuda"))
    architectures = kernels_cuda.architectures(nvcc)
    assert {"80", "90a"} < set(architectures) and len(architectures) == 3
    written = kernels_cuda.written()
    assert written
    for architecture in architectures:
        assert {name for name, sm in found if sm == architecture} == written, architecture


@pytest.mark.parametrize("name", ["device", "gather_tokens"])
def test_sanitizer_s_filter_finds_our_kernels(nvcc: str, name: str, tmp_path: Path) -> None:
    cubin, source = tmp_path / "x.cubin", kernels_cuda.FOLDER / f"{name}.cu"
    command = [nvcc, *kernels_cuda.FLAGS, "-arch=sm_80", "-o", str(cubin), str(source)]
    subprocess.run(command, check=True)
    kernels = cubins.usages(cubin)
    assert kernels and all(gpu_stages.OURS in kernel for kernel in kernels)


SPILLS = """
#include <cuda_runtime.h>
namespace sma { namespace {
constexpr int threads(int x) { return x; }  // __global__ void commented_out(
template <class T, int N, bool B>
__global__ void __launch_bounds__(threads(256), 1) shared(T* p) {
  __shared__ T s[256];
  s[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[0] = s[N + B];
}
__global__ void local(float* p, int n) {
  float a[200];
  for (int i = 0; i < n; i++) a[i * 7 % 200] = p[i];
  p[0] = a[n % 200];
}
}
void go(float* p) { shared<float, 4, true><<<8, 256>>>(p); local<<<1, 1>>>(p, 3); }
}
"""


def test_report_sees_shared_and_local_memory(
    nvcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from bench import kernels_report

    (tmp_path / "spills.cu").write_text(SPILLS)
    monkeypatch.setattr(kernels_cuda, "FOLDER", tmp_path)
    assert kernels_cuda.written() == {"shared", "local"}
    report: Callable[..., int] = kernels_report.main
    assert report(["cuda", "--architectures", "80", "--only", "shared"]) == 0
    assert re.search(
        r"\| shared<float, 4, true> \| sm_80 \| \d+ \| 1024 \| 0 \|", capsys.readouterr().out
    )
    assert report(["cuda", "--architectures", "80"]) == 1
    assert re.search(r"\| local \| sm_80 \| \d+ \| 0 \| 800 \|", capsys.readouterr().out)
    (tmp_path / "spills.cu").write_text("not C++")
    with pytest.raises(RuntimeError, match="spills.cu for sm_80: .*error"):
        report(["cuda", "--architectures", "80"])


def test_report_allows_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import kernels_report

    some = [(f"a_{n}", "sm_80", cubins.Usage(32, 0, n, 0)) for n in (0, 8, 4)]
    monkeypatch.setattr(kernels_cuda, "rows", lambda *_: some)
    monkeypatch.setattr(cubins, "find_nvcc", lambda: "nvcc")
    assert kernels_report.main(["cuda"]) == 1
    assert kernels_report.main(["cuda", "--allow", "7"]) == 1
    assert kernels_report.main(["cuda", "--allow", "8"]) == 0


def test_report_without_nvcc() -> None:
    ended = reported("--only", "draw_queries", "--architectures", "90a", PATH="", CUDA_HOME="")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("no nvcc on PATH or in CUDA_HOME: CUDA's kernels are left out\n")
    assert "| sm_90 |" in ended.stdout
    assert reported("cuda", PATH="", CUDA_HOME="").returncode == 1
