"""The public functions: check arguments, fill in defaults, call ``torch.ops.sma_fast.<op>``.

Letters in the shapes: B batch, N tokens, V visible, K masked, H heads, M queries,
R selected queries, D head width, C token width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sma_fast import _dispatch  # noqa: F401  (registers the implementations)

_ops = torch.ops.sma_fast
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_REDUCE = ("mean", "sum", "none")


class TokenSelection(NamedTuple):
    """Which tokens are hidden, and where every token is found again.

    Attributes:
        mask: (B, N) bool, True = masked.
        ids_visible: (B, V) int64, ascending, -1 behind the row's own number.
        ids_masked: (B, K) int64, ascending, -1 behind the row's own number.
        ids_restore: (B, N) int64, where token j stands in ``cat([visible, masked], 1)``; -1 for
            padding.
        num_visible: (B,) int32.
        num_masked: (B,) int32.
    """

    mask: Tensor
    ids_visible: Tensor
    ids_masked: Tensor
    ids_restore: Tensor
    num_visible: Tensor
    num_masked: Tensor


class SelfGuidedMasking(NamedTuple):
    """What `self_guided_masking` returns.

    Attributes:
        selection: the `TokenSelection`.
        scores: (B, N) float32, the attention each token received (before ``mask_queries``).
        visible: one (B, V, ...) tensor for each of the tokens given.
        query_index: (B, R) int64, the queries drawn, -1 behind a row's own number.
        head_index: (B, R) int64 the head taken for each query, or None.
    """

    selection: TokenSelection
    scores: Tensor
    visible: tuple[Tensor, ...]
    query_index: Tensor
    head_index: Tensor | None


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    query_index: Tensor | None = None,
    head_index: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    head_reduce: str = "mean",
) -> Tensor:
    """Returns the attention each key receives from the selected queries, never storing the map.

    Equivalent PyTorch, without padding::

        attention = (scale * query @ key.transpose(2, 3)).softmax(3)  # (B, H, M, N)
        attention[:, :, query_index].sum(2).mean(1)                   # (B, N)

    Args:
        query: (B or 1, H, M, D), float32, bfloat16, float16 or float64. 1: the same latents for
            every sample.
        key: (B, H_kv, N, D), same dtype; H_kv divides H.
        query_index: (B, R) or (R,) integers in [-1, M); -1 selects nothing. Default: all M.
        head_index: (B, R) integers in [0, H): take that one head for that query instead of
            reducing over heads ("random mix").
        key_padding_mask: (B, N) bool, True = padding.
        scale: factor of the logits. Default: 1 / sqrt(D).
        head_reduce: "mean", "sum", or "none".

    Returns:
        (B, N) float32, or (B, H, N) for "none". Padding scores exactly 0, and a row of padding
        only gives zeros. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """
    _check_query_key(query, key)
    batch, tokens = key.shape[0], key.shape[2]
    query, key = _same_dtype(query, key)
    query_index = _query_index(query_index, batch, query.shape[2], key)
    head_index = _head_index(head_index, head_reduce, batch, query.shape[2], query_index, key)
    _check_mask("key_padding_mask", key_padding_mask, (batch, tokens), key)
    _check_choice("head_reduce", head_reduce, _REDUCE)
    scale = _scale(scale, query)
    return _ops.attention_scores(
        query, key, query_index, head_index, key_padding_mask, scale, head_reduce
    )


def aggregate_attention(
    attention: Tensor,
    *,
    query_index: Tensor | None = None,
    head_index: Tensor | None = None,
    head_reduce: str = "mean",
    logits: bool = False,
) -> Tensor:
    """Returns the attention each key receives, from a map that already exists.

    Equivalent PyTorch: ``attention[:, :, query_index].sum(2).mean(1)``.

    Args:
        attention: (B, H, M, N), float32, bfloat16, float16 or float64.
        query_index: (B, R) or (R,) integers in [-1, M); -1 selects nothing. Default: all M.
        head_index: (B, R) integers in [0, H): take that one head for that query.
        head_reduce: "mean", "sum", or "none".
        logits: True: `attention` holds logits (with any padding bias in them), and the selected
            rows go through a softmax over N on the fly.

    Returns:
        (B, N) float32, or (B, H, N) for "none". No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """
    _check_tensor("attention", attention, 4, "(B, H, M, N)", _FLOATS)
    batch, _, queries, _ = attention.shape
    query_index = _query_index(query_index, batch, queries, attention)
    head_index = _head_index(head_index, head_reduce, batch, queries, query_index, attention)
    _check_choice("head_reduce", head_reduce, _REDUCE)
    _check_bool("logits", logits)
    return _ops.aggregate_attention(attention, query_index, head_index, head_reduce, logits)


def select_tokens(
    scores: Tensor,
    *,
    mask_ratio: float | None = None,
    num_masked: int | Tensor | None = None,
    max_masked: int | None = None,
    key_padding_mask: Tensor | None = None,
    random_fraction: float = 0.0,
    pool_ratio: float | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TokenSelection:
    """Returns which tokens are masked: those with the highest scores of each row.

    Ties go to the lowest index, NaN counts as -inf. A row masks ``round(mask_ratio * n_valid)``
    tokens (float64, half to even) or ``min(num_masked, n_valid)``. Equivalent PyTorch, without
    padding and ties: ``scores.topk(num_masked).indices``, then ``sort``, ``scatter`` and
    ``nonzero``.

    Args:
        scores: (B, N), float32, bfloat16, float16 or float64.
        mask_ratio: share of the valid tokens to mask, in [0, 1]. Give this or `num_masked`.
        num_masked: tokens to mask, an int in [0, N] for all rows or (B,) integers for each.
        max_masked: with (B,) integers: no row masks more, and the width K of ids_masked
            (default N).
        key_padding_mask: (B, N) bool, True = padding: neither visible nor masked.
        random_fraction: c in [0, 1]: round((1 - c) k) of a row's k masked tokens are the top
            scores, the rest are drawn uniformly from its other valid tokens.
        pool_ratio: p in [mask_ratio, 1]: the k tokens are drawn uniformly from the top
            round(p n_valid). At most one of this and `random_fraction`.
        noise: (B, N) float32, uniform in [0, 1): decides the draws instead of `generator`; the
            lowest noise is drawn.
        generator: for the draws. Default: torch's global one.

    Returns:
        TokenSelection with K = round(mask_ratio N) or num_masked and V = N - K; with (B,)
        integers V = N and K = max_masked or N.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """
    _check_tensor("scores", scores, 2, "(B, N)", _FLOATS)
    batch, tokens = scores.shape
    num_masked, num_masked_rows = _counts(mask_ratio, num_masked, max_masked, scores)
    _check_mask("key_padding_mask", key_padding_mask, (batch, tokens), scores)
    noise = _noise(noise, generator, random_fraction, pool_ratio, mask_ratio, scores, batch, tokens)
    return TokenSelection(
        *_ops.select_tokens.default(
            scores,
            key_padding_mask,
            noise,
            mask_ratio,
            num_masked,
            num_masked_rows,
            max_masked,
            random_fraction,
            pool_ratio,
        )
    )


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Returns the tokens at `ids`, zeros where the id is -1. Differentiable, twice.

    Equivalent PyTorch, without -1: ``tokens.gather(1, ids[:, :, None].expand(-1, -1, C))``.

    Args:
        tokens: (B, N, ...), any dtype.
        ids: (B, V) int64 in [-1, N).

    Returns:
        (B, V, ...), dtype of `tokens`.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3.
    """
    _check_tensor("tokens", tokens, -2, "(B, N, ...)")
    _check_ids("ids", ids, "(B, V)", tokens)
    return _ops.gather_tokens(tokens, ids)


def restore_tokens(visible: Tensor, ids_restore: Tensor, fill: Tensor) -> Tensor:
    """Returns all tokens in their original order, `fill` where they were masked.

    Position j takes row ``ids_restore[j]`` of ``cat([visible, fill], 1)``; -1 (padding) gives
    zeros. Differentiable, twice. Mixed dtypes are promoted as ``torch.cat`` does.

    Equivalent PyTorch, without padding: ``cat([visible, fill.expand(B, K, C)], 1)`` gathered by
    ids_restore.

    Args:
        visible: (B, V, C), float32, bfloat16, float16 or float64.
        ids_restore: (B, N) int64, as in `TokenSelection`.
        fill: (C,), one mask token for all, or (B, K, C), one row for each masked token.

    Returns:
        (B, N, C).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3.
    """
    _check_tensor("visible", visible, 3, "(B, V, C)", _FLOATS)
    _check_ids("ids_restore", ids_restore, "(B, N)", visible)
    if not isinstance(fill, Tensor):
        raise TypeError(f"fill: got {type(fill).__name__}, allowed is a tensor (C,) or (B, K, C)")
    batch, _, width = visible.shape
    per_token = fill.dim() == 3 and fill.shape[0] == batch and fill.shape[2] == width
    if not (per_token or (fill.dim() == 1 and fill.shape[0] == width)):
        raise ValueError(
            f"fill: got shape {tuple(fill.shape)}, allowed is ({width},) or ({batch}, K, {width})"
        )
    _check_device("fill", fill, visible)
    _check_dtype("fill", fill, _FLOATS)
    if fill.dtype != visible.dtype:
        dtype = torch.promote_types(fill.dtype, visible.dtype)
        visible, fill = visible.to(dtype), fill.to(dtype)
    return _ops.restore_tokens(visible, ids_restore, fill)


def draw_queries(
    num_queries: int | Tensor,
    *,
    batch: int | None = None,
    num_candidates: int | None = None,
    padding_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Returns queries drawn for each sample, uniformly and without replacement.

    Equivalent PyTorch for one sample: ``torch.randperm(num_candidates)[:num_queries].sort()``.

    Args:
        num_queries: how many, an int, or (B,) integers for each sample; a sample with any
            candidate draws at least 1 and at most all of them.
        batch: B. Not needed with `padding_mask` or (B,) `num_queries`.
        num_candidates: M. Not needed with `padding_mask`.
        padding_mask: (B, M) bool, True = padding, never drawn.
        generator: for the draws. Default: torch's global one.
        device: of the result. Default: that of `padding_mask` or `num_queries`, else the CPU.

    Returns:
        (B, R) int64, ascending, -1 behind a row's own number; R = max(num_queries, 1), or M where
        the numbers come in a tensor.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """
    rows = num_queries if isinstance(num_queries, Tensor) else None
    if padding_mask is not None:
        _check_tensor("padding_mask", padding_mask, 2, "(B, M)", (torch.bool,))
        batch = _agree("batch", batch, padding_mask.shape[0])
        num_candidates = _agree("num_candidates", num_candidates, padding_mask.shape[1])
        device = device or padding_mask.device
        if torch.device(device).type != padding_mask.device.type:
            raise ValueError(
                f"padding_mask: is on {padding_mask.device}, allowed is device={device}"
            )
    if rows is not None:
        _check_tensor("num_queries", rows, 1, "(B,)", _INTS)
        if batch is None:
            batch = rows.shape[0]
        if rows.shape[0] != batch:
            raise ValueError(f"num_queries: got shape {tuple(rows.shape)}, allowed is ({batch},)")
        device = device or rows.device
    if batch is None or num_candidates is None:
        missing = "batch" if batch is None else "num_candidates"
        raise ValueError(f"{missing}: got None, allowed is an int where no padding_mask gives it")
    _check_count("batch", batch, None)
    _check_count("num_candidates", num_candidates, None)
    if rows is None:
        _check_count("num_queries", num_queries, num_candidates)
        width = max(num_queries, min(1, num_candidates))
    else:
        width = num_candidates
    noise = _rand(batch, num_candidates, generator, device)
    if rows is not None:
        _check_device("num_queries", rows, noise)
    return _ops.draw_queries(noise, width, rows, padding_mask)


def self_guided_masking(
    query: Tensor,
    key: Tensor,
    *tokens: Tensor,
    mask_ratio: float,
    num_queries: int | Tensor | None = None,
    query_index: Tensor | None = None,
    head_index: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    mask_queries: bool = False,
    head_reduce: str = "mean",
    key_padding_mask: Tensor | None = None,
    random_fraction: float = 0.0,
    pool_ratio: float | None = None,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> SelfGuidedMasking:
    """Returns scores, selection and the gathered visible tokens in one pass.

    Equivalent PyTorch::

        index = draw_queries(num_queries, batch=B, num_candidates=M)
        scores = attention_scores(query, key, query_index=index)
        selection = select_tokens(scores, mask_ratio=mask_ratio)
        visible = [gather_tokens(x, selection.ids_visible) for x in tokens]

    Args:
        query: (B or 1, H, M, D), float32, bfloat16, float16 or float64. 1: the same latents for
            every sample.
        key: (B, H_kv, N, D), same dtype; H_kv divides H.
        tokens: any number of (B, N, ...) tensors to gather the visible rows of; differentiable.
        mask_ratio: share of the valid tokens to mask, in [0, 1].
        num_queries: queries to draw per sample, an int in [0, M] or (B,) integers; at least 1 is
            drawn where there is one. Give this or `query_index`.
        query_index: (B, R) or (R,) integers in [-1, M), the queries to use.
        head_index: (B, R) integers in [0, H), one head for each query.
        query_padding_mask: (B, M) bool, True = padding, never drawn. Default for M = N
            self-attention with ``mask_queries``: `key_padding_mask`.
        mask_queries: self-attention (M = N): mask the drawn tokens before all others, as if their
            scores were +inf; a random share may still take others instead.
        head_reduce: "mean", "sum", or "random", which draws `head_index`.
        key_padding_mask: (B, N) bool, True = padding: neither visible nor masked.
        random_fraction: as in `select_tokens`.
        pool_ratio: as in `select_tokens`.
        scale: factor of the logits. Default: 1 / sqrt(D).
        generator: for all draws. Default: torch's global one.

    Returns:
        SelfGuidedMasking.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """
    _check_query_key(query, key)
    batch, count = key.shape[0], key.shape[2]
    heads, queries = query.shape[1], query.shape[2]
    query, key = _same_dtype(query, key)
    for i, x in enumerate(tokens):
        _check_tensor(f"tokens[{i}]", x, -2, "(B, N, ...)")
        if x.shape[0] != batch or x.shape[1] != count:
            raise ValueError(
                f"tokens[{i}]: got shape {tuple(x.shape)}, allowed is ({batch}, {count}, ...)"
            )
        _check_device(f"tokens[{i}]", x, key)
    _check_ratio("mask_ratio", mask_ratio)
    _check_mask("key_padding_mask", key_padding_mask, (batch, count), key)
    _check_mask("query_padding_mask", query_padding_mask, (batch, queries), key)
    _check_bool("mask_queries", mask_queries)
    _check_choice("head_reduce", head_reduce, ("mean", "sum", "random"))
    if mask_queries and queries != count:
        raise ValueError(
            f"mask_queries: got True with {queries} queries and {count} keys, allowed only in "
            "self-attention, where the numbers are equal"
        )
    if (num_queries is None) == (query_index is None):
        raise ValueError(
            "num_queries, query_index: got "
            + ("neither" if num_queries is None else "both")
            + ", allowed is exactly one"
        )
    if query_index is not None:
        query_index = _query_index(query_index, batch, queries, key)
        selected = query_index.shape[1]
    elif isinstance(num_queries, Tensor):
        _check_tensor("num_queries", num_queries, 1, "(B,)", _INTS)
        _check_rows("num_queries", num_queries, batch, key)
        selected, rows = queries, num_queries
    else:
        _check_count("num_queries", num_queries, queries)
        selected, rows = max(num_queries, min(1, queries)), None
    if head_reduce == "random" and head_index is not None:
        raise ValueError("head_index: got a tensor, allowed is None with head_reduce='random'")
    head_index = _head_index(head_index, head_reduce, batch, selected, None, key)
    _check_shares(random_fraction, pool_ratio, mask_ratio)
    scale = _scale(scale, query)

    if query_index is None:
        if query_padding_mask is None and mask_queries:
            query_padding_mask = key_padding_mask
        drawn = _rand(batch, queries, generator, key.device)
        query_index = _ops.draw_queries.default(drawn, selected, rows, query_padding_mask)
    if head_reduce == "random":
        head_index = _randint(heads, query_index.shape, generator, key.device)
        head_reduce = "mean"
    noise = _noise(None, generator, random_fraction, pool_ratio, mask_ratio, key, batch, count)
    arguments = (
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
    )
    record = torch.is_grad_enabled() and any(x.requires_grad for x in tokens)
    if record or torch.compiler.is_compiling():
        result = _ops.self_guided_masking(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():  # nothing to record: a call costs less without
            result = _ops.self_guided_masking.default(*arguments)
    return SelfGuidedMasking(
        TokenSelection(*result[1:7]), result[0], tuple(result[7]), query_index, head_index
    )


def random_masking(
    tokens: Tensor,
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (visible, mask, ids_restore): MAE's random masking, visible tokens in raster order.

    Keeps the int(N (1 - mask_ratio)) tokens of lowest noise. ``cat([visible, mask tokens], 1)``
    gathered by ids_restore restores the order, as in MAE. Equivalent PyTorch:
    ``noise.argsort(1)[:, :keep].sort(1).values``, then ``gather``.

    Args:
        tokens: (B, N, ...), any dtype; differentiable.
        mask_ratio: share of the tokens to mask, in [0, 1].
        noise: (B, N) float32, uniform in [0, 1): decides the draw instead of `generator`.
        generator: for the draw. Default: torch's global one.

    Returns:
        visible (B, V, ...); mask (B, N) float32, 1 = masked; ids_restore (B, N) int64.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3.
    """
    _check_tensor("tokens", tokens, -2, "(B, N, ...)")
    _check_ratio("mask_ratio", mask_ratio)
    batch, count = tokens.shape[:2]
    if noise is None:
        noise = _rand(batch, count, generator, tokens.device)
    else:
        _check_noise(noise, batch, count, tokens)
    return _ops.random_masking(tokens, noise, mask_ratio)


# Checks: each names the argument, what was given and what is allowed.


def _check_tensor(
    name: str, x: Tensor, rank: int, shape: str, dtypes: Sequence[torch.dtype] = ()
) -> None:
    """`rank` below 0 is the least rank allowed, with its sign turned."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, allowed is a tensor {shape}")
    if x.dim() != rank and (rank > 0 or x.dim() < -rank):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed is {shape}")
    if dtypes:
        _check_dtype(name, x, dtypes)


def _check_dtype(name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got {x.dtype}, allowed is {allowed}")


def _check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: is on {x.device}, allowed is {like.device}, as the first input")


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, int], like: Tensor) -> None:
    if mask is None:
        return
    _check_tensor(name, mask, 2, "of bool, True = padding", (torch.bool,))
    if mask.shape[0] != shape[0] or mask.shape[1] != shape[1]:
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, allowed is {tuple(shape)}")
    _check_device(name, mask, like)


def _check_noise(noise: Tensor, batch: int, tokens: int, like: Tensor) -> None:
    _check_tensor("noise", noise, 2, "(B, N)", (torch.float32,))
    if noise.shape[0] != batch or noise.shape[1] != tokens:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, allowed is ({batch}, {tokens})")
    _check_device("noise", noise, like)


def _check_ids(name: str, ids: Tensor, shape: str, tokens: Tensor) -> None:
    _check_tensor(name, ids, 2, shape, (torch.int64,))
    if ids.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"{name}: got shape {tuple(ids.shape)}, allowed is {tokens.shape[0]} rows, the batch"
        )
    _check_device(name, ids, tokens)


def _check_query_key(query: Tensor, key: Tensor) -> None:
    _check_tensor("query", query, 4, "(B or 1, H, M, D)", _FLOATS)
    _check_tensor("key", key, 4, "(B, H_kv, N, D)", _FLOATS)
    query_batch, heads, _, width = query.shape
    batch, kv_heads, _, key_width = key.shape
    if query_batch != batch and query_batch != 1:
        raise ValueError(
            f"query: got batch {query_batch}, allowed is 1 or {batch}, the batch of key"
        )
    if width != key_width or width == 0:
        raise ValueError(
            f"query, key: got head widths {width} and {key_width}, allowed is one width of at "
            "least 1"
        )
    if heads == 0 or kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"key: got {kv_heads} heads, allowed is a divisor of the {heads} heads of query"
        )
    _check_device("key", key, query)


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed is {', '.join(map(repr, allowed))}")


def _check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is True or False")


def _check_ratio(name: str, value: float, low: float = 0.0) -> None:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is a float in [{low}, 1]")
    if not low <= value <= 1:
        raise ValueError(f"{name}: got {value}, allowed is [{low}, 1]")


def _check_shares(
    random_fraction: float, pool_ratio: float | None, mask_ratio: float | None
) -> None:
    _check_ratio("random_fraction", random_fraction)
    if pool_ratio is not None:
        _check_ratio("pool_ratio", pool_ratio, mask_ratio or 0.0)
        if random_fraction > 0:
            raise ValueError(
                f"random_fraction, pool_ratio: got {random_fraction} and {pool_ratio}, allowed is "
                "at most one"
            )


def _check_count(name: str, value: int, high: int | None) -> None:
    # `high` is put into words only to raise: under torch.compile that would pin the size
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is an int of at least 0")
    if high is None and value < 0:
        raise ValueError(f"{name}: got {value}, allowed is an int of at least 0")
    if high is not None and (value < 0 or value > high):
        raise ValueError(f"{name}: got {value}, allowed is an int in [0, {high}]")


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: got {type(generator).__name__}, allowed is a torch.Generator or None"
        )


def _check_rows(name: str, rows: Tensor, batch: int, like: Tensor) -> None:
    if rows.shape[0] != batch:
        raise ValueError(f"{name}: got shape {tuple(rows.shape)}, allowed is ({batch},)")
    _check_device(name, rows, like)


def _agree(name: str, given: int | None, known: int) -> int:
    if given is not None and given != known:
        raise ValueError(f"{name}: got {given}, allowed is {known}, as in the tensor given")
    return known


# Defaults


def _same_dtype(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    # under autocast latents often stay float32 beside bfloat16 keys: a matmul would take both down
    if query.dtype == key.dtype:
        return query, key
    device = key.device.type
    if not torch.is_autocast_enabled(device):
        raise TypeError(f"key: got {key.dtype}, allowed is {query.dtype}, the dtype of query")
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype)


def _scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return query.shape[3] ** -0.5
    if isinstance(scale, (bool, Tensor)) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale: got {type(scale).__name__}, allowed is a finite float")
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"scale: got {scale}, allowed is a finite float")
    return scale


def _query_index(index: Tensor | None, batch: int, queries: int, like: Tensor) -> Tensor | None:
    if index is None:
        return None
    if not isinstance(index, Tensor):
        raise TypeError(
            f"query_index: got {type(index).__name__}, allowed is a tensor (B, R) or (R,)"
        )
    _check_dtype("query_index", index, _INTS)
    if index.dim() == 1:
        index = index.unsqueeze(0).expand(batch, -1)
    if index.dim() != 2 or index.shape[0] != batch or index.shape[1] > queries:
        raise ValueError(
            f"query_index: got shape {tuple(index.shape)}, allowed is (R,) or ({batch}, R) with R "
            f"at most {queries}, the number of queries"
        )
    _check_device("query_index", index, like)
    return index.long()


def _head_index(
    index: Tensor | None,
    head_reduce: str,
    batch: int,
    queries: int,
    query_index: Tensor | None,
    like: Tensor,
) -> Tensor | None:
    if index is None:
        return None
    _check_tensor("head_index", index, 2, "(B, R)", _INTS)
    selected = queries if query_index is None else query_index.shape[1]
    if index.shape[0] != batch or index.shape[1] != selected:
        raise ValueError(
            f"head_index: got shape {tuple(index.shape)}, allowed is ({batch}, {selected}), one "
            "head for each selected query"
        )
    if head_reduce == "none":
        raise ValueError("head_index: got a tensor, allowed is None with head_reduce='none'")
    _check_device("head_index", index, like)
    return index.long()


def _counts(
    mask_ratio: float | None,
    num_masked: int | Tensor | None,
    max_masked: int | None,
    scores: Tensor,
) -> tuple[int | None, Tensor | None]:
    # -> (num_masked for all rows, or num_masked of each row)
    batch, tokens = scores.shape
    if (mask_ratio is None) == (num_masked is None):
        raise ValueError(
            "mask_ratio, num_masked: got "
            + ("neither" if mask_ratio is None else "both")
            + ", allowed is exactly one"
        )
    if isinstance(num_masked, Tensor):
        _check_tensor("num_masked", num_masked, 1, "(B,)", _INTS)
        _check_rows("num_masked", num_masked, batch, scores)
        if max_masked is not None:
            _check_count("max_masked", max_masked, tokens)
        return None, num_masked
    if max_masked is not None:
        raise ValueError(
            f"max_masked: got {max_masked}, allowed only where num_masked is a (B,) tensor"
        )
    if mask_ratio is not None:
        _check_ratio("mask_ratio", mask_ratio)
    else:
        _check_count("num_masked", num_masked, tokens)
    return num_masked, None


def _noise(
    noise: Tensor | None,
    generator: torch.Generator | None,
    random_fraction: float,
    pool_ratio: float | None,
    mask_ratio: float | None,
    like: Tensor,
    batch: int,
    tokens: int,
) -> Tensor | None:
    # checks the two kinds of random share and draws the noise that they need, if any
    _check_shares(random_fraction, pool_ratio, mask_ratio)
    if noise is not None:
        _check_noise(noise, batch, tokens, like)
    elif random_fraction > 0 or pool_ratio is not None:
        noise = _rand(batch, tokens, generator, like.device)
    return noise


def _rand(
    batch: int, width: int, generator: torch.Generator | None, device: torch.device | str | None
) -> Tensor:
    _check_generator(generator)
    if generator is None:  # the overload that takes one refuses symbolic sizes
        return torch.rand(batch, width, dtype=torch.float32, device=device)
    return torch.rand((batch, width), generator=generator, dtype=torch.float32, device=device)


def _randint(
    high: int, shape: Sequence[int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    _check_generator(generator)
    if generator is None:
        return torch.randint(high, shape, device=device)
    return torch.randint(high, shape, generator=generator, device=device)
