"""`make gpu`'s first step: what is missing, which GPUs are built for, what pip was told."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bench import gpu_install


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns a function that puts a program on PATH, which prints something."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("SMA_FAST_CUDA_ARCHS", raising=False)

    def put(name: str, prints: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{prints}'\n")
        (tmp_path / name).chmod(0o755)

    put("nvcc", "sm_80\nsm_86\nsm_90\nsm_100")
    return put


@pytest.mark.parametrize(
    ("said", "archs"),
    [
        ("9.0", "90a"),
        ("8.0\n8.0", "80"),
        ("9.0\n8.6", "86;90a"),
        ("10.0", "100"),
        ("12.1", None),  # this nvcc does not know it
        ("No devices were found", None),
    ],
)
def test_architectures(programs, said: str, archs: str | None) -> None:
    programs("nvidia-smi", said)
    assert gpu_install.architectures("nvcc") == archs


def test_architectures_without_nvidia_smi(programs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_install.architectures(str(tmp_path / "nvcc")) is None


@pytest.mark.parametrize(
    ("version", "wheel", "lacks"),
    [
        ("63.4.3", True, ["setuptools>=64"]),
        ("64.0.0", True, []),
        ("70.0.0", False, ["wheel"]),
        ("70.1", False, []),
        ("84.2.1", False, []),
    ],
)
def test_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, version: str, wheel: bool, lacks: list[str]
) -> None:
    there = {*gpu_install.MODULES, "ninja", *(["wheel"] if wheel else [])}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    monkeypatch.setenv("PATH", "")
    assert gpu_install.missing() == lacks
    there -= {"pybind11", "pytest_benchmark", "ninja"}
    assert gpu_install.missing() == ["pybind11", "pytest-benchmark", *lacks, "ninja"]


@pytest.mark.parametrize("wish", [None, "80;90a"])
def test_builds_for_what_is_there(programs, monkeypatch: pytest.MonkeyPatch, wish) -> None:
    ran = []

    def run(command, **options):
        if "pip" not in command:
            return ask(command, **options)
        ran.append((command, options["env"]))
        return subprocess.CompletedProcess(command, 0)

    ask = subprocess.run
    programs("nvidia-smi", "9.0")
    if wish:
        monkeypatch.setenv("SMA_FAST_CUDA_ARCHS", wish)
    monkeypatch.setattr(gpu_install, "missing", list)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_install.main() == 0
    ((command, environment),) = ran
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert environment["SMA_FAST_CUDA_ARCHS"] == (wish or "90a")
    assert environment["SMA_FAST_CUDA"] == "1"


def test_nothing_is_built_where_something_is_missing(
    programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_install, "missing", lambda: ["pybind11", "ninja"])
    monkeypatch.setattr(gpu_install, "find_nvcc", lambda: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it began"))
    assert gpu_install.main() == 1
    said = capsys.readouterr().err
    assert "install first: pybind11 ninja" in said and "no nvcc: set CUDA_HOME" in said


@pytest.mark.parametrize("managed", [True, False])
def test_a_system_s_own_python(
    programs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    managed: bool,
) -> None:
    if managed:
        (tmp_path / "EXTERNALLY-MANAGED").touch()
    failed = subprocess.CompletedProcess([], 1, stdout="")
    monkeypatch.setattr(gpu_install, "missing", list)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    assert gpu_install.main() == 1
    said = f"{sys.executable} -m venv --system-site-packages --without-pip .venv-gpu"
    assert (said in capsys.readouterr().err) == managed
