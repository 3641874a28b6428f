"""The public functions: check arguments, fill in defaults, call ``torch.ops.sma_fast.<op>``.

Letters in the shapes: B batch, N tokens, V visible, K masked, H heads, M queries,
R selected queries, D head width, C token width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sma_fast import (
    _check,
    _dispatch,  # noqa: F401  (registers the implementations)
    _draws,
)

_ops = torch.ops.sma_fast


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


class Bipartition(NamedTuple):
    """Patches cut in two.

    Attributes:
        vector: (B, N) float32 of length 1, the eigenvector; 0 for padding.
        labels: (B, N) bool, where the vector is above a ten-thousandth of its largest entry: what
            is 0 but for rounding is False.
        ids: (B, N) int64, the patches whose label is True, ascending, -1 behind.
        eigenvalue: (B,) float32.
        converged: (B,) bool, whether the vector is as near to the exact one as `tol` asks, which
            needs a gap to the next eigenvalue.
    """

    vector: Tensor
    labels: Tensor
    ids: Tensor
    eigenvalue: Tensor
    converged: Tensor


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

    Equivalent PyTorch, without padding, for (B, R) `query_index`::

        attention = (scale * query @ key.transpose(2, 3)).softmax(3)  # (B, H, M, N)
        rows = attention.take_along_dim(query_index[:, None, :, None], 2)  # (B, H, R, N)
        scores = rows.sum(2).mean(1)  # (B, N)

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
    _check.query_key(query, key)
    batch, tokens = key.shape[0], key.shape[2]
    query, key = _check.same_dtype(query, key)
    query_index = _check.query_index(query_index, batch, query.shape[2], key)
    head_index = _check.head_index(head_index, head_reduce, batch, query.shape[2], query_index, key)
    _check.mask("key_padding_mask", key_padding_mask, (batch, tokens), key)
    _check.choice("head_reduce", head_reduce, _check.REDUCE)
    scale = _check.scale(scale, query)
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

    Equivalent PyTorch, for (B, R) `query_index`::

        rows = attention.take_along_dim(query_index[:, None, :, None], 2)  # (B, H, R, N)
        scores = rows.sum(2).mean(1)  # (B, N)

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
    _check.attention_map("attention", attention)
    batch, _, queries, _ = attention.shape
    query_index = _check.query_index(query_index, batch, queries, attention)
    head_index = _check.head_index(head_index, head_reduce, batch, queries, query_index, attention)
    _check.choice("head_reduce", head_reduce, _check.REDUCE)
    _check.flag("logits", logits)
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
    tokens (float64, half to even) or ``min(num_masked, n_valid)``.

    Equivalent PyTorch, without padding and ties::

        ids_masked = scores.topk(num_masked).indices.sort().values  # (B, K)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids_masked, True)
        ids_visible = (~mask).nonzero()[:, 1].view(len(scores), -1)  # (B, V)
        ids_restore = torch.cat([ids_visible, ids_masked], 1).argsort(1)  # (B, N)

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
    _check.tensor("scores", scores, 2, "(B, N)", _check.FLOATS)
    _check.generator(generator)
    batch, tokens = scores.shape
    num_masked, num_masked_rows = _check.masked_counts(mask_ratio, num_masked, max_masked, scores)
    _check.mask("key_padding_mask", key_padding_mask, (batch, tokens), scores)
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

    Equivalent PyTorch, without -1, for (B, N, C) `tokens`::

        gathered = tokens.take_along_dim(ids[:, :, None], 1)

    Args:
        tokens: (B, N, ...), any dtype.
        ids: (B, V) int64 in [-1, N).

    Returns:
        (B, V, ...), dtype of `tokens`.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3.
    """
    _check.tensor("tokens", tokens, -2, "(B, N, ...)")
    _check.ids("ids", ids, "(B, V)", tokens)
    return _ops.gather_tokens(tokens, ids)


def restore_tokens(visible: Tensor, ids_restore: Tensor, fill: Tensor) -> Tensor:
    """Returns all tokens in their original order, `fill` where they were masked.

    Position j takes row ``ids_restore[j]`` of ``cat([visible, fill], 1)``; -1 (padding) gives
    zeros. Differentiable, twice. Mixed dtypes are promoted as ``torch.cat`` does.

    Equivalent PyTorch, without padding, for (B, K, C) `fill`::

        tokens = torch.cat([visible, fill], 1).take_along_dim(ids_restore[:, :, None], 1)

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
    _check.tensor("visible", visible, 3, "(B, V, C)", _check.FLOATS)
    _check.ids("ids_restore", ids_restore, "(B, N)", visible)
    if not isinstance(fill, Tensor):
        raise TypeError(f"fill: got {type(fill).__name__}, allowed is a tensor (C,) or (B, K, C)")
    _check.dense("fill", fill)
    batch, _, width = visible.shape
    per_token = fill.dim() == 3 and fill.shape[0] == batch and fill.shape[2] == width
    if not (per_token or (fill.dim() == 1 and fill.shape[0] == width)):
        raise ValueError(
            f"fill: got shape {tuple(fill.shape)}, allowed is ({width},) or ({batch}, K, {width})"
        )
    _check.device("fill", fill, visible)
    _check.dtype("fill", fill, _check.FLOATS)
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

    Equivalent PyTorch, for each sample::

        queries = torch.randperm(num_candidates)[:num_queries].sort().values  # (R,)

    Args:
        num_queries: how many, an int, or (B,) integers for each sample; a sample with any
            candidate draws at least 1 and at most all of them.
        batch: B. Not needed with `padding_mask` or (B,) `num_queries`.
        num_candidates: M. Not needed with `padding_mask`.
        padding_mask: (B, M) bool, True = padding, never drawn.
        generator: for the draws. Default: torch's global one.
        device: of the result. Default: that of `padding_mask` or `num_queries`, else torch's
            default device.

    Returns:
        (B, R) int64, ascending, -1 behind a row's own number; R = max(num_queries, 1), or M where
        the numbers come in a tensor.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """
    _check.generator(generator)
    device = _check.named_device(device)
    rows = num_queries if isinstance(num_queries, Tensor) else None
    if padding_mask is not None:
        _check.tensor("padding_mask", padding_mask, 2, "(B, M)", (torch.bool,))
        batch = _check.agree("batch", batch, padding_mask.shape[0])
        num_candidates = _check.agree("num_candidates", num_candidates, padding_mask.shape[1])
        device = padding_mask.device if device is None else device
        if device.type != padding_mask.device.type:
            raise ValueError(
                f"padding_mask: is on {padding_mask.device}, allowed is device={device}"
            )
    if rows is not None:
        _check.tensor("num_queries", rows, 1, "(B,)", _check.INTS)
        if batch is None:
            batch = rows.shape[0]
        if rows.shape[0] != batch:
            raise ValueError(f"num_queries: got shape {tuple(rows.shape)}, allowed is ({batch},)")
        device = rows.device if device is None else device
    if batch is None or num_candidates is None:
        missing = "batch" if batch is None else "num_candidates"
        raise ValueError(f"{missing}: got None, allowed is an int where no padding_mask gives it")
    _check.count("batch", batch, None)
    _check.count("num_candidates", num_candidates, None)
    if rows is None:
        _check.count("num_queries", num_queries, num_candidates)
        width = max(num_queries, min(1, num_candidates))
    else:
        width = num_candidates
    noise = _draws.rand((batch, num_candidates), generator, device)
    if rows is not None:
        _check.device("num_queries", rows, noise)
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

        index = draw_queries(num_queries, batch=key.shape[0], num_candidates=query.shape[2])
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
        query_padding_mask: (B, M) bool, True = padding, never drawn; not with `query_index`.
            Default for M = N self-attention with ``mask_queries``: `key_padding_mask`.
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
    _check.query_key(query, key)
    batch, count = key.shape[0], key.shape[2]
    heads, queries = query.shape[1], query.shape[2]
    query, key = _check.same_dtype(query, key)
    for i, x in enumerate(tokens):
        _check.tensor(f"tokens[{i}]", x, -2, "(B, N, ...)")
        if x.shape[0] != batch or x.shape[1] != count:
            raise ValueError(
                f"tokens[{i}]: got shape {tuple(x.shape)}, allowed is ({batch}, {count}, ...)"
            )
        _check.device(f"tokens[{i}]", x, key)
    _check.ratio("mask_ratio", mask_ratio)
    _check.mask("key_padding_mask", key_padding_mask, (batch, count), key)
    _check.mask("query_padding_mask", query_padding_mask, (batch, queries), key)
    _check.generator(generator)
    _check.flag("mask_queries", mask_queries)
    _check.choice("head_reduce", head_reduce, ("mean", "sum", "random"))
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
        if query_padding_mask is not None:
            raise ValueError(
                "query_padding_mask: got a tensor, allowed is None with query_index, which says "
                "what is drawn"
            )
        query_index = _check.query_index(query_index, batch, queries, key)
        selected = query_index.shape[1]
    elif isinstance(num_queries, Tensor):
        _check.tensor("num_queries", num_queries, 1, "(B,)", _check.INTS)
        _check.rows("num_queries", num_queries, batch, key)
        selected, rows = queries, num_queries
    else:
        _check.count("num_queries", num_queries, queries)
        selected, rows = max(num_queries, min(1, queries)), None
    if head_reduce == "random" and head_index is not None:
        raise ValueError("head_index: got a tensor, allowed is None with head_reduce='random'")
    head_index = _check.head_index(head_index, head_reduce, batch, selected, None, key)
    _check.shares(random_fraction, pool_ratio, mask_ratio)
    scale = _check.scale(scale, query)

    if query_index is None:
        if query_padding_mask is None and mask_queries:
            query_padding_mask = key_padding_mask
        drawn = _draws.rand((batch, queries), generator, key.device)
        query_index = _ops.draw_queries.default(drawn, selected, rows, query_padding_mask)
    if head_reduce == "random":
        head_index = _draws.randint(heads, query_index.shape, generator, key.device)
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
    gathered by ids_restore restores the order, as in MAE.

    Equivalent PyTorch, for (B, N, C) `tokens`::

        keep = int(tokens.shape[1] * (1 - mask_ratio))
        ids_visible = noise.argsort(1)[:, :keep].sort(1).values  # (B, V)
        visible = tokens.take_along_dim(ids_visible[:, :, None], 1)
        mask = torch.ones_like(noise).scatter(1, ids_visible, 0.0)

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
    _check.tensor("tokens", tokens, -2, "(B, N, ...)")
    _check.ratio("mask_ratio", mask_ratio)
    _check.generator(generator)
    batch, count = tokens.shape[:2]
    if noise is None:
        noise = _draws.rand((batch, count), generator, tokens.device)
    else:
        _check.noise(noise, batch, count, tokens)
    return _ops.random_masking(tokens, noise, mask_ratio)


# Draws


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
    _check.shares(random_fraction, pool_ratio, mask_ratio)
    if noise is not None:
        _check.noise(noise, batch, tokens, like)
    elif random_fraction > 0 or pool_ratio is not None:
        noise = _draws.rand((batch, tokens), generator, like.device)
    return noise


def bipartition(
    embeddings: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    method: str = "ncut",
    iterations: int = 64,
    tol: float = 3e-4,
    similarity: str = "cosine",
) -> Bipartition:
    """Returns the patches of each sample cut in two by the similarity of their embeddings.

    With ``W = (1 + cosine) / 2`` and its degrees ``D``, "ncut" takes the second eigenvector of
    ``(D - W) v = eigenvalue D v``, the relaxed normalised cut; "pca" takes the first principal
    component of the normalised embeddings, for which the eigenvalue is the mean square along it.
    Equivalent PyTorch, for "ncut"::

        x = torch.nn.functional.normalize(embeddings, dim=2)
        W = (1 + x @ x.transpose(1, 2)) / 2  # (B, N, N)
        root = W.sum(2).rsqrt()
        values, vectors = torch.linalg.eigh(root[:, :, None] * W * root[:, None, :])
        vector = vectors[:, :, -2] * root  # eigenvalue 1 - values[:, -2]

    The sign: the entry of largest size is positive, the first one where several are as large but
    for a thousandth. A patch is labelled True where the vector is above 0, which is its mean
    weighted by the degrees (above a ten-thousandth of that entry, as rounding decides what is 0).
    A zero embedding, or one shorter than a normal number, has cosine 0 with every other and itself.
    Where there is nothing to cut (one patch; embeddings that are equal, or so nearly that the
    share they differ by, 1 - eigenvalue of "ncut" and the eigenvalue of "pca", is at most 1e-6)
    vector, labels and `converged` are 0.

    Args:
        embeddings: (B, N, C), N at least 1, float32, bfloat16, float16 or float64; finite where
            there is no padding. The reference, which float64 goes to, solves the whole problem: it
            needs no `iterations`, and `converged` says that the next eigenvalue is another one. N
            is at most 2048 on backend triton, and on cuda what shared memory holds (more than
            3000). On a GPU a sample that is not finite is not cut, nor, on cuda, one with rows
            longer than 1e36; SMA_FAST_CHECK=1 raises for the former.
        key_padding_mask: (B, N) bool, True = padding.
        method: "ncut" or "pca".
        iterations: products with the matrix, at most; at least 1. On the CPU embeddings of pictures
            take 3 to 9 of them, random ones, whose eigenvalues lie close together, 20 to 70; on a
            GPU, where each product goes on from the last one only, more.
        tol: the largest angle to the exact vector, in radians, for which `converged` is True; above
            0. It is bounded by the residual over the gap to the next eigenvalue. Where an angle as
            small could still change labels, or the sign, iterations go on.
        similarity: "cosine".

    Returns:
        `Bipartition`. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Normalized Cuts (Shi and Malik, 2000), equation 11, as Self-Guided Masked Autoencoder
    (arXiv 2507.19773) uses it.
    """
    _check.tensor("embeddings", embeddings, 3, "(B, N, C)", _check.FLOATS)
    batch, tokens, width = embeddings.shape
    if tokens == 0 or width == 0:
        raise ValueError(
            f"embeddings: got shape {tuple(embeddings.shape)}, allowed is (B, N, C) with N and C "
            "at least 1"
        )
    _check.mask("key_padding_mask", key_padding_mask, (batch, tokens), embeddings)
    _check.choice("method", method, ("ncut", "pca"))
    _check.choice("similarity", similarity, ("cosine",))
    _check.positive_count("iterations", iterations)
    _check.positive("tol", tol)
    return Bipartition(*_ops.bipartition(embeddings, key_padding_mask, method, iterations, tol))


def informed_scores(
    embeddings: Tensor,
    bipartition: Bipartition,
    *,
    cluster: str = "object",
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Returns each patch's cosine similarity to the mean of one of the two clusters.

    `select_tokens` then masks the patches most like it; its `pool_ratio` leaves some of them
    visible, as hints. Equivalent PyTorch, without padding::

        x = torch.nn.functional.normalize(embeddings, dim=2)
        mean = (x * labels[:, :, None]).sum(1, keepdim=True)
        scores = torch.nn.functional.cosine_similarity(x, mean, dim=2)

    Args:
        embeddings: (B, N, C), as `bipartition` got them; float32, bfloat16, float16 or float64;
            finite where there is no padding. C is at most 16384 on backend triton. On a GPU what
            is not finite scores 0; SMA_FAST_CHECK=1 raises.
        bipartition: what it returned.
        cluster: whose mean. "object": the cluster that holds the entry of largest size of the
            eigenvector, which is the one labelled True: what differs most from the rest is cut off
            most clearly. "background": the other one. "smaller", "larger": by the number of
            patches, "object" where both are as many.
        key_padding_mask: (B, N) bool, True = padding; padding scores 0.

    Returns:
        (B, N) float32 in [-1, 1] but for rounding; 0 where the cluster is empty, or its patches
        cancel out. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoder (arXiv 2507.19773); that the object holds the largest
    entry is TokenCut's rule (arXiv 2202.11539).
    """
    _check.tensor("embeddings", embeddings, 3, "(B, N, C)", _check.FLOATS)
    batch, tokens, width = embeddings.shape
    if width == 0:
        raise ValueError(
            f"embeddings: got shape {tuple(embeddings.shape)}, allowed is C of at least 1"
        )
    if not isinstance(bipartition, Bipartition):
        raise TypeError(
            f"bipartition: got {type(bipartition).__name__}, allowed is what bipartition returns"
        )
    labels = bipartition.labels
    _check.tensor("bipartition.labels", labels, 2, "(B, N)", (torch.bool,))
    if labels.shape[0] != batch or labels.shape[1] != tokens:
        raise ValueError(
            f"bipartition.labels: got shape {tuple(labels.shape)}, allowed is {(batch, tokens)}, "
            "that of embeddings"
        )
    _check.device("bipartition.labels", labels, embeddings)
    _check.mask("key_padding_mask", key_padding_mask, (batch, tokens), embeddings)
    _check.choice("cluster", cluster, ("object", "background", "smaller", "larger"))
    return _ops.informed_scores(embeddings, labels, key_padding_mask, cluster)
