"""bench.gpu_install: what `make gpu` asks for before it builds, and which GPUs it builds for."""

import importlib.util
import stat
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))  # where bench lies, behind what is installed

from bench import gpu_install  # noqa: E402


def program(folder: Path, name: str, text: str) -> Path:
    """Writes a program that prints a text."""
    file = folder / name
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in names else find(name)
    )


def test_what_is_missing_is_named_for_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pybind11", "pytest_benchmark")
    assert {"pybind11", "pytest-benchmark"} <= set(gpu_install.missing())


@pytest.mark.parametrize(
    "version, wanted",
    [("63.4", {"setuptools>=64"}), ("69.5.1", {"wheel"}), ("70.1.0", set()), ("84.2", set())],
)
def test_versions_of_setuptools(
    monkeypatch: pytest.MonkeyPatch, version: str, wanted: set[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", _all_but_wheel)
    monkeypatch.setattr(gpu_install.importlib.metadata, "version", lambda _: version)
    assert set(gpu_install.missing()) == wanted


def _all_but_wheel(name: str) -> object | None:
    return None if name == "wheel" else name


@pytest.mark.parametrize(
    "said, found",
    [("9.0", "90a"), ("9.0\n9.0\n8.0", "80;90a"), ("12.0", None), ("No devices were found", None)],
)
def test_builds_for_the_gpus_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, found: str | None
) -> None:
    nvcc = program(tmp_path, "nvcc", "sm_80\nsm_90\nsm_100")
    program(tmp_path, "nvidia-smi", said)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_install.architectures(str(nvcc)) == found


def test_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_install.architectures("nvcc") is None


def test_nothing_is_built_without_nvcc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_install, "find_nvcc", lambda: None)
    monkeypatch.setattr(gpu_install.subprocess, "run", lambda *_, **__: pytest.fail("it built"))
    assert gpu_install.main() == 1
    assert "make gpu: no nvcc: set CUDA_HOME or PATH" in capsys.readouterr().err
