"""Which implementation answers: use_backend, SMA_FAST_BACKEND, backends(), show_config()."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import missing_backends
from torch.utils._python_dispatch import TorchDispatchMode

import sma_fast
from sma_fast import _dispatch, _native, reference
from sma_fast._schema import SCHEMAS
from sma_fast.testing import CASES, OPS, call, gather_inputs, select_inputs

INPUTS = gather_inputs()


@pytest.fixture(autouse=True)
def choose_afresh():
    """Forgets what was chosen, before a test and after it."""
    _dispatch._choose.cache_clear()
    yield
    _dispatch._choose.cache_clear()


@pytest.fixture
def record(monkeypatch):
    """Returns the list of (backend, op) that answer while the test runs."""
    answered = []
    find = _dispatch.implementation

    def implementation(backend, op, device_type):
        function = find(backend, op, device_type)

        def call(*arguments):
            answered.append((backend, op))
            return function(*arguments)

        call.dtypes = getattr(function, "dtypes", None)
        return call

    monkeypatch.setattr(_dispatch, "implementation", implementation)
    return answered


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SMA_FAST")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", _dispatch.BACKENDS)
def test_this_machine_has(name):
    # the skips of a run, one per backend; SMA_FAST_REQUIRE makes them errors (conftest.py)
    missing = missing_backends()
    if name in missing:
        pytest.skip(f"{name}: {missing[name]}")
    with sma_fast.use_backend(name):
        states = sma_fast.backends()
    assert "answers" in {table[name] for op in states for table in states[op].values()}


def test_poisoned_memory_shows(poisoned_memory):
    assert bool(torch.empty(5).isnan().all())
    assert bool((torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all())


STAND_IN = _dispatch._stand_in.__wrapped__


def answered(monkeypatch, op, *arguments, forced=None, without=(), broken=()) -> str:
    """Returns which backend answers on a GPU."""

    def implementation(backend, op, device_type):
        if backend in broken:
            raise ImportError("broken")
        if backend in without:
            raise _dispatch.Unavailable("not here")

        def function(*_):
            return backend

        function.suits = getattr(_native._OPS[op], "suits", None) if backend == "cuda" else None
        return function

    monkeypatch.setattr(_dispatch, "implementation", implementation)
    monkeypatch.setattr(_dispatch, "_stand_in", STAND_IN)
    choose = _dispatch._choose.__wrapped__
    return choose(op, "cuda", arguments[0].dtype, forced)(*arguments)


def test_long_and_strided_gradients_are_triton_s(monkeypatch):
    packed, strided = torch.zeros(2, 5, 3), torch.zeros(2, 6, 3)[:, 1:]

    def answers(grad, width, **options):
        ids = torch.zeros(len(grad), width, dtype=torch.int64)
        return answered(monkeypatch, "gather_tokens_backward", grad, ids, 7, **options)

    assert answers(packed, 5) == "cuda"
    assert answers(strided, 5) == "triton"
    assert answers(packed, 4097) == "triton"
    assert answers(strided, 5, forced="cuda") == "cuda"
    assert answers(strided, 5, without=("triton",)) == "cuda"
    assert answers(packed, 5, without=("cuda",)) == "triton"
    assert answers(packed, 5, broken=("triton",)) == "cuda"  # which does not import it
    with pytest.raises(ImportError):
        answers(strided, 5, broken=("triton",))


class NoOperation(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        pytest.fail(f"{function} ran")


def test_a_gpu_s_tensors_are_not_looked_into(monkeypatch):
    """Nor is anything made of them, where nobody asked for it."""
    monkeypatch.delenv("SMA_FAST_CHECK", raising=False)
    index = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    padding = torch.zeros(2, 5, dtype=torch.bool, device="meta")
    rows = torch.zeros(2, 5, 4, device="meta")
    heads = torch.zeros(2, 2, 5, 4, device="meta")
    given = {
        "attention_scores": (heads, heads, index, index, padding),
        "aggregate_attention": (heads, index, index),
        "self_guided_masking": (heads, heads, [rows], index, index, padding),
        "bipartition": (rows, padding),
        "informed_scores": (rows, padding, padding, "object"),
    }
    for op, arguments in given.items():
        with NoOperation():
            assert _dispatch._checked(op, lambda *_: "answer")(*arguments) == "answer"


@pytest.mark.parametrize("op", ["attention_scores", "self_guided_masking"])
def test_wide_heads_are_triton_s(monkeypatch, op):
    for dtype, width in ((torch.float32, 360), (torch.bfloat16, 720)):
        for more, backend in ((0, "cuda"), (1, "triton")):
            query = torch.zeros(1, 2, 3, width + more, dtype=dtype)
            assert answered(monkeypatch, op, query, query) == backend
            assert answered(monkeypatch, op, query, query, without=("triton",)) == "cuda"


def test_ops_and_schemas_agree():
    assert set(OPS) | {"gather_tokens_backward", "restore_tokens_backward"} == set(SCHEMAS)
    for op in SCHEMAS:
        assert callable(getattr(reference, op))
        assert hasattr(torch.ops.sma_fast, op)


def test_backends_lists_every_op_device_and_backend():
    table = sma_fast.backends()
    assert list(table) == list(SCHEMAS)
    for devices in table.values():
        assert list(devices) == ["cpu", "cuda"]
        for states in devices.values():
            assert set(states) == set(_dispatch.BACKENDS)
            assert list(states.values()).count("answers") <= 1
        assert "answers" in devices["cpu"].values()
        assert devices["cpu"]["cuda"] == "backend 'cuda' does not run on device 'cpu'"


def test_backends_says_who_answers(record):
    call("gather_tokens", INPUTS)
    states = sma_fast.backends()["gather_tokens"]["cpu"]
    assert record == [(b, "gather_tokens") for b in states if states[b] == "answers"]


def test_use_backend_forces(record):
    with sma_fast.use_backend("reference"):
        call("gather_tokens", INPUTS)
        states = sma_fast.backends()["gather_tokens"]["cpu"]
    assert record == [("reference", "gather_tokens")]
    assert [b for b in states if states[b] == "answers"] == ["reference"]


def test_use_backend_nests_and_ends():
    assert _dispatch._forced is None
    with sma_fast.use_backend("reference"):
        with sma_fast.use_backend("cuda"):
            assert _dispatch._forced == "cuda"
        assert _dispatch._forced == "reference"
        with pytest.raises(ZeroDivisionError), sma_fast.use_backend("triton"):
            raise ZeroDivisionError
        assert _dispatch._forced == "reference"
    assert _dispatch._forced is None


@pytest.mark.parametrize("name", ("gpu", "", "CPU", None))
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=f"^name: unknown backend {name!r}, allowed are reference"):
        with sma_fast.use_backend(name):
            pass
    assert _dispatch._forced is None


@pytest.mark.parametrize("op", OPS)
def test_forced_backend_without_an_implementation_raises(op):
    # no tensor here is on a GPU, so the cuda backend has nothing to answer
    inputs = CASES[op][0].build()
    with sma_fast.use_backend("cuda"):
        first = "draw_queries" if op == "self_guided_masking" and "num_queries" in inputs else op
        with pytest.raises(RuntimeError) as raised:
            call(op, inputs)
        assert "answers" not in sma_fast.backends()[op]["cpu"].values()
    message = str(raised.value)
    assert message.startswith(f"sma_fast.{first} has no implementation for cpu torch.float32 here")
    assert "cuda: backend 'cuda' does not run on device 'cpu'" in message
    assert "sma_fast.backends()" in message


def test_triton_without_a_gpu_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _dispatch._choose.cache_clear()
    with sma_fast.use_backend("triton"), pytest.raises(RuntimeError, match="triton: "):
        call("select_tokens", select_inputs(mask_ratio=0.5))
    reason = sma_fast.backends()["select_tokens"]["cpu"]["triton"]
    assert "TRITON_INTERPRET=1" in reason or "pip install triton" in reason
    _dispatch._choose.cache_clear()


def test_float64_goes_to_the_reference(record):
    call("select_tokens", select_inputs(torch.float64, mask_ratio=0.5))
    assert record == [("reference", "select_tokens")]


def test_native_module_not_built(monkeypatch, record):
    def not_built():
        raise _dispatch.Unavailable("native module not built: no compiler")

    monkeypatch.setattr(_native, "_module", not_built)
    call("gather_tokens", INPUTS)
    assert record == [("reference", "gather_tokens")]
    assert sma_fast.backends()["gather_tokens"]["cpu"]["cpu"] == (
        "native module not built: no compiler"
    )
    assert "no compiler" in _dispatch.config_text()
    with sma_fast.use_backend("cpu"), pytest.raises(RuntimeError, match="not built: no compiler"):
        call("gather_tokens", INPUTS)


def test_native_module_that_fails_to_load_is_not_passed_over(monkeypatch, record):
    def broken():
        raise RuntimeError("failed to load: undefined symbol")

    monkeypatch.setattr(_native, "_module", broken)
    with pytest.raises(RuntimeError, match="undefined symbol"):
        call("gather_tokens", INPUTS)
    assert record == []
    assert "undefined symbol" in sma_fast.backends()["gather_tokens"]["cpu"]["cpu"]
    assert "undefined symbol" in _dispatch.config_text()
    with sma_fast.use_backend("reference"):
        call("gather_tokens", INPUTS)


def test_show_config(capsys):
    assert sma_fast.show_config() is None
    assert capsys.readouterr().out == _dispatch.config_text() + "\n"
    lines = dict(line.split(": ", 1) for line in _dispatch.config_text().splitlines())
    assert lines["sma_fast"] == sma_fast.__version__
    assert lines["torch"] == torch.__version__
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["forced backend"] == "none"
    assert lines["CUDA device"] == "none" or torch.cuda.is_available()
    if _native.cpu_instruction_sets():
        assert lines["CPU instruction set"] in _native.cpu_instruction_sets()
        assert lines["CPU instruction sets here"] == ", ".join(_native.cpu_instruction_sets())
        assert "CUDA architectures built" in lines
    with sma_fast.use_backend("reference"):
        assert "forced backend: reference" in _dispatch.config_text()


CALL = """
import torch, sma_fast
sma_fast.show_config()
print(sma_fast.gather_tokens(torch.ones(1, 3), torch.tensor([[2]])).tolist())
"""


def test_variable_forces():
    result = python(CALL, SMA_FAST_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert "forced backend: reference" in result.stdout
    assert result.stdout.endswith("[[1.0]]\n")


def test_variable_forces_what_is_not_there():
    result = python(CALL, SMA_FAST_BACKEND="cuda")
    assert result.returncode == 1
    assert "forced backend: cuda" in result.stdout
    assert "RuntimeError: sma_fast.gather_tokens has no implementation for cpu" in result.stderr


def test_variable_names_an_unknown_backend():
    result = python("import sma_fast", SMA_FAST_BACKEND="gpu")
    assert result.returncode == 1
    assert "ValueError: SMA_FAST_BACKEND: unknown backend 'gpu', allowed are" in result.stderr


@pytest.mark.parametrize("isa", _native.cpu_instruction_sets()[:1])
def test_variable_forces_an_instruction_set(isa):
    result = python(CALL, SMA_FAST_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert f"CPU instruction set: {isa}\n" in result.stdout


@pytest.mark.parametrize("isa", _native.cpu_instruction_sets()[:1])
def test_unknown_instruction_set(isa):
    before = _native.set_cpu_isa(isa)
    with pytest.raises(ValueError, match="sse9.*allowed"):
        _native.set_cpu_isa("sse9")
    assert _native.set_cpu_isa(before) == isa


@pytest.mark.skipif(not _native.cpu_instruction_sets(), reason="needs the native module")
@pytest.mark.parametrize("limit", ["abc", "-1", "12GB"])
def test_cache_limit_is_a_number(limit):
    code = "import sma_fast, torch; sma_fast.random_masking(torch.ones(1, 4, 2), 0.5)"
    result = python(code, SMA_FAST_CACHE_MB=limit, SMA_FAST_BACKEND="cpu")
    assert result.returncode == 1
    assert f"SMA_FAST_CACHE_MB: got '{limit}'" in result.stderr


def test_use_backend_inside_compile_raises():
    def function(x):
        with sma_fast.use_backend("reference"):
            return sma_fast.random_masking(x, 0.5)[0]

    with pytest.raises(Exception, match="use_backend: got called inside torch.compile"):
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(1, 4, 2))


@pytest.mark.skipif(
    not hasattr(os, "fork") or not _native.cpu_instruction_sets(),
    reason="needs fork and the native backend: plain PyTorch does hang in a forked child",
)
def test_forked_child_computes():
    # OpenMP's threads do not survive a fork: a child that waited for them would hang
    code = """
import os, torch, sma_fast
tokens, ids = torch.randn(64, 196, 64), torch.arange(100).expand(64, 100).contiguous()
before = sma_fast.gather_tokens(tokens, ids)
child = os.fork()
if child == 0:
    last = sma_fast.gather_tokens(tokens, ids)[-1, -1]  # comparing all would be torch's threads
    os._exit(0 if torch.equal(last, tokens[-1, 99]) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    result = python(code, SMA_FAST_BACKEND="cpu")
    assert result.returncode == 0, result.stderr
