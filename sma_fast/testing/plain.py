"""Plain formulas, sample by sample: a second oracle, for the oracle's own tests.

Letters in the shape comments: B batch, N tokens, V visible, K masked, H heads, M queries,
R selected queries, D head width, C token width.
"""

import torch
from torch import Tensor


def plain_attention_scores(
    query: Tensor,
    key: Tensor,
    query_index: Tensor | None = None,
    head_index: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    head_reduce: str = "mean",
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Returns attention scores computed in `dtype`, sample by sample over its valid keys only."""
    batch, heads = key.shape[0], query.shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = torch.zeros(batch, heads, key.shape[2], dtype=dtype, device=key.device)
    for b in range(batch):
        valid = slice(None) if key_padding_mask is None else ~key_padding_mask[b]
        keys = key[b].to(dtype).repeat_interleave(heads // key.shape[1], dim=0)[:, valid]
        rows = query[min(b, query.shape[0] - 1)].to(dtype)  # (H, M, D)
        attention = (rows @ keys.transpose(1, 2) * scale).softmax(dim=2)
        scores[b][:, valid] = _sum_selected(attention, query_index, head_index, b)
    return _reduce_heads(scores, head_index, head_reduce)


def plain_aggregate_attention(
    attention: Tensor,
    query_index: Tensor | None = None,
    head_index: Tensor | None = None,
    head_reduce: str = "mean",
    logits: bool = False,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the sum over the selected rows of a map, computed in `dtype`, sample by sample."""
    attention = attention.to(dtype)
    if logits:
        attention = attention.softmax(dim=3)
    batch, heads, _, tokens = attention.shape
    scores = torch.zeros(batch, heads, tokens, dtype=dtype, device=attention.device)
    for b in range(batch):
        scores[b] = _sum_selected(attention[b], query_index, head_index, b)
    return _reduce_heads(scores, head_index, head_reduce)


def _sum_selected(
    attention: Tensor, query_index: Tensor | None, head_index: Tensor | None, b: int
) -> Tensor:
    # (H, M, N) of sample b -> (H, N); with head_index each query counts in its own head only
    if query_index is None:
        queries = list(range(attention.shape[1]))
    else:
        queries = (query_index if query_index.dim() == 1 else query_index[b]).tolist()
    if head_index is None:
        return attention[:, [m for m in queries if m >= 0]].sum(dim=1)
    total = torch.zeros_like(attention[:, 0] if attention.shape[1] else attention.sum(dim=1))
    for m, head in zip(queries, head_index[b].tolist(), strict=True):
        if m >= 0:
            total[head] += attention[head, m]
    return total


def _reduce_heads(scores: Tensor, head_index: Tensor | None, head_reduce: str) -> Tensor:
    if head_reduce == "none":
        return scores
    total = scores.sum(dim=1)
    return total if head_reduce == "sum" or head_index is not None else total / scores.shape[1]
