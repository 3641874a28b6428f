"""What test_gpu.py asks of a GPU, and a stand-in for it on the CPU, where the tests run dry.

In the stand-in kernels are those of the emulator and of Triton's interpreter. It has no streams and
no graphs, but it sees what waits for a result, and what is allocated.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sma_fast import _dispatch

LONG = 100_000_000  # cycles of a GPU's clock: some 50 ms


class Gpu:
    """The current GPU."""

    device = "cuda"

    def devices(self) -> list[torch.device]:
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]

    def current(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def on(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Makes a device the current one."""
        return torch.cuda.device(device)

    def synchronize(self) -> None:
        for device in self.devices():
            torch.cuda.synchronize(device)

    def free_bytes(self) -> int:
        """Returns how much a test may allocate."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """What waits for the GPU inside raises a RuntimeError."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @contextlib.contextmanager
    def busy_stream(self) -> Iterator[None]:
        """Runs what is inside on a stream of its own, behind a long kernel, and waits for it."""
        self.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            yield
        stream.synchronize()

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Returns the outputs of `function` in a CUDA graph, and what replays it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # what is compiled and loaded once is not for the graph
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
        return outputs, graph.replay

    def extra_bytes(self, function: Callable[[], Any]) -> int:
        """Returns the most that a call held beside what was there and what it returns."""
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        outputs = function()  # held, so that what is allocated then is inputs and outputs
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()  # as asked for, before the allocator rounds it up
        del outputs
        return stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"]


class StandIn:
    """As Gpu, on the CPU."""

    device = "cpu"

    def devices(self) -> list[torch.device]:
        return [torch.device("cpu")] * 2

    def current(self) -> torch.device:
        return torch.device("cpu")

    def on(self, device: torch.device) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 30

    def no_waiting(self) -> contextlib.AbstractContextManager:
        return _NoWaiting()

    def busy_stream(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        function()
        outputs = function()

        def replay() -> None:
            for x, y in zip(tensors_in(outputs), tensors_in(function()), strict=True):
                x.copy_(y)

        return outputs, replay

    def extra_bytes(self, function: Callable[[], Any]) -> int:
        gc.collect()
        with _Meter() as meter:
            outputs = function()
            held = meter.held()
        del outputs
        return meter.peak - held


def tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


class _Watching(TorchDispatchMode):
    # looks into sma_fast's ops too
    def perform(self, func, args: tuple, kwargs: dict | None) -> Any:
        if func.namespace != "sma_fast":
            return func(*args, **(kwargs or {}))
        op, first = func.overloadpacket.__name__, args[0]
        function = _dispatch._choose(op, first.device.type, first.dtype, _dispatch._forced)
        with self:
            return function(*args)


class _NoWaiting(_Watching):
    # raises where a GPU would be waited for: results that become numbers or sizes
    WAITS = ("item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.made_on_host: list[StorageWeakRef] = []  # a GPU has no part in it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS and not self._on_host(args[0]):
            raise RuntimeError(f"called a synchronizing operation: {name}")
        result = self.perform(func, args, kwargs)
        if name == "lift_fresh":  # torch.tensor
            self.made_on_host.append(StorageWeakRef(result.untyped_storage()))
        return result

    def _on_host(self, x: Tensor) -> bool:
        own = StorageWeakRef(x.untyped_storage())
        return any(not ref.expired() and ref.cdata == own.cdata for ref in self.made_on_host)


class _Meter(_Watching):
    # counts the bytes of the storages that were made inside and live, and the most there were
    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tensors_in((args, kwargs))}
        result = self.perform(func, args, kwargs)
        for x in tensors_in(result):
            storage = x.untyped_storage()
            if storage._cdata not in before:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.held())
        return result

    def held(self) -> int:
        """Returns the bytes of what lives now."""
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        return sum(size for _, size in self.storages.values())
