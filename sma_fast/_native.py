"""The native module: outputs are allocated here, addresses and strides handed over.

One function per op, for the CPU and, where the module has CUDA kernels, for GPUs; `dtypes` of a
function says what it takes (None: anything).
"""

import collections
import functools
import importlib
import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sma_fast import reference
from sma_fast._errors import NO_CUDA_DEVICE, Unavailable

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_REDUCE = {"mean": 0, "sum": 1, "none": 2}
_METHODS = {"ncut": 0, "pca": 1}
_CLUSTERS = {"object": 0, "background": 1, "smaller": 2, "larger": 3}
_SCORES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = (*_SCORES, torch.float64)

_LARGE = 1 << 20  # bytes: from here on outputs come from the module, which keeps freed blocks
_SCRATCH = 1 << 20  # bytes on a GPU, whatever the sizes
_WIDE_HEAD = 1440  # bytes: few keys of wider ones fit into a GPU's shared memory
_FEW_IDS = 4096  # of a sample: each block of CUDA's backward passes looks at all of them
_DLPACK = {  # type code and bits, as DLPack counts them
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
    torch.bool: (6, 8),
}

# how often each native function ran: (backend, op) -> calls; tests look at it
calls: collections.Counter = collections.Counter()


@functools.cache
def _module():
    """Returns the compiled module, or raises why there is none."""
    if importlib.util.find_spec("sma_fast._C") is None:
        note = Path(__file__).with_name("_build.json")
        reason = f"{note.parent} was never installed: pip install -e . there, or leave its folder"
        if note.exists():
            reason = json.loads(note.read_text())["not_built"]
        raise Unavailable(f"native module not built: {reason}")
    try:
        return importlib.import_module("sma_fast._C")
    except ImportError as error:
        raise RuntimeError(
            f"the native module of sma_fast is there but failed to load: {error}. Correct the "
            "variable if it names one, else install sma_fast again where it runs, or set "
            "SMA_FAST_BACKEND=reference to do without it"
        ) from error


def implementation(backend: str, op: str) -> Callable:
    """Returns the function of `backend` ("cpu" or "cuda") for `op`, or raises Unavailable."""
    if backend == "cuda":
        cuda_ops = _module().cuda_ops
        if not cuda_ops:
            raise Unavailable(
                "built without CUDA: at installation there was no nvcc, or SMA_FAST_CUDA=0. "
                "Install again with nvcc on PATH, or CUDA_HOME set"
            )
        if not torch.cuda.is_available():
            raise Unavailable(NO_CUDA_DEVICE)
        if op not in cuda_ops:
            raise Unavailable(f"no CUDA kernel for {op} yet")
    else:
        _module()
    return _OPS[op]


def build_info() -> dict[str, object]:
    """Returns what the native module was built for, or why there is none."""
    try:
        return dict(_module().build_info())
    except (Unavailable, RuntimeError) as reason:
        return {"native module": str(reason).removeprefix("native module ")}


def cpu_instruction_sets() -> tuple[str, ...]:
    """Returns the instruction sets that are built in and that this processor has, best last."""
    try:
        return tuple(_module().cpu_instruction_sets())
    except Unavailable:
        return ()


def set_cpu_isa(name: str) -> str:
    """Uses one instruction set from now on, for the whole process; returns the one before."""
    return _module().set_cpu_isa(name)


# The ops


def attention_scores(
    query, key, query_index, head_index, key_padding_mask, scale, head_reduce
) -> Tensor:
    batch, _, tokens, _ = key.shape
    shape = (batch, query.shape[1], tokens) if head_reduce == "none" else (batch, tokens)
    scores = _empty(shape, torch.float32, key.device)
    query_index = _dense_rows(query_index)
    head_index, key_padding_mask = _contiguous(head_index, key_padding_mask)
    scratch = _scratch(key)
    _count("attention_scores", key)
    _module().attention_scores(
        *_attention(query, key, query_index, head_index, key_padding_mask),
        scale,
        _REDUCE[head_reduce],
        scores.data_ptr(),
        _span(scratch),
        _where(key),
    )
    return scores


def aggregate_attention(attention, query_index, head_index, head_reduce, logits) -> Tensor:
    batch, heads, queries, tokens = attention.shape
    shape = (batch, heads, tokens) if head_reduce == "none" else (batch, tokens)
    scores = _empty(shape, torch.float32, attention.device)
    query_index, (head_index,) = _dense_rows(query_index), _contiguous(head_index)
    _count("aggregate_attention", attention)
    _module().aggregate_attention(
        attention.data_ptr(),
        _DTYPES[attention.dtype],
        batch,
        heads,
        queries,
        tokens,
        queries if query_index is None else query_index.shape[1],
        attention.stride(),
        _address(query_index),
        0 if query_index is None else query_index.stride(0),
        _address(head_index),
        _REDUCE[head_reduce],
        logits,
        scores.data_ptr(),
        _where(attention),
    )
    return scores


def select_tokens(
    scores,
    key_padding_mask,
    noise,
    mask_ratio,
    num_masked,
    num_masked_rows,
    max_masked,
    random_fraction,
    pool_ratio,
) -> tuple[Tensor, ...]:
    batch, tokens = scores.shape
    visible, masked = reference.selection_widths(
        tokens, mask_ratio, num_masked, num_masked_rows is not None, max_masked
    )
    if num_masked_rows is not None:
        num_masked_rows = num_masked_rows.long().contiguous()
    if _backend(scores) == "cpu":  # a GPU's kernel reads every dtype
        scores = scores.float()
    scores = scores.contiguous()
    key_padding_mask, noise = _contiguous(key_padding_mask, noise)
    selection = _selection(batch, tokens, visible, masked, scores.device)
    _count("select_tokens", scores)
    _module().select_tokens(
        scores.data_ptr(),
        _DTYPES[scores.dtype],
        _address(key_padding_mask),
        _address(noise),
        batch,
        tokens,
        visible,
        masked,
        -1.0 if mask_ratio is None else mask_ratio,
        _address(num_masked_rows),
        0 if num_masked is None else num_masked,
        random_fraction,
        -1.0 if pool_ratio is None else pool_ratio,
        *[x.data_ptr() for x in selection],
        _where(scores),
    )
    return selection


def draw_queries(noise, num_queries, num_queries_rows, padding_mask) -> Tensor:
    batch, candidates = noise.shape
    if num_queries_rows is not None:
        num_queries_rows = num_queries_rows.long().contiguous()
    noise, padding_mask = _contiguous(noise, padding_mask)
    query_index = _empty((batch, num_queries), torch.int64, noise.device)
    _count("draw_queries", noise)
    _module().draw_queries(
        noise.data_ptr(),
        _address(padding_mask),
        _address(num_queries_rows),
        batch,
        candidates,
        num_queries,
        query_index.data_ptr(),
        _where(noise),
    )
    return query_index


def gather_tokens(tokens, ids) -> Tensor:
    batch, visible = ids.shape
    tokens, stride = _even_rows(tokens)
    ids = ids.contiguous()
    out = _empty((batch, visible) + tokens.shape[2:], tokens.dtype, tokens.device)
    _count("gather_tokens", tokens)
    _module().gather_tokens(
        _gather(tokens, stride, out),
        batch,
        tokens.shape[1],
        visible,
        ids.data_ptr(),
        _where(tokens),
    )
    return out


def gather_tokens_backward(grad, ids, num_tokens) -> Tensor:
    batch, visible = ids.shape
    grad, ids = grad.contiguous(), ids.contiguous()
    out = _empty((batch, num_tokens) + grad.shape[2:], grad.dtype, grad.device)
    _count("gather_tokens_backward", grad)
    _module().gather_tokens_backward(
        grad.data_ptr(),
        _DTYPES[grad.dtype],
        batch,
        visible,
        num_tokens,
        grad.shape[2:].numel(),
        ids.data_ptr(),
        out.data_ptr(),
        _where(grad),
    )
    return out


def restore_tokens(visible, ids_restore, fill) -> Tensor:
    batch, count, width = visible.shape
    tokens = ids_restore.shape[1]
    visible, ids_restore = _contiguous_rows(visible), ids_restore.contiguous()
    shared = fill.dim() == 1
    fill = fill.contiguous() if shared else _contiguous_rows(fill)
    size = visible.element_size()
    out = _empty((batch, tokens, width), visible.dtype, visible.device)
    _count("restore_tokens", visible)
    _module().restore_tokens(
        visible.data_ptr(),
        visible.stride(0) * size,
        visible.stride(1) * size,
        fill.data_ptr(),
        0 if shared else fill.stride(0) * size,
        0 if shared else fill.stride(1) * size,
        width * size,
        batch,
        count,
        tokens if shared else fill.shape[1],
        tokens,
        ids_restore.data_ptr(),
        out.data_ptr(),
        _where(visible),
    )
    return out


def restore_tokens_backward(grad, ids_restore, num_visible, num_fill) -> tuple[Tensor, Tensor]:
    batch, tokens, width = grad.shape
    grad, ids_restore = grad.contiguous(), ids_restore.contiguous()
    shared = num_fill is None
    grad_visible = _empty((batch, num_visible, width), grad.dtype, grad.device)
    grad_fill = _empty((width,) if shared else (batch, num_fill, width), grad.dtype, grad.device)
    scratch = _scratch(grad, needed=shared)
    _count("restore_tokens_backward", grad)
    _module().restore_tokens_backward(
        grad.data_ptr(),
        _DTYPES[grad.dtype],
        batch,
        tokens,
        num_visible,
        tokens if shared else num_fill,
        width,
        shared,
        ids_restore.data_ptr(),
        grad_visible.data_ptr(),
        grad_fill.data_ptr(),
        _span(scratch),
        _where(grad),
    )
    return grad_visible, grad_fill


def self_guided_masking(
    query,
    key,
    tokens,
    query_index,
    head_index,
    key_padding_mask,
    noise,
    mask_ratio,
    scale,
    head_reduce,
    mask_queries,
    random_fraction,
    pool_ratio,
) -> tuple:
    batch, _, count, _ = key.shape
    width_visible, width_masked = reference.selection_widths(count, mask_ratio, None, False, None)
    query_index = _dense_rows(query_index)
    head_index, key_padding_mask, noise = _contiguous(head_index, key_padding_mask, noise)
    scores = _empty((batch, count), torch.float32, key.device)
    selection = _selection(batch, count, width_visible, width_masked, key.device)
    most = _module().most_gathers
    visible = [_empty((batch, width_visible) + x.shape[2:], x.dtype, key.device) for x in tokens]
    rows = [_even_rows(x) for x in tokens]
    scratch = _scratch(key)
    _count("self_guided_masking", key)
    _module().self_guided_masking(
        *_attention(query, key, query_index, head_index, key_padding_mask),
        scale,
        _REDUCE[head_reduce],
        scores.data_ptr(),
        _span(scratch),
        _address(noise),
        width_visible,
        width_masked,
        mask_ratio,
        mask_queries,
        random_fraction,
        -1.0 if pool_ratio is None else pool_ratio,
        *[x.data_ptr() for x in selection],
        [_gather(*row, out) for row, out in zip(rows[:most], visible, strict=False)],
        _where(key),
    )
    for i in range(most, len(tokens)):
        visible[i] = gather_tokens(tokens[i], selection[1])
    return (scores, *selection, visible)


def random_masking(tokens, noise, mask_ratio) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = tokens.shape[:2]
    keep = int(count * (1 - mask_ratio))
    tokens, stride = _even_rows(tokens)
    noise = noise.contiguous()
    visible = _empty((batch, keep) + tokens.shape[2:], tokens.dtype, tokens.device)
    on_cpu = _backend(tokens) == "cpu"
    ids_visible = _empty((batch, keep), torch.int64, tokens.device) if on_cpu else None
    mask = _empty((batch, count), torch.float32, tokens.device)
    ids_restore = _empty((batch, count), torch.int64, tokens.device)
    _count("random_masking", tokens)
    _module().random_masking(
        _gather(tokens, stride, visible),
        noise.data_ptr(),
        batch,
        count,
        keep,
        _address(ids_visible),
        mask.data_ptr(),
        ids_restore.data_ptr(),
        _where(tokens),
    )
    return visible, mask, ids_restore


def bipartition(embeddings, key_padding_mask, method, iterations, tol) -> tuple[Tensor, ...]:
    batch, tokens, width = embeddings.shape
    (key_padding_mask,) = _contiguous(key_padding_mask)
    device = embeddings.device
    if embeddings.stride(2) != 1 and _backend(embeddings) == "cpu":
        embeddings = embeddings.contiguous()
    cut = (
        _empty((batch, tokens), torch.float32, device),
        _empty((batch, tokens), torch.bool, device),
        _empty((batch, tokens), torch.int64, device),
        torch.empty(batch, dtype=torch.float32, device=device),
        torch.empty(batch, dtype=torch.bool, device=device),
    )
    _count("bipartition", embeddings)
    _module().bipartition(
        embeddings.data_ptr(),
        _DTYPES[embeddings.dtype],
        batch,
        tokens,
        width,
        embeddings.stride(),
        _address(key_padding_mask),
        _METHODS[method],
        iterations,
        tol,
        *[x.data_ptr() for x in cut],
        _where(embeddings),
    )
    return cut


def informed_scores(embeddings, labels, key_padding_mask, cluster) -> Tensor:
    batch, tokens, width = embeddings.shape
    labels, key_padding_mask = _contiguous(labels, key_padding_mask)
    embeddings = _contiguous_rows(embeddings)
    scores = _empty((batch, tokens), torch.float32, embeddings.device)
    _count("informed_scores", embeddings)
    _module().informed_scores(
        embeddings.data_ptr(),
        _DTYPES[embeddings.dtype],
        batch,
        tokens,
        width,
        embeddings.stride()[:2],
        labels.data_ptr(),
        _address(key_padding_mask),
        _CLUSTERS[cluster],
        scores.data_ptr(),
        _where(embeddings),
    )
    return scores


def _packed_and_short(grad, ids, *_) -> bool:
    # what CUDA's backward passes are fast for: others are copied whole, or looked at too often
    return grad.is_contiguous() and ids.shape[1] <= _FEW_IDS


def _not_wide(query, *_) -> bool:
    return query.shape[3] * query.element_size() <= _WIDE_HEAD


attention_scores.dtypes = _SCORES
bipartition.dtypes = _SCORES
informed_scores.dtypes = _SCORES
aggregate_attention.dtypes = _SCORES
select_tokens.dtypes = _SCORES
self_guided_masking.dtypes = _SCORES
attention_scores.suits = self_guided_masking.suits = _not_wide
gather_tokens_backward.suits = restore_tokens_backward.suits = _packed_and_short
gather_tokens_backward.dtypes = _ROWS
restore_tokens.dtypes = _ROWS
restore_tokens_backward.dtypes = _ROWS

_OPS = {
    function.__name__: function
    for function in (
        attention_scores,
        aggregate_attention,
        select_tokens,
        draw_queries,
        gather_tokens,
        gather_tokens_backward,
        restore_tokens,
        restore_tokens_backward,
        self_guided_masking,
        random_masking,
        bipartition,
        informed_scores,
    )
}


# What the functions above share


def _attention(query, key, query_index, head_index, key_padding_mask) -> tuple:
    batch, kv_heads, tokens, width = key.shape
    _, heads, queries, _ = query.shape
    return (
        query.data_ptr(),
        key.data_ptr(),
        _DTYPES[key.dtype],
        batch,
        heads,
        kv_heads,
        queries,
        tokens,
        queries if query_index is None else query_index.shape[1],
        width,
        _strides(query),
        _strides(key),
        _address(query_index),
        0 if query_index is None else query_index.stride(0),
        _address(head_index),
        _address(key_padding_mask),
    )


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    # one that is never taken must not keep rows from being read 16 bytes at a time
    (batch, heads, rows, width), strides = x.shape, x.stride()
    return (
        0 if batch == 1 else strides[0],
        0 if heads == 1 else strides[1],
        0 if rows == 1 else strides[2],
        1 if width == 1 else strides[3],
    )


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # large outputs on the CPU come from the module's cache of freed blocks (csrc/cpu/cache.h); in
    # deterministic mode torch.empty fills what it returns, so that reading it shows
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    if not _LARGE <= size < 1 << 47 or dtype not in _DLPACK:  # torch refuses absurd sizes
        return torch.empty(*shape, dtype=dtype)
    if torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape, dtype=dtype)
    return from_dlpack(_module().empty_output(shape, *_DLPACK[dtype]))


def _selection(
    batch: int, tokens: int, visible: int, masked: int, device: torch.device
) -> tuple[Tensor, ...]:
    empty = _empty if batch * tokens * 8 >= _LARGE else _small
    return (
        empty((batch, tokens), torch.bool, device),
        empty((batch, visible), torch.int64, device),
        empty((batch, masked), torch.int64, device),
        empty((batch, tokens), torch.int64, device),
        torch.empty(batch, dtype=torch.int32, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
    )


def _small(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


def _gather(tokens: Tensor, stride: int, out: Tensor) -> tuple[int, ...]:
    # stride: elements from one to the next in a row
    size = tokens.element_size()
    row = size * math.prod(tokens.shape[2:])
    batch_stride, token_stride = tokens.stride()[:2]
    return (
        tokens.data_ptr(),
        batch_stride * size,
        token_stride * size,
        row,
        size,
        stride * size,
        out.data_ptr(),
    )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


def _dense_rows(index: Tensor | None) -> Tensor | None:
    # any stride of samples: 0 where all have the same row
    if index is None or index.is_contiguous() or index[:1].is_contiguous():
        return index
    return index.contiguous()


def _row_stride(x: Tensor) -> int | None:
    # elements from one to the next in a row of any number of dimensions; None: no one number
    if x.is_contiguous():
        return 1
    stride = expected = None
    for size, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = expected = step
        if step != expected:
            return None
        expected *= size
    return 1 if stride is None else stride


def _contiguous_rows(x: Tensor) -> Tensor:
    # any strides between rows; a row itself in one piece
    return x if _row_stride(x) == 1 else x.contiguous()


def _even_rows(x: Tensor) -> tuple[Tensor, int]:
    # any strides between rows, and one stride within a row, which is returned too; 1 on a GPU
    stride = _row_stride(x)
    if stride == 1 or (stride and x.element_size() <= 8 and _backend(x) == "cpu"):
        return x, stride
    return x.contiguous(), 1


def _backend(x: Tensor) -> str:
    return "cuda" if x.is_cuda else "cpu"


def _where(x: Tensor) -> tuple[int, int]:
    # a CUDA device and its current stream; or -1 and the number of threads
    if _backend(x) == "cuda":
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    return -1, 1 if _in_fork else torch.get_num_threads()


def _scratch(x: Tensor, needed: bool = True) -> Tensor | None:
    # for sums on a GPU: of attention's rows where no cluster holds the keys, of filled rows
    if not needed or _backend(x) == "cpu":
        return None
    return torch.empty(_SCRATCH, dtype=torch.uint8, device=x.device)


def _span(x: Tensor | None) -> tuple[int, int]:
    # of bytes: where they begin, and how many
    return (0, 0) if x is None else (x.data_ptr(), x.numel())


def _count(op: str, x: Tensor) -> None:
    calls[_backend(x), op] += 1


def _stay_single() -> None:
    # OpenMP's threads do not survive a fork, and waiting for them would hang
    global _in_fork
    _in_fork = True


_in_fork = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stay_single)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
