"""The package builds where torch is not: sdist, wheel from the sdist, and without a compiler.

Runs where SMA_FAST_REQUIRE names `build`, since an isolated build asks the package index for
setuptools, pybind11 and ninja.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    "build" not in os.environ.get("SMA_FAST_REQUIRE", "").split(","),
    reason="downloads build requirements: set SMA_FAST_REQUIRE=build",
)


def build(out: Path, source: Path, *options: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", out, *options, source],
        env=os.environ | {"SMA_FAST_CUDA": "0"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    build(out, ROOT, "--sdist")
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("a folder with spaces")
    with tarfile.open(sdist) as archive:
        # Python before 3.11.4 has no filters; the archive is our own
        archive.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(out.iterdir())


def test_wheel_from_the_sdist_alone(unpacked, tmp_path):
    quick = tmp_path / "c++"  # what is installed was optimised already: here the files count
    quick.write_text('#!/bin/sh\nexec ${SMA_FAST_TEST_CXX:-c++} "$@" -O0\n')
    quick.chmod(0o755)
    compilers = {"CXX": str(quick), "SMA_FAST_TEST_CXX": os.environ.get("CXX", "c++")}
    log = build(tmp_path, unpacked, "--wheel", **compilers)
    assert "torch" not in log.lower().replace("pytorch", "")  # nothing asked for it
    names = names_in(next(tmp_path.glob("*.whl")))
    assert any(name.startswith("sma_fast/_C.") for name in names)
    assert "sma_fast/kernels/gather_tokens.py" in names
    assert not any(name.startswith(("kernels/", "csrc/", "tests/", "bench/")) for name in names)


def test_without_a_compiler(unpacked, tmp_path):
    empty = tmp_path / "path"
    empty.mkdir()
    log = build(tmp_path, unpacked, "--wheel", PATH=str(empty), CXX="")
    assert "no C++ compiler was found" in log
    wheel = next(tmp_path.glob("*.whl"))
    assert not any(name.startswith("sma_fast/_C.") for name in names_in(wheel))
    with zipfile.ZipFile(wheel) as archive:
        assert b"no C++ compiler was found" in archive.read("sma_fast/_build.json")


def test_an_old_setuptools(unpacked, tmp_path):
    """As `make gpu` installs, with the Python's own: the oldest that this Python can run."""
    oldest = "64.0.0" if sys.version_info < (3, 12) else "69.5.1"
    python = tmp_path / "environment" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    wheel = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, unpacked]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python.parents[1]], check=True)
    requirements = [f"setuptools=={oldest}", "wheel", "pybind11", "ninja"]
    subprocess.run([*pip, "install", "--quiet", *requirements], check=True)
    subprocess.run(wheel, env=os.environ | {"SMA_FAST_NATIVE": "0"}, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        assert "License: MIT" in archive.read(metadata).decode().splitlines()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())


COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in -o) shift; echo "$0" > "$1";; -MF) shift; echo "x:" > "$1";; esac
  shift
done
"""


def test_the_last_build_is_what_is_there(tmp_path):
    """Though the objects of an earlier one, in their own folder, are up to date."""
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}/lib"]
    for name in ("first", "other", "first"):
        compiler = tmp_path / name
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
        subprocess.run(
            [*command, f"--build-temp={tmp_path}/{name}-temp"],
            env=os.environ | {"SMA_FAST_CUDA": "0", "CXX": str(compiler)},
            cwd=ROOT,
            check=True,
        )
        (module,) = (tmp_path / "lib" / "sma_fast").glob("_C.*")
        assert module.read_text() == f"{compiler}\n"


@pytest.mark.parametrize("archs", ["75", "80;75", "90a,sm_80", "80;"])
def test_gpus_that_are_too_old_are_refused(archs, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"-t{tmp_path}"],
        env=os.environ
        | {"SMA_FAST_CUDA": "1", "SMA_FAST_CUDA_ARCHS": archs, "CUDA_HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"SMA_FAST_CUDA_ARCHS={archs!r}: " in done.stderr
    assert "compute capability 8.0 or more" in done.stderr
