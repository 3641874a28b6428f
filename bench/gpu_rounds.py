"""Rounds on a GPU: replays of a CUDA graph between two events, over inputs that the L2 has not.

Traps avoided here:
- Python needs 10 to 50 us for a call, more than many kernels: a round is one replay of a graph of
  many calls. What synchronises cannot be captured and is called one by one ("events"), and so is
  what autograd runs, on streams of its own.
- A kernel that just ran left its inputs in the L2: calls take turns over copies of the inputs, so
  many that all of them together are several times the L2.
- The GPU idles until the host has sent a round: another replay goes ahead of it.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

GRAPH_BELOW = 1e-3  # seconds: longer calls hide Python by themselves, and need not two pools
L2_TIMES = 4  # the inputs of all copies together, at least
MAX_COPIES = 64
MAX_CALLS = 200  # in a graph
ROUND = 2e-3  # seconds of a round of calls one by one; a replay of them takes less

Call = functools.partial


def copies(call: Call, wanted_bytes: int) -> list[Call]:
    """Returns `call` and copies of it on other memory, of `wanted_bytes` of tensors together.

    A call whose tensors carry gradients stays alone.
    """
    leaves, _ = torch.utils._pytree.tree_flatten((call.args, call.keywords))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    held = sum(storages.values())
    if held == 0 or any(t.requires_grad for t in tensors):
        return [call]
    number = min(max(1, math.ceil(wanted_bytes / held)), MAX_COPIES)
    return [call, *(_copy(call) for _ in range(number - 1))]


def _copy(call: Call) -> Call:
    args, keywords = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (call.args, call.keywords)
    )
    return functools.partial(call.func, *args, **keywords)


def synchronises(call: Call) -> bool:
    """Returns whether the call makes the host wait for the GPU, and so fits no graph."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def captured(calls: list[Call]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Returns a graph of `calls` one after another, and what its first call returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in {id(call): call for call in calls}.values():
            call()  # each once beforehand: nothing may be compiled in a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream):
            first = calls[0]()
            for call in calls[1:]:
                call()
    finally:
        torch.cuda.set_stream(before)  # torch leaves the stream of a capture that fails
    return graph, first


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns what the GPU takes for `run`, between two events; another run goes ahead of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


class Rounds:
    """The rounds of one variant.

    `timing` says what they are: "graph" (a replay) or "events" (calls one by one).
    """

    def __init__(self, call: Call, check: Callable[[Any], None], graph: bool) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        inputs = copies(call, L2_TIMES * properties.L2_cache_size)
        self.copies = len(inputs)
        self._run = functools.partial(_one_by_one, inputs)
        estimate = seconds_of(self._run) / len(inputs)
        graph = graph and estimate < GRAPH_BELOW and not synchronises(call)
        self.timing = "graph" if graph else "events"
        self.calls = min(max(len(inputs), math.ceil(ROUND / estimate)), MAX_CALLS)
        chosen = list(itertools.islice(itertools.cycle(inputs), self.calls))
        if graph:
            replayed, first = captured(chosen)
            replayed.replay()
            torch.cuda.synchronize()
            check(first)
            self._run = replayed.replay
        else:
            self._run = functools.partial(_one_by_one, chosen)
        self.estimate = seconds_of(self._run) / self.calls  # seconds of one call

    def seconds(self) -> float:
        """Returns the seconds of one call, from one more round."""
        return seconds_of(self._run) / self.calls


def _one_by_one(calls: list[Call]) -> None:
    for call in calls:
        call()
