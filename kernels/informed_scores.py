"""informed_scores in Triton: one program compares the patches of a sample with their mean.

Some whole rows at a time, twice: for the mean of the cluster, and for the similarities to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import options, power_of_2, setting
from .selection import rows_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDTH = 16384  # features of a row, at most: more do not fit in registers
_COUNTED = tl.constexpr(1024)  # tokens at a time
_SHORTEST = tl.constexpr(1.17549435e-38)  # a row shorter than a normal number counts as 0


@triton.jit
def unit_rows(rows, valid, width, feature_stride, WIDTH: tl.constexpr):
    """Returns (ROWS, WIDTH) rows of length 1, or 0; NaN for what is not finite."""
    feature = tl.arange(0, WIDTH)
    place = feature.to(tl.int64) * feature_stride
    mask = valid[:, None] & (feature < width)[None, :]
    x = tl.load(rows[:, None] + place[None, :], mask=mask, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(x), 1)
    x = x / tl.where(most == 0.0, 1.0, most)[:, None]  # squares of extremes leave the range
    length = tl.sqrt(tl.sum(x * x, 1))
    short = most * length < _SHORTEST
    return tl.where(short[:, None], 0.0, x / tl.where(short, 1.0, length)[:, None])


@triton.jit
def members_of(labels, padding, start, tokens, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Returns which tokens of a block are labelled, and which are valid."""
    token = start + tl.arange(0, BLOCK)
    valid = token < tokens
    labelled = tl.load(labels + token, mask=valid, other=0) != 0
    if PADDED:
        valid &= tl.load(padding + token, mask=valid, other=1) == 0
    return labelled & valid, valid


@triton.jit
def informed_scores_kernel(
    embeddings,  # (B, N, C)
    labels,  # (B, N) bytes
    padding,  # (B, N) bytes, for PADDED
    scores,  # (B, N)
    tokens,  # N
    width,  # C
    batch_stride,
    token_stride,
    feature_stride,
    labels_stride,
    padding_stride,
    CLUSTER: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,  # compared at a time
    WIDTH: tl.constexpr,  # at least C
):
    sample = tl.program_id(0).to(tl.int64)
    embeddings += sample * batch_stride
    labels += sample * labels_stride
    padding += sample * padding_stride
    number, all_valid = 0, 0
    for start in range(0, tokens, _COUNTED):
        labelled, valid = members_of(labels, padding, start, tokens, PADDED, _COUNTED)
        number += tl.sum(labelled.to(tl.int32))
        all_valid += tl.sum(valid.to(tl.int32))
    others = all_valid - number
    if CLUSTER == "object":
        swap = number < 0
    elif CLUSTER == "background":
        swap = number >= 0
    elif CLUSTER == "smaller":
        swap = others < number
    else:
        swap = others > number
    number = tl.where(swap, others, number)

    mean = tl.zeros([WIDTH], tl.float32)
    for start in range(0, tokens, ROWS):
        labelled, valid = members_of(labels, padding, start, tokens, PADDED, ROWS)
        member = valid & (labelled != swap)
        rows = embeddings + (start + tl.arange(0, ROWS)).to(tl.int64) * token_stride
        mean += tl.sum(unit_rows(rows, member, width, feature_stride, WIDTH), 0)
    length = tl.sqrt(tl.sum(mean * mean))
    found = length > 1e-6 * number.to(tl.float32)  # not for NaN either
    mean = mean * tl.where(found, 1.0 / tl.where(found, length, 1.0), 0.0)

    for start in range(0, tokens, ROWS):
        token = start + tl.arange(0, ROWS)
        _, valid = members_of(labels, padding, start, tokens, PADDED, ROWS)
        rows = embeddings + token.to(tl.int64) * token_stride
        x = unit_rows(rows, valid, width, feature_stride, WIDTH)
        score = tl.sum(x * mean[None, :], 1)
        score = tl.where(score == score, score, 0.0)
        tl.store(scores + sample * tokens + token, score, mask=token < tokens)


def launch(
    embeddings: Tensor,  # (B, N, C)
    labels: Tensor,  # (B, N) bool
    key_padding_mask: Tensor | None,  # (B, N)
    cluster: str,
) -> Tensor:
    """Returns the scores, (B, N) float32."""
    batch, tokens, width = embeddings.shape
    if width > _WIDTH:
        raise ValueError(
            f"embeddings: got shape {tuple(embeddings.shape)}, allowed is (B, N, C) with C at most "
            f"{_WIDTH} on backend triton"
        )
    scores = torch.empty((batch, tokens), dtype=torch.float32, device=embeddings.device)
    if scores.numel() == 0:
        return scores
    chosen = setting("informed_scores", embeddings.device, width)
    wide = power_of_2(width)
    labels, labels_stride = rows_of(labels, labels)
    padding, padding_stride = rows_of(key_padding_mask, labels)
    with torch.cuda.device_of(embeddings):
        informed_scores_kernel[(batch,)](
            *(embeddings, labels, padding, scores, tokens, width, *embeddings.stride()),
            *(labels_stride, padding_stride),
            CLUSTER=cluster,
            PADDED=key_padding_mask is not None,
            ROWS=max(1, chosen["elements"] // wide),
            WIDTH=wide,
            **options(chosen["num_warps"]),
        )
    return scores
