"""Logits of a block of keys and a block of selected queries, for attention_scores in Triton."""

import os

import triton
import triton.language as tl

# the interpreter multiplies the bits of bfloat16 as if they were numbers
_WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def multiple(x, OF: tl.constexpr):
    """Returns x, of which the compiler then knows that OF divides it: loads of 16 bytes follow."""
    if OF > 1:
        x = x // OF * OF
    return x


@triton.jit
def features_of(
    vectors, use, first, width, stride, BLOCK_WIDTH: tl.constexpr, DIVISOR: tl.constexpr
):
    """Returns the features from `first` on of the vectors that are used, 0 for all others."""
    column = first + tl.arange(0, BLOCK_WIDTH)
    place = column
    if DIVISOR == 0:
        place = column.to(tl.int64) * stride
    return tl.load(
        vectors[:, None] + place[None, :],
        mask=use[:, None] & (column < multiple(width, DIVISOR))[None, :],
        other=0.0,
    )


@triton.jit
def rows_of_block(
    query, query_index, head_index, sample, head, first, sample_stride, head_stride, row_stride,
    feature_stride, index_stride, queries, selected, last, width,
    INDEXED: tl.constexpr, BY_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Returns selected queries (BLOCK_ROWS, BLOCK_WIDTH), where they begin, and which count.

    They are those from `first` on, before `last`; another head's do not count.
    """
    at = first + tl.arange(0, BLOCK_ROWS)
    use = at < last
    place = at.to(tl.int64)
    if BY_HEAD:
        use &= tl.load(head_index + sample * selected + at, mask=use, other=-1) == head
    if INDEXED:
        place = tl.load(query_index + sample * index_stride + at, mask=use, other=-1)
        use &= (place >= 0) & (place < queries)
    vectors = query + sample * multiple(sample_stride, DIVISOR)
    vectors += head * multiple(head_stride, DIVISOR) + place * multiple(row_stride, DIVISOR)
    q = features_of(vectors, use, 0, width, feature_stride, BLOCK_WIDTH, DIVISOR)
    return q, vectors, use


@triton.jit
def keys_of_block(
    key, padding, sample, head, start, tokens, width, sample_stride, head_stride, token_stride,
    feature_stride, padding_stride, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Returns keys (BLOCK, BLOCK_WIDTH), where they begin, and which are valid."""
    token = start + tl.arange(0, BLOCK)
    valid = token < tokens
    if PADDED:
        valid &= tl.load(padding + sample * padding_stride + token, mask=valid, other=1) == 0
    vectors = key + sample * multiple(sample_stride, DIVISOR)
    vectors += head * multiple(head_stride, DIVISOR)
    vectors += token.to(tl.int64) * multiple(token_stride, DIVISOR)
    k = features_of(vectors, valid, 0, width, feature_stride, BLOCK_WIDTH, DIVISOR)
    return k, vectors, valid


@triton.jit
def products(k, q):
    """Returns k q', of float32 to its precision."""
    if _WIDEN:
        k, q = k.to(tl.float32), q.to(tl.float32)
    return tl.dot(k, tl.trans(q), input_precision="tf32x3")


@triton.jit
def logits_of(
    k, keys, valid, q, vectors, use, width, key_feature_stride, query_feature_stride, scale,
    BLOCK_WIDTH: tl.constexpr, KEPT: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Returns (tokens, rows) logits in powers of two, -inf for padding.

    `k` and `q` have all features where these are KEPT; else these come a block at a time from where
    `keys` and `vectors` begin.
    """
    if KEPT:
        s = products(k, q)
    else:
        s = tl.zeros([k.shape[0], q.shape[0]], tl.float32)
        for first in range(0, width, BLOCK_WIDTH):
            s += products(
                features_of(keys, valid, first, width, key_feature_stride, BLOCK_WIDTH, DIVISOR),
                features_of(vectors, use, first, width, query_feature_stride, BLOCK_WIDTH, DIVISOR),
            )
    return tl.where(valid[:, None], s * scale, float("-inf"))
