"""What `sma_fast` is measured against, in plain PyTorch: three ways to the same answer.

The best algebra: only the selected rows, the whole batch at once. Timed as it is and compiled.
The published formula: all M rows of the map, then Python loops over samples that look at the data.
Masked autoencoders' own lines: two argsorts and a gather to hide, a concatenation and a gather to
restore.

All take the queries already drawn, so that every answer can be compared. Rows of `visible` behind a
sample's own number hold anything here, where sma_fast gives zeros: clearing them would only cost
the peers time.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Masked(NamedTuple):
    """The part of `sma_fast.SelfGuidedMasking` that every peer computes."""

    scores: Tensor  # (B, N)
    mask: Tensor  # (B, N)
    ids_visible: Tensor  # (B, V)
    visible: Tensor  # (B, V, C)


# The best algebra


def best_scores(
    query: Tensor,  # (B or 1, H, M, D)
    key: Tensor,  # (B, H, N, D)
    query_index: Tensor,  # (B, R)
    head_index: Tensor | None,  # (B, R)
    padding: Tensor | None,  # (B, N)
) -> Tensor:  # (B, N)
    heads, width = query.shape[1], query.shape[3]
    if query.shape[0] == 1:
        chosen = query[0][:, query_index].transpose(0, 1)  # (B, H, R, D)
    else:
        chosen = query.gather(2, query_index[:, None, :, None].expand(-1, heads, -1, width))
    logits = (chosen * width**-0.5) @ key.transpose(2, 3)  # (B, H, R, N)
    if head_index is not None:
        taken = head_index[:, None, :, None].expand(-1, 1, -1, key.shape[2])
        logits = logits.gather(1, taken)  # (B, 1, R, N)
        heads = 1
    if padding is not None:
        logits += _bias(padding, logits.dtype)[:, None, None]  # adding beats masked_fill by half
    return logits.softmax(3, dtype=torch.float32).sum((1, 2)) / heads


def best_aggregate(attention: Tensor, query_index: Tensor, head_index: Tensor | None) -> Tensor:
    heads = attention.shape[1]
    row = torch.arange(attention.shape[0], device=attention.device)[:, None]
    if head_index is not None:
        return attention[row, head_index, query_index].float().sum(1)
    return attention.transpose(1, 2)[row, query_index].float().sum((1, 2)) / heads


def best_select(scores: Tensor, ratio: float, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (mask, ids_visible) by topk, scatter and a running count.

    The count finds the visible ids faster here than nonzero, a stable sort of the mask or a sort of
    the ids, and compiles without a break.
    """
    tokens = scores.shape[1]
    width_masked = round(ratio * tokens)
    width_visible = tokens - width_masked
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if padding is None:
        mask.scatter_(1, scores.topk(width_masked, sorted=False).indices, True)
        visible = ~mask
    else:
        top = scores.masked_fill(padding, float("-inf")).topk(width_masked).indices
        place = torch.arange(width_masked, device=scores.device)
        mask.scatter_(1, top, place < _counts(ratio, padding)[:, None])
        visible = ~(mask | padding)
    place = visible.cumsum(1) - 1
    ids = torch.full((len(scores), width_visible + 1), -1, device=scores.device)
    token = torch.arange(tokens, device=scores.device).expand_as(place)
    ids.scatter_(1, torch.where(visible, place, width_visible), token)
    return mask, ids[:, :width_visible]


def best_gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """Returns the rows by index_select over the flattened batch: twice as fast as gather here."""
    batch, count = tokens.shape[:2]
    start = torch.arange(batch, device=ids.device)[:, None] * count
    flat = (ids.clamp(min=0) + start).flatten()
    return tokens.flatten(0, 1).index_select(0, flat).unflatten(0, ids.shape)


def best_masking(
    query: Tensor,
    key: Tensor,
    tokens: Tensor,  # (B, N, C)
    query_index: Tensor,
    head_index: Tensor | None,
    padding: Tensor | None,
    ratio: float,
) -> Masked:
    scores = best_scores(query, key, query_index, head_index, padding)
    mask, ids = best_select(scores, ratio, padding)
    return Masked(scores, mask, ids, best_gather(tokens, ids))


def eigh_cut(embeddings: Tensor) -> Tensor:
    """Returns the labels of the normalised cut by a batched eigh of the same similarities."""
    x = torch.nn.functional.normalize(embeddings.float(), dim=2)
    weight = torch.baddbmm(torch.tensor(0.5, device=x.device), x, x.transpose(1, 2), alpha=0.5)
    root = weight.sum(2).rsqrt()
    _, vectors = torch.linalg.eigh(root[:, :, None] * weight * root[:, None, :])
    vector = vectors[:, :, -2] * root  # (B, N)
    largest = vector.gather(1, vector.abs().argmax(1, keepdim=True))
    return vector * largest.sign() > 0


def cluster_similarity(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Returns each patch's cosine similarity to the mean of the patches labelled True."""
    x = torch.nn.functional.normalize(embeddings, dim=2)
    mean = (x * labels[:, :, None]).sum(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(x, mean, dim=2)


def best_draw(
    batch: int, candidates: int, number: int, padding: Tensor | None, device: str
) -> Tensor:
    noise = torch.rand((batch, candidates), device=device)
    if padding is not None:
        noise = noise.masked_fill(padding, 2.0)
    return noise.topk(number, largest=False, sorted=False).indices.sort().values


# The published formula


def published_attention(query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor:
    """Returns the whole (B, H, M, N) map, softmax over N."""
    query = query.expand(len(key), -1, -1, -1)
    attention = query @ key.transpose(2, 3) / key.shape[3] ** 0.5
    if padding is not None:
        attention = attention + _bias(padding, attention.dtype)[:, None, None]
    return attention.softmax(3)


def published_aggregate(
    attention: Tensor, query_index: Tensor, head_index: Tensor | None
) -> Tensor:
    """Reduces the heads of all M rows, then adds the selected ones sample by sample."""
    batch, _, queries, tokens = attention.shape
    if head_index is None:
        reduced = attention.mean(1)  # (B, M, N)
    else:
        head = torch.zeros((batch, queries), dtype=torch.int64, device=attention.device)
        head.scatter_(1, query_index, head_index)
        head = head[:, None, :, None].expand(-1, 1, -1, tokens)
        reduced = attention.gather(1, head).squeeze(1)
    return torch.stack([reduced[b][query_index[b]].float().sum(0) for b in range(batch)])


def published_scores(
    query: Tensor,
    key: Tensor,
    query_index: Tensor,
    head_index: Tensor | None,
    padding: Tensor | None,
) -> Tensor:
    attention = published_attention(query, key, padding)
    return published_aggregate(attention, query_index, head_index)


def published_select(scores: Tensor, ratio: float, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (mask, ids_visible), sample by sample."""
    width_visible = scores.shape[1] - round(ratio * scores.shape[1])
    mask = torch.zeros_like(scores, dtype=torch.bool)
    ids = torch.full((len(scores), width_visible), -1, device=scores.device)
    for b in range(len(scores)):
        valid = torch.ones_like(mask[b]) if padding is None else ~padding[b]
        number = round(ratio * int(valid.sum()))
        top = scores[b].masked_fill(~valid, float("-inf")).topk(number).indices
        mask[b, top] = True
        visible = (valid & ~mask[b]).nonzero().squeeze(1)
        ids[b, : len(visible)] = visible
    return mask, ids


def published_gather(tokens: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([tokens[b][ids[b].clamp(min=0)] for b in range(len(tokens))])


def published_masking(
    query: Tensor,
    key: Tensor,
    tokens: Tensor,
    query_index: Tensor,
    head_index: Tensor | None,
    padding: Tensor | None,
    ratio: float,
) -> Masked:
    scores = published_scores(query, key, query_index, head_index, padding)
    mask, ids = published_select(scores, ratio, padding)
    return Masked(scores, mask, ids, published_gather(tokens, ids))


def published_draw(
    batch: int, candidates: int, number: int, padding: Tensor | None, device: str
) -> Tensor:
    drawn = []
    for b in range(batch):
        valid = candidates if padding is None else int((~padding[b]).sum())
        drawn.append(torch.randperm(valid, device=device)[:number].sort().values)
    return torch.stack(drawn)


# Another project's kernel for all queries


def flash_colreduce(query: Tensor, key: Tensor) -> Callable[[], Tensor] | str:
    """Returns a call of flash-colreduce (PyPI): (B, H, N) sums over the queries; or why not."""
    try:
        from flash_colreduce import flash_colreduce
    except ImportError:
        return "not measured: pip install flash-colreduce"
    if not query.is_cuda:
        return "runs on CUDA only"
    return functools.partial(flash_colreduce, query, key, "sum")


def summed_attention(query: Tensor, key: Tensor) -> Tensor:
    """Returns the same by the whole map, (B, H, N)."""
    return published_attention(query, key, None).float().sum(2)


# The lines that users write, and those of masked autoencoders


def topk_scatter_nonzero(
    scores: Tensor, ratio: float, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (mask, ids_visible) of the whole batch, the ids by nonzero."""
    width_masked = round(ratio * scores.shape[1])
    width_visible = scores.shape[1] - width_masked
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if padding is None:
        mask.scatter_(1, scores.topk(width_masked).indices, True)
        return mask, (~mask).nonzero()[:, 1].view(-1, width_visible)
    top = scores.masked_fill(padding, float("-inf")).topk(width_masked).indices
    place = torch.arange(width_masked, device=scores.device)
    mask.scatter_(1, top, place < _counts(ratio, padding)[:, None])
    visible = ~(mask | padding)
    row, token = visible.nonzero(as_tuple=True)
    number = visible.sum(1)
    start = number.cumsum(0) - number  # (B,), where each row begins among the pairs
    ids = torch.full((len(scores), width_visible), -1, device=scores.device)
    ids[row, torch.arange(len(row), device=scores.device) - start[row]] = token
    return mask, ids


def torch_gather(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids.clamp(min=0)[:, :, None].expand(-1, -1, tokens.shape[2]))


def mae_random_masking(tokens: Tensor, ratio: float, noise: Tensor | None = None):
    """Returns (visible, mask, ids_restore), visible in the order of the noise."""
    batch, count, width = tokens.shape
    keep = int(count * (1 - ratio))
    if noise is None:
        noise = torch.rand((batch, count), device=tokens.device)
    order = noise.argsort(1)
    ids_restore = order.argsort(1)
    visible = tokens.gather(1, order[:, :keep, None].expand(-1, -1, width))
    mask = torch.ones((batch, count), device=tokens.device)
    mask[:, :keep] = 0
    return visible, mask.gather(1, ids_restore), ids_restore


def mae_restore(visible: Tensor, ids_restore: Tensor, fill: Tensor) -> Tensor:
    """Returns all tokens: the fill repeated behind the visible ones, then gathered."""
    return torch_gather(_with_fill(visible, ids_restore, fill), ids_restore)


def best_restore(visible: Tensor, ids_restore: Tensor, fill: Tensor) -> Tensor:
    """As mae_restore, by index_select."""
    return best_gather(_with_fill(visible, ids_restore, fill), ids_restore)


def _with_fill(visible: Tensor, ids_restore: Tensor, fill: Tensor) -> Tensor:
    batch, count, width = visible.shape
    repeated = fill.expand(batch, ids_restore.shape[1] - count, width)
    return torch.cat([visible, repeated], 1)  # (B, N, C)


def _bias(padding: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(padding.shape, dtype=dtype, device=padding.device).masked_fill_(
        padding, float("-inf")
    )


def _counts(ratio: float, padding: Tensor) -> Tensor:
    return (ratio * (~padding).sum(1).double()).round().long()  # (B,), half to even
