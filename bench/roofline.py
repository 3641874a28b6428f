"""The floor of a call: the time its bytes and operations need at the machine's measured rates.

A call is a list of stages. A stage needs at least the larger of its bytes over the copy rate and
its operations over the matrix rate; the floor of the call is the sum over its stages. Bytes are
those that no implementation can avoid: each input read once, each output written once.
"""

import functools
import time
from typing import NamedTuple

import torch
from torch import Tensor

from bench import gpu_rounds

IN_A_ROW = 10  # calls between two events


class Rates(NamedTuple):
    copy_rate: float  # bytes a second, read and written
    matrix_rate: float  # operations a second; a multiply-add is two


class Stage(NamedTuple):
    name: str
    bytes: int
    operations: int = 0

    def seconds(self, rates: Rates) -> float:
        return max(self.bytes / rates.copy_rate, self.operations / rates.matrix_rate)


def measure_rates(device: str, dtype: torch.dtype, quick: bool) -> Rates:
    """Returns the machine's rates, measured now.

    copy_rate: the bytes of ``y.copy_(x)``, read and written, x and y of 512 MiB each, far beyond
        any cache; the best of 10.
    matrix_rate: the operations of ``torch.mm`` of two square matrices of `dtype`, the best of the
        sizes 2048 and 4096 (on a GPU 4096 and 8192), 5 times each.
    On a GPU each time is the mean of several calls in a row, between two events, as ours are timed:
        by the clock, the way to the GPU and back would count as part of a short copy.
    quick: 1 MiB, and matrices of 64: only to see that it runs.
    """
    x = torch.ones(2**20 if quick else 2**29, dtype=torch.uint8, device=device)
    y = torch.zeros_like(x)
    copy = 2 * x.nbytes / _best(lambda: y.copy_(x), 10, device)
    matrix = 0.0
    sizes = (4096, 8192) if device == "cuda" else (2048, 4096)
    for size in (64,) if quick else sizes:
        a = torch.randn((size, size), device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _best(lambda a=a, out=out: torch.mm(a, a, out=out), 5, device)
        matrix = max(matrix, 2 * size**3 / seconds)
    return Rates(copy, matrix)


# Measured once per process: all floors of a run are made from the same rates.
rates = functools.cache(measure_rates)


def _best(function, times: int, device: str) -> float:
    # the first call warms up and is not counted
    if device == "cuda":
        function()
        row = functools.partial(_repeat, function, IN_A_ROW)
        return min(gpu_rounds.seconds_of(row) / IN_A_ROW for _ in range(times))
    seconds = []
    for _ in range(times + 1):
        start = clock(device)
        function()
        seconds.append(clock(device) - start)
    return min(seconds[1:])


def _repeat(function, times: int) -> None:
    for _ in range(times):
        function()


def clock(device: str) -> float:
    """Returns the time in seconds after all that was started on `device` is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# The stages of each op


def scores(
    query: Tensor, key: Tensor, query_index: Tensor, head_index: Tensor | None, pad: Tensor | None
) -> Stage:
    """Returns the stage that turns queries and keys into scores.

    bytes: sum over samples of n_valid * H_kv * D * itemsize. Every key row that is not padding is
        read once; the queries are few, and the scores stay where they are used.
    operations: sum over samples of 2 * R * D * n_valid * H, with R the queries of that sample; with
        `head_index` each query meets one head only, so H is 1.
    """
    batch, kv_heads, tokens, width = key.shape
    valid = _valid(pad, batch, tokens, key.device)  # (B,)
    selected = (query_index >= 0).sum(1)  # (B,)
    heads = query.shape[1] if head_index is None else 1
    return Stage(
        "scores",
        int(valid.sum()) * kv_heads * width * key.itemsize,
        2 * int((selected * valid).sum()) * width * heads,
    )


def aggregate(attention: Tensor, query_index: Tensor, head_index: Tensor | None) -> Stage:
    """Returns the stage that adds up rows of a map that exists.

    bytes: selected rows * N * itemsize, of all H heads or of one with `head_index`, and the
        (B, N) float32 scores written.
    operations: one addition for each element read.
    """
    batch, heads, _, tokens = attention.shape
    rows = int((query_index >= 0).sum()) * (heads if head_index is None else 1)
    read = rows * tokens
    return Stage("aggregate", read * attention.itemsize + batch * tokens * 4, read)


def select(scores: Tensor, num_visible: int, num_masked: int) -> Stage:
    """Returns the stage that turns scores into a selection.

    bytes: the (B, N) scores read; mask (1 byte a token), ids_restore (8 a token), ids_visible and
        ids_masked (8 an entry) written.
    """
    batch, tokens = scores.shape
    written = batch * (tokens * (1 + 8) + (num_visible + num_masked) * 8)
    return Stage("select", scores.nbytes + written)


def draw(num_candidates: int, query_index: Tensor) -> Stage:
    """Returns the stage that draws queries: (B, M) float32 noise and the (B, R) ids written."""
    return Stage("draw", query_index.shape[0] * num_candidates * 4 + query_index.nbytes)


def similarity(embeddings: Tensor) -> Stage:
    """Returns the stage of one product of each sample's embeddings with themselves.

    bytes: the (B, N, C) embeddings read; the products stay where they are used.
    operations: B * 2 * N * N * C, both halves of the symmetric product.
    """
    batch, tokens, width = embeddings.shape
    return Stage("similarity", embeddings.nbytes, 2 * batch * tokens * tokens * width)


def cluster_similarity(embeddings: Tensor) -> Stage:
    """Returns the stage that compares patches with the mean of some.

    bytes: the (B, N, C) embeddings read once, the (B, N) labels read and float32 scores written.
    """
    batch, tokens, _ = embeddings.shape
    return Stage("cluster similarity", embeddings.nbytes + 5 * batch * tokens)


def gather(tokens: Tensor, ids: Tensor) -> Stage:
    """Returns the stage that gathers rows: those with an id read, all of (B, V, C) written."""
    row = tokens[0, 0].nbytes
    return Stage("gather", (int((ids >= 0).sum()) + ids.numel()) * row)


def gather_backward(tokens: Tensor, ids: Tensor) -> Stage:
    """Returns the backward stage: gradient rows with an id read, all of (B, N, C) written."""
    row = tokens[0, 0].nbytes
    return Stage("gather backward", int((ids >= 0).sum()) * row + tokens.nbytes)


def restore(visible: Tensor, ids_restore: Tensor) -> Stage:
    """Returns the stage that restores the order, with one fill row for all.

    bytes: the visible rows that a token points to read, all of (B, N, C) written.
    """
    row = visible[0, 0].nbytes
    used = int(((ids_restore >= 0) & (ids_restore < visible.shape[1])).sum())
    return Stage("restore", (used + ids_restore.numel()) * row)


def restore_backward(visible: Tensor, ids_restore: Tensor) -> Stage:
    """Returns the backward stage, with one fill row for all.

    bytes: the gradient rows of all tokens that are not padding read (the masked ones add up to the
        fill's gradient), all of (B, V, C) written.
    """
    row = visible[0, 0].nbytes
    return Stage("restore backward", int((ids_restore >= 0).sum()) * row + visible.nbytes)


def _valid(pad: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    if pad is None:
        return torch.full((batch,), tokens, device=device)
    return (~pad).sum(1)
