"""Makes `pytest bench` run bench_*.py, and files the machine's rates and versions in the JSON."""

import contextlib
import gc
import json
import pathlib

import pytest
import torch

from bench import harness, machine, memory, roofline


def pytest_addoption(parser):
    group = parser.getgroup("sma_fast benchmarks")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    group.addoption("--batch", type=_batch, help="of all shapes (choose with -k); full: a GPU's")
    group.addoption("--rows", type=pathlib.Path, help="file to add each result to as it comes")
    group.addoption("--quick", action="store_true", help="tiny shapes, to see that it works")
    group.addoption("--no-compile", action="store_true", help="leave out torch.compile's peers")
    group.addoption("--keep-memory", action="store_true", help="make glibc keep freed memory")


def _batch(text: str) -> int | str:
    return text if text == "full" else int(text)


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    config.addinivalue_line("markers", "on_gpu: runs on the GPU")
    if config.option.keep_memory:
        memory.keep_freed_memory()


def pytest_collection_modifyitems(config, items):
    if config.option.device == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=_cuda_clock))
            item.add_marker("on_gpu")


def _cuda_clock():
    return roofline.clock("cuda")


def _settings(config) -> harness.Settings:
    option = config.option
    return harness.Settings(
        device=option.device,
        dtype=getattr(torch, option.dtype),
        batch=option.batch,
        quick=option.quick,
        compile=not option.no_compile,
        keep_memory=option.keep_memory,
    )


@pytest.fixture(scope="session")
def settings(request) -> harness.Settings:
    return _settings(request.config)


@pytest.fixture
def measure(benchmark, settings):
    """Returns the function that takes a harness.Case, checks it and times it."""
    yield lambda case: harness.measure(benchmark, settings, case)
    memory.release_freed_memory()
    if settings.device == "cuda":  # what one benchmark held is not there for the next
        gc.collect()
        with contextlib.suppress(RuntimeError):  # after a failed capture; see bench.outcomes
            torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _filed(request, benchmark):
    yield
    if request.config.option.rows and benchmark.extra_info:
        _file(request.config, {"test": request.node.nodeid, **benchmark.extra_info})


def _file(config, line: dict) -> None:
    with config.option.rows.open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_sessionfinish(session):
    if session.config.option.rows and session.testscollected:
        _file(session.config, {"rates": machine.session(_settings(session.config))["rates"]})


def pytest_benchmark_update_json(config, benchmarks, output_json):
    settings = _settings(config)
    output_json["sma_fast"] = machine.session(settings)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node")  # the host's name
