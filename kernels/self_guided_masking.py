"""self_guided_masking in Triton: the launches of scores, selection and gather in a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_scores, gather_tokens, select_tokens
from .launching import options, setting
from .selection import rows_of

DTYPES = attention_scores.DTYPES


@triton.jit
def mark_drawn_kernel(
    query_index, marks, total, selected, index_stride, tokens, BLOCK: tl.constexpr
):
    """Sets the bytes (B, N) of the drawn tokens to 1."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample = at // selected
    index = query_index + sample * index_stride + at % selected
    token = tl.load(index, mask=at < total, other=-1)
    inside = (token >= 0) & (token < tokens)
    tl.store(marks + sample * tokens + token, tl.full([BLOCK], 1, tl.uint8), mask=inside)


def launch(
    query: Tensor,  # (B or 1, H, M, D)
    key: Tensor,  # (B, H_kv, N, D)
    tokens: list[Tensor],  # each (B, N, ...)
    query_index: Tensor,  # (B, R)
    head_index: Tensor | None,  # (B, R)
    key_padding_mask: Tensor | None,  # (B, N)
    noise: Tensor | None,  # (B, N)
    mask_ratio: float,
    scale: float,
    head_reduce: str,
    mask_queries: bool,
    random_fraction: float,
    pool_ratio: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Returns scores, the fields of TokenSelection, and the visible rows of each of `tokens`."""
    scores = attention_scores.launch(
        query, key, query_index, head_index, key_padding_mask, scale, head_reduce
    )
    first = None
    if mask_queries:
        index, index_stride = rows_of(query_index, scores)
        first = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
        total = query_index.numel()
        if total:
            chosen = setting("self_guided_masking", key.device)
            with torch.cuda.device_of(key):
                mark_drawn_kernel[(triton.cdiv(total, chosen["block"]),)](
                    *(index, first, total, query_index.shape[1], index_stride, scores.shape[1]),
                    BLOCK=chosen["block"],
                    **options(chosen["num_warps"]),
                )
    selection = select_tokens.launch(
        *(scores, key_padding_mask, noise, mask_ratio, None, None, None),
        *(random_fraction, pool_ratio, first),
    )
    return (scores, *selection, [gather_tokens.launch(x, selection[1]) for x in tokens])
