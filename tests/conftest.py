"""Fixtures: every implementation this machine has, and memory that shows what was not written.

SMA_FAST_REQUIRE="cpu,triton,peers,train" makes what is missing an error instead of a skip. CUDA
kernels run in an emulator where there is no GPU (tests/emulation.py).
"""

import functools
import gc
import importlib.util
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# before torch starts its threads: spinning ones take the cores from each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

sys.path.append(str(Path(__file__).parent.parent))  # where bench lies, behind what is installed

import emulation
import hypothesis
import interpreter
import pytest
import torch
from torch.utils.dlpack import from_dlpack

import sma_fast
from bench.cubins import find_nvcc
from sma_fast import _dispatch, _native, reference
from sma_fast._schema import SCHEMAS
from sma_fast.testing import NATIVE_DTYPES, OPS, assert_same, bits, call, guarded, to_device

hypothesis.settings.register_profile(
    "sma_fast",
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("sma_fast")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter.hasten()

OUTCOME = pytest.StashKey[str]()  # of a test's body: "passed", "failed" or "skipped"
# a machine for kernels alone need not have the [train] extra
MISSING_TO_TRAIN = [
    name
    for name in ("transformers", "accelerate", "datasets", "sklearn", "matplotlib", "PIL")
    if importlib.util.find_spec(name) is None
]
if MISSING_TO_TRAIN:
    collect_ignore_glob = [
        *("test_data_*.py", "test_training*.py", "test_run.py", "test_show*.py", "test_cli.py"),
        *("test_checkpoints.py", "test_demo.py", "test_science.py", "test_pictures.py"),
    ]

MARGIN = 64  # elements around an output, a multiple of the alignment that torch gives


@dataclass(frozen=True)
class Implementation:
    """One way to run the ops: a backend on a device, on the CPU with one instruction set."""

    backend: str
    device: str
    isa: str | None = None

    @property
    def emulated(self) -> bool:
        return (self.backend, self.device) == ("cuda", "cpu")

    def __str__(self) -> str:
        if self.emulated:
            return "cuda-emulated"
        return self.isa and f"{self.backend}-{self.isa}" or self.backend


def why_missing(backend: str, op: str) -> str | None:
    """Returns why `backend` cannot run `op` on this machine, or None where it can."""
    try:
        _dispatch.implementation(backend, op, device_of(backend))
    except _dispatch.Unavailable as reason:
        return str(reason)
    if device_of(backend) == "cuda" and not torch.cuda.is_available():
        return "no CUDA device that torch can use"
    return None


def device_of(backend: str) -> str:
    if backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "cuda" if torch.cuda.is_available() and not interpreted else "cpu"
    return "cuda" if backend == "cuda" else "cpu"


def implementations(op: str) -> list[Implementation]:
    """Returns every implementation of `op` that this machine can run."""
    found = []
    for backend in _dispatch.BACKENDS:
        if why_missing(backend, op) is None:
            sets = _native.cpu_instruction_sets() if backend == "cpu" else (None,)
            found += [Implementation(backend, device_of(backend), isa) for isa in sets]
    if emulation.why_missing(op) is None:
        found.append(Implementation("cuda", "cpu"))
    return found


def missing_backends() -> dict[str, str]:
    """Returns the backends that run none of the ops here (the native ones: not all), and why."""
    missing = {}
    for backend in _dispatch.BACKENDS:
        reasons = [why_missing(backend, op) for op in SCHEMAS]
        lacks = any if backend == "cpu" else all  # kernels for the GPU come one by one
        if lacks(reasons):
            missing[backend] = next(filter(None, reasons))
    if reason := emulation.why_missing("gather_tokens"):
        missing["emulated"] = reason
    return missing


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*ops): run on what implements these ops too")
    config.addinivalue_line("markers", "one_instruction_set: run the CPU's best one only")
    config.addinivalue_line("markers", "interpreted: runs in Triton's interpreter, given by itself")
    config.addinivalue_line("markers", "emulated: runs CUDA kernels on the CPU")
    config.addinivalue_line("markers", "not_interpreted: Triton's interpreter would take minutes")
    config.addinivalue_line("markers", "on_gpu: runs on the GPU, where there is one")
    config.addinivalue_line("markers", "large: takes much of a GPU's memory, one at a time")
    # it visits all of torch's loggers for each test, and prints every step of torch.compile
    config.pluginmanager.set_blocked("logging-plugin")
    required = set(filter(None, os.environ.get("SMA_FAST_REQUIRE", "").split(",")))
    # peers: the packages that test_compat_... compare with; build: test_build, which downloads;
    # nvcc: test_kernels, which compiles
    allowed = (*_dispatch.BACKENDS, "emulated", "peers", "build", "golden", "train", "nvcc")
    if required - set(allowed):
        raise pytest.UsageError(f"SMA_FAST_REQUIRE: allowed are {', '.join(allowed)}")
    missing = missing_backends()
    if MISSING_TO_TRAIN:
        missing["train"] = f"not installed: {', '.join(MISSING_TO_TRAIN)}"
    if "nvcc" in required and find_nvcc() is None:
        missing["nvcc"] = "neither on PATH nor in CUDA_HOME"
    for name, reason in missing.items():
        if name in required:
            raise pytest.UsageError(f"SMA_FAST_REQUIRE: {name} is missing: {reason}")


def pytest_report_header() -> list[str]:
    lines = [f"backend {name} is not tested: {why}" for name, why in missing_backends().items()]
    if MISSING_TO_TRAIN:
        lines.append(f"training is not tested: not installed: {', '.join(MISSING_TO_TRAIN)}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes `backend` once per implementation of the op its file is named after.

    In a file of another name: once per implementation that has all ops.
    """
    if "backend" not in metafunc.fixturenames:
        return
    op = Path(metafunc.module.__file__).stem.removeprefix("test_")
    ops = [op] if op in OPS else list(SCHEMAS)
    for marker in metafunc.definition.iter_markers("needs"):
        ops += marker.args
    every = [implementations(op) for op in ops]
    found = [x for x in every[0] if all(x in others for others in every)]
    if metafunc.definition.get_closest_marker("one_instruction_set"):
        found = list({x.backend: x for x in found}.values())  # the last, which is the best
    metafunc.parametrize("backend", found, indirect=True, ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs slowly or on a GPU, and leaves out what would run too slowly."""
    without_opcheck = pytest.mark.skip(reason="expecttest, which opcheck needs, is not installed")
    for item in items:
        if item.name.startswith("test_opcheck") and not importlib.util.find_spec("expecttest"):
            item.add_marker(without_opcheck)
        chosen = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if not isinstance(chosen, Implementation):
            continue
        if chosen.device == "cuda":
            item.add_marker("on_gpu")
        elif chosen.backend == "triton":
            item.add_marker("interpreted")
        elif chosen.emulated:
            item.add_marker("emulated")
    # a mark of a test, or of one of its parameters
    items[:] = [
        item
        for item in items
        if not (
            item.get_closest_marker("not_interpreted") and item.get_closest_marker("interpreted")
        )
    ]


def pytest_collection_finish() -> None:
    gc.freeze()  # what is there until the end, through which every collection would look again
    gc.set_threshold(*gc.get_threshold()[:2], 100)  # and less often through what comes later


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.when == "call":
        item.stash[OUTCOME] = report.outcome
    return report


class Forced:
    """The implementation that is forced while a test runs, and what it was called with."""

    def __init__(self, implementation: Implementation):
        self.backend, self.device = implementation.backend, implementation.device
        self.ran: Counter[str] = Counter()
        self.raised: Counter[str] = Counter()
        self.arguments: dict[str, tuple] = {}  # of the last call of each registered op
        self.refused = False

    def inputs(self, inputs: dict) -> dict:
        return to_device(inputs, self.device)

    def refuses(self, op: str, inputs: dict) -> bool:
        """Returns whether `op` does not take the dtype here, having seen the call raise.

        Every implementation takes float32, bfloat16 and float16.
        """
        first = next((x for x in inputs.values() if isinstance(x, torch.Tensor)), None)
        dtype = torch.float32 if op == "draw_queries" or first is None else first.dtype
        function = _dispatch.implementation(self.backend, op, self.device)
        if function.dtypes is None or dtype in function.dtypes:
            return False
        assert dtype not in NATIVE_DTYPES, f"{self.backend} {op} does not take {dtype}"
        with pytest.raises(RuntimeError, match=f"{op} does not take {dtype}"):
            call(op, inputs)
        self.refused = True
        return True

    def assert_same_as_oracle(self, op: str, inputs: dict, layout: str = "packed") -> None:
        """Asserts the oracle's bits for `inputs` in `layout`, and nothing else touched."""
        inputs, assert_unchanged = guarded(self.inputs(inputs), layout)
        if self.refuses(op, inputs):
            return
        assert_same(call(op, inputs), self.expected(op, inputs))
        assert_unchanged()

    def expected(self, op: str, inputs: dict) -> Any:
        """Returns what the oracle gives for the same inputs, on the same device."""
        with sma_fast.use_backend("reference"):
            return call(op, inputs)


@pytest.fixture
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> Iterator[Forced]:
    """Forces one implementation; fails unless it ran, or if it wrote beside its outputs."""
    chosen: Implementation = request.param
    forced = Forced(chosen)
    find = _dispatch.implementation

    def find_and_count(backend: str, op: str, device_type: str):
        if chosen.emulated and (backend, device_type) == ("cuda", "cpu"):
            function = emulation.implementation(op)
        else:
            function = find(backend, op, device_type)
        if backend != chosen.backend:
            return function

        @functools.wraps(function)
        def counted(*arguments):
            forced.ran[op] += 1
            forced.arguments[op] = arguments
            try:
                return function(*arguments)
            except ValueError:  # what was looked at before a kernel was called
                forced.raised[op] += 1
                raise

        counted.dtypes = getattr(function, "dtypes", None)
        return counted

    outputs: list[torch.Tensor] = []
    allocate = _native._empty

    def allocate_among_sentinels(
        shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        if not torch.are_deterministic_algorithms_enabled() or device.type != "cpu":
            return allocate(shape, dtype, device)
        size = math.prod(shape)
        outputs.append(torch.empty(size + 2 * MARGIN, dtype=dtype))  # poisoned
        # through DLPack it is a storage of its own, which opcheck compares with the fake's
        return from_dlpack(outputs[-1][MARGIN : MARGIN + size]).view(shape)

    monkeypatch.setattr(_native, "_empty", allocate_among_sentinels)
    monkeypatch.setattr(_native, "_small", allocate_among_sentinels)
    monkeypatch.setattr(_dispatch, "implementation", find_and_count)
    _dispatch._choose.cache_clear()
    if chosen.emulated:
        emulation.use(monkeypatch)
    if "cuda" in (chosen.backend, chosen.device):  # index values are looked at there only then
        monkeypatch.setenv("SMA_FAST_CHECK", "1")
    before = _native.set_cpu_isa(chosen.isa) if chosen.isa else None
    native_calls = _native.calls.copy()
    try:
        with sma_fast.use_backend(chosen.backend):
            yield forced
        if request.node.stash.get(OUTCOME, None) == "passed":
            assert forced.ran or forced.refused, f"no op ran on {chosen}"
        if chosen.backend in ("cpu", "cuda"):
            native = _native.calls - native_calls
            reached = forced.ran - forced.raised
            assert all(native[chosen.backend, op] >= n for op, n in reached.items())
        for buffer in outputs:
            margins = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
            poison = torch.empty(2 * MARGIN, dtype=buffer.dtype)
            assert torch.equal(bits(margins), bits(poison)), "wrote beside an output"
        if chosen.isa:
            assert _native.set_cpu_isa(chosen.isa) == chosen.isa
    finally:
        if chosen.isa:
            _native.set_cpu_isa(before)
        _dispatch._choose.cache_clear()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty returns with NaN or the largest integer: unwritten elements show."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Runs with more threads than most test machines have cores, so that they overtake others."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked_reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the reference as on a GPU, where index values are not looked at."""
    monkeypatch.setattr(reference, "check_index", lambda *_: None)
    with sma_fast.use_backend("reference"):
        yield


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every op fail the test: wrong arguments must be refused before one starts."""

    def refuse(op: str, *_: Any):
        raise AssertionError(f"{op} ran")

    monkeypatch.setattr(_dispatch, "_choose", refuse)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch):
    """Answers every call of an op with its CUDA kernel, in the emulator."""
    if reason := emulation.why_missing("gather_tokens"):
        pytest.skip(reason)
    emulation.use(monkeypatch)
    find = _dispatch.implementation

    def implementation(backend: str, op: str, device_type: str):
        return _native._OPS[op] if backend == "cuda" else find(backend, op, device_type)

    monkeypatch.setattr(_dispatch, "implementation", implementation)
    _dispatch._choose.cache_clear()
    with sma_fast.use_backend("cuda"):
        yield
    _dispatch._choose.cache_clear()
