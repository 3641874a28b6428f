"""Which implementation answers on which device.

A backend is a set of implementations of the registered ops. Each device has an order of preference;
the first backend that is there, has the op and takes the dtype answers. `use_backend` forces one:
then nothing else may answer.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator

import torch

from sma_fast import _native, reference
from sma_fast._errors import NO_CUDA_DEVICE, Unavailable
from sma_fast._schema import SCHEMAS, library
from sma_fast._version import __version__

BACKENDS = ("reference", "cpu", "triton", "cuda")
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# what a GPU's kernel cannot look at without waiting: SMA_FAST_CHECK=1 has it looked at here, first
_GPU_CHECKS = {
    "attention_scores": lambda q, k, index, heads, *_: _check_queries(index, heads, q),
    "aggregate_attention": lambda maps, index, heads, *_: _check_queries(index, heads, maps),
    "select_tokens": lambda *a: _check("num_masked", a[5], 0, None),
    "draw_queries": lambda noise, number, rows, padding: _check("num_queries", rows, 0, None),
    "gather_tokens": lambda tokens, ids: _check("ids", ids, -1, tokens.shape[1]),
    "gather_tokens_backward": lambda grad, ids, number: _check("ids", ids, -1, number),
    "restore_tokens": lambda visible, ids, fill: _check(
        "ids_restore", ids, -1, visible.shape[1] + (fill if fill.dim() == 3 else ids).shape[1]
    ),
    "restore_tokens_backward": lambda grad, ids, visible, fill: _check(
        "ids_restore", ids, -1, visible + (ids.shape[1] if fill is None else fill)
    ),
    "self_guided_masking": lambda q, k, tokens, index, heads, *_: _check_queries(index, heads, q),
    "random_masking": lambda *_: None,
    "bipartition": lambda embeddings, padding, *_: reference.check_finite(
        "embeddings", reference.without_padding(embeddings, padding)
    ),
    "informed_scores": lambda embeddings, labels, padding, cluster: reference.check_finite(
        "embeddings", reference.without_padding(embeddings, padding)
    ),
}
_forced: str | None = None


def implementation(backend: str, op: str, device_type: str) -> Callable:
    """Returns the function of `backend` for `op`, or raises Unavailable with the reason."""
    if backend == "reference":
        return getattr(reference, op)
    if backend == "triton":
        return _triton(op, device_type)
    if device_type != backend:
        raise Unavailable(f"backend {backend!r} does not run on device {device_type!r}")
    function = _native.implementation(backend, op)
    return _checked(op, function) if backend == "cuda" else function


def _checked(op: str, function: Callable) -> Callable:
    def checked(*args):
        if reference.looks_into(args[0]):
            _GPU_CHECKS[op](*args)
        return function(*args)

    checked.dtypes = getattr(function, "dtypes", None)
    checked.suits = getattr(function, "suits", None)
    return checked


def _check(name: str, index: torch.Tensor | None, low: int, high: int | None) -> None:
    if index is not None:
        reference.check_index(name, index, low, high)


def _check_queries(
    query_index: torch.Tensor | None, head_index: torch.Tensor | None, query: torch.Tensor
) -> None:
    # query: (B, H, M, ...)
    _check("query_index", query_index, -1, query.shape[2])
    if head_index is not None:
        if query_index is not None:  # the head of what selects nothing is not looked at
            head_index = torch.where(query_index < 0, 0, head_index)
        _check("head_index", head_index, 0, query.shape[1])


def _triton(op: str, device_type: str) -> Callable:
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed: pip install triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        raise Unavailable("triton runs on CUDA devices, on others under TRITON_INTERPRET=1")
    if importlib.util.find_spec("sma_fast.kernels") is None:
        raise Unavailable("sma_fast.kernels is not there: install the package with pip")
    if importlib.util.find_spec(f"sma_fast.kernels.{op}") is None:
        raise Unavailable(f"no Triton kernel for {op} yet")
    module = importlib.import_module(f"sma_fast.kernels.{op}")

    module.launch.dtypes = getattr(module, "DTYPES", None)
    return _checked(op, module.launch)


@functools.cache
def _choose(op: str, device_type: str, dtype: torch.dtype, forced: str | None) -> Callable:
    reasons = []
    for backend in (forced,) if forced else _ORDER.get(device_type, ("reference",)):
        try:
            function = implementation(backend, op, device_type)
        except Unavailable as reason:
            reasons.append(f"{backend}: {reason}")
            continue
        if not _takes(function, dtype):
            reasons.append(f"{backend}: {op} does not take {dtype}")
        elif forced or backend != "cuda" or function.suits is None:
            return function
        else:
            return _by_suit(function, functools.partial(_stand_in, op, device_type, dtype))
    raise RuntimeError(
        f"sma_fast.{op} has no implementation for {device_type} {dtype} here: "
        f"{'; '.join(reasons)}. sma_fast.backends() lists what there is; "
        "leave use_backend() or unset SMA_FAST_BACKEND to let sma_fast choose"
    )


def _takes(function: Callable, dtype: torch.dtype) -> bool:
    dtypes = getattr(function, "dtypes", None)
    return dtypes is None or dtype in dtypes


@functools.cache
def _stand_in(op: str, device_type: str, dtype: torch.dtype) -> Callable | None:
    # Triton is imported when it is needed first
    try:
        function = implementation("triton", op, device_type)
    except Unavailable:
        return None
    return function if _takes(function, dtype) else None


def _by_suit(first: Callable, stand_in: Callable[[], Callable | None]) -> Callable:
    # two that give the same, of which the first is slow for some inputs, or has no room for them
    def call(*args):
        function = None if first.suits(*args) else stand_in()
        return (function or first)(*args)

    return call


def _register(op: str) -> None:
    def call(first, *rest):
        return _choose(op, first.device.type, first.dtype, _forced)(first, *rest)

    library.impl(op, call, "CompositeExplicitAutograd")  # whatever the device


for _op in SCHEMAS:
    _register(_op)


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, allowed are {', '.join(BACKENDS)}")
    return name


if os.environ.get("SMA_FAST_BACKEND"):
    _forced = _check_backend(os.environ["SMA_FAST_BACKEND"], "SMA_FAST_BACKEND")


def forced() -> str | None:
    """Returns the backend that `use_backend` or SMA_FAST_BACKEND forces, None where none is."""
    return _forced


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend inside the `with` block, for the whole process.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: for another name.
        RuntimeError: inside torch.compile, where it would have no effect; and from an op inside
            the block that the backend does not have on its device.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "use_backend: got called inside torch.compile, allowed is around the compiled call"
        )
    global _forced
    before, _forced = _forced, _check_backend(name, "name")
    try:
        yield
    finally:
        _forced = before


def backends() -> dict[str, dict[str, dict[str, str]]]:
    """Returns, per op and device, which implementation answers and why the others do not.

    Returns:
        ``{op: {device: {backend: state}}}``; the state is "answers" for the one that is called
        (for float32; on CUDA triton stands in for what does not suit it: very wide heads, gradients
        of long or strided rows), "ready" for one that could be forced, and otherwise the reason.
    """
    table: dict[str, dict[str, dict[str, str]]] = {}
    for op in SCHEMAS:
        table[op] = {}
        for device in ("cpu", "cuda"):
            states = {}
            order = (_forced,) if _forced else _ORDER[device]
            for backend in sorted(BACKENDS, key=lambda b: order.index(b) if b in order else 9):
                try:
                    implementation(backend, op, device)
                except Unavailable as reason:
                    states[backend] = str(reason)
                    continue
                except RuntimeError as error:  # failed to load: calls raise it, nobody stands in
                    states[backend] = str(error)
                    order = ()
                    continue
                if device == "cuda" and not torch.cuda.is_available():
                    states[backend] = NO_CUDA_DEVICE
                elif backend in order and "answers" not in states.values():
                    states[backend] = "answers"
                else:
                    states[backend] = "ready"
            table[op][device] = states
    return table


def show_config() -> None:
    """Prints versions, instruction set in use, CUDA architectures built and threads."""
    print(config_text())


def config_text() -> str:
    """Returns what `show_config` prints, a line for each fact."""
    build = _native.build_info()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    lines = {
        "sma_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        **build,
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "forced backend": _forced or "none",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())
