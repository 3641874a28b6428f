"""bipartition in Triton: one program cuts a sample in two, all tokens in a block.

The similarities are not stored: rows x of length 1 are applied as x (x^T v), a chunk of features at
a time, which is read once for both products. Two vectors go together: what they span is turned to
its eigenvectors each time, and the second one says how far the next eigenvalue is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import longest, options, power_of_2, setting
from .selection import fill_ids, rows_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NOTHING = tl.constexpr(1e-6)  # eigenvalues up to here count as 0
_LEAST_GAP = tl.constexpr(2e-5)  # of the eigenvalue: floats cannot tell less from a tie
_SETTLED = tl.constexpr(0.5)  # of the gap, that the second eigenvector may be wrong
_FEWEST = tl.constexpr(3)  # products: before, one of equal eigenvalues may show alone
_SUDDEN = tl.constexpr(1000.0)  # times less error than is remembered: exact all at once, as rows
_FADES = tl.constexpr(0.25)  # that repeat make it; what is equal shows until the memory has faded
_SIGN_TIE = tl.constexpr(1e-3)  # entries within this share of the largest count as large,
_ZERO = tl.constexpr(1e-4)  # and up to this share of it as 0, but for rounding
_SHORTEST = tl.constexpr(1.17549435e-38)  # a row shorter than a normal number counts as 0


@triton.jit
def products_of(rows, factor, valid, v0, v1, width, feature_stride, CHUNK: tl.constexpr):
    """Returns x x^T v for two vectors, x being the rows at these addresses times their factors."""
    y0 = tl.zeros_like(v0)
    y1 = tl.zeros_like(v0)
    for start in range(0, width, CHUNK):
        x = chunk_of(rows, valid, start, width, feature_stride, CHUNK) * factor[:, None]
        along0 = tl.sum(x * v0[:, None], 0)
        along1 = tl.sum(x * v1[:, None], 0)
        y0 += tl.sum(x * along0[None, :], 1)
        y1 += tl.sum(x * along1[None, :], 1)
    return y0, y1


@triton.jit
def chunk_of(rows, valid, start, width, feature_stride, CHUNK: tl.constexpr):
    """Returns (BLOCK, CHUNK) features, 0 for padding and behind the last."""
    feature = start + tl.arange(0, CHUNK)
    place = feature.to(tl.int64) * feature_stride
    mask = valid[:, None] & (feature < width)[None, :]
    return tl.load(rows[:, None] + place[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scales_of(rows, valid, width, feature_stride, CHUNK: tl.constexpr):
    """Returns one over the length of each row, 0 for a zero row, and how many are not finite."""
    most = tl.zeros(valid.shape, tl.float32)
    squares = tl.zeros(valid.shape, tl.float32)  # over that of the largest
    for start in range(0, width, CHUNK):
        x = chunk_of(rows, valid, start, width, feature_stride, CHUNK)
        now = tl.maximum(most, tl.max(tl.abs(x), 1))
        base = tl.where(now > 0.0, now, 1.0)
        x = x / base[:, None]  # NaN for infinity too
        squares = squares * (most / base) * (most / base) + tl.sum(x * x, 1)
        most = now
    length = most * tl.sqrt(squares)
    scale = tl.where(length < _SHORTEST, 0.0, 1.0 / tl.where(length < _SHORTEST, 1.0, length))
    return scale, tl.sum(tl.where(squares == squares, 0, 1))


@triton.jit
def noise_of(number):
    """Returns deterministic noise in [-1, 1)."""
    x = (number + 1).to(tl.uint32) * 2654435761
    x = (x ^ (x >> 15)) * 2246822519
    x ^= x >> 13
    return x.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873e-10


@triton.jit
def orthonormal(v, trivial, other, valid, seed):
    """Returns v of length 1, orthogonal to two vectors; noise made so where nothing is left."""
    before = tl.sum(v * v)
    v = v - trivial * tl.sum(v * trivial)
    v = v - other * tl.sum(v * other)
    left = tl.sum(v * v)
    noise = tl.where(valid, noise_of(tl.arange(0, v.shape[0]) + seed * v.shape[0]), 0.0)
    v = tl.where((left > 1e-10 * before) & (left > 1e-24), v, noise)
    for _ in tl.static_range(2):
        v = v - trivial * tl.sum(v * trivial)
        v = v - other * tl.sum(v * other)
    squares = tl.sum(v * v)
    return v * tl.where(squares > 0.0, 1.0 / tl.sqrt(tl.where(squares > 0.0, squares, 1.0)), 0.0)


@triton.jit
def labels_follow(x, valid, n, angle):
    """Returns whether labels are those of the exact vector, at this angle to x of n numbers.

    Then, but for one, and one more in each thousand, no entry is so near to where labels begin, nor
    is a large one that the sign may hang on another.
    """
    size = tl.abs(x)
    most = tl.max(size)
    error = 8.0 * angle * tl.sqrt(tl.sum(x * x) / n)
    near = tl.sum(tl.where(valid & (tl.abs(size - _ZERO * most) < error), 1.0, 0.0))
    from_large = size - (1.0 - _SIGN_TIE) * most
    place = tl.arange(0, x.shape[0])
    first = tl.min(tl.where(from_large >= -error, place, x.shape[0]))
    second = tl.min(tl.where(from_large >= error, place, x.shape[0]))
    sign = tl.sum(tl.where(place == first, x, 0.0)) * tl.sum(tl.where(place == second, x, 0.0))
    return (near <= 1.0 + n / 1000.0) & (sign > 0.0)


@triton.jit
def dot(x, y):
    return tl.sum((x * y).to(tl.float64))


@triton.jit
def bipartition_kernel(
    embeddings,  # (B, N, C)
    padding,  # (B, N) bytes, for PADDED
    vector,  # (B, N)
    labels,  # (B, N) bytes
    ids,  # (B, N)
    eigenvalue,  # (B,)
    converged,  # (B,) bytes
    tokens,  # N
    width,  # C
    batch_stride,
    token_stride,
    feature_stride,
    padding_stride,
    iterations,
    tol,
    CUT: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # at least N
    CHUNK: tl.constexpr,  # of features
):
    sample = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    inside = token < tokens
    valid = inside
    if PADDED:
        valid &= tl.load(padding + sample * padding_stride + token, mask=inside, other=1) == 0
    number = tl.sum(valid.to(tl.int32))
    n = number.to(tl.float32)
    rows = embeddings + sample * batch_stride + token.to(tl.int64) * token_stride
    factor, wrong = scales_of(rows, valid, width, feature_stride, CHUNK)

    # for a cut the matrix is (1 + cosine) / 2 between roots of the degrees, else cosine / n
    if CUT:
        one = valid.to(tl.float32)
        degree, _ = products_of(rows, factor, valid, one, one, width, feature_stride, CHUNK)
        degree = tl.maximum((n + degree) * 0.5, 1e-6 * n)
        root = tl.where(valid, 1.0 / tl.sqrt(tl.where(valid, degree, 1.0)), 0.0)
        trivial = tl.where(valid, tl.sqrt(tl.where(valid, degree, 1.0)), 0.0)
    else:
        root = valid.to(tl.float32)
        trivial = root
    trivial = trivial / tl.sqrt(tl.maximum(tl.sum(trivial * trivial), 1e-30))
    factor = factor * root

    zero = tl.zeros([BLOCK], tl.float32)
    first, y0, y1 = zero, zero, zero  # of which nothing is left: they begin as noise
    value = tl.zeros([], tl.float64)
    near = number < 0
    turn = iterations * 0
    remembered = tl.zeros([], tl.float32)  # error
    while (turn < iterations) & (near == 0) & (wrong == 0) & (number > 1):
        v0 = orthonormal(y0, trivial, zero, valid, 2 * turn)
        v1 = tl.where(number > 2, orthonormal(y1, trivial, v0, valid, 2 * turn + 1), 0.0)
        y0, y1 = products_of(rows, factor, valid, v0, v1, width, feature_stride, CHUNK)
        if CUT:
            y0 = (tl.sum(v0 * root) * root + y0) * 0.5
            y1 = (tl.sum(v1 * root) * root + y1) * 0.5
        else:
            y0 = y0 / n
            y1 = y1 / n
        y0 = y0 - trivial * tl.sum(y0 * trivial)
        y1 = y1 - trivial * tl.sum(y1 * trivial)

        # the rotation that leaves (v0, v1) the eigenvectors between them, the larger one first
        value0, value1 = dot(v0, y0), dot(v1, y1)
        mixed = (dot(v0, y1) + dot(v1, y0)) * 0.5
        half = mixed.to(tl.float32)
        theta = (value1 - value0).to(tl.float32) / tl.where(half == 0.0, 1.0, 2.0 * half)
        tangent = 1.0 / (tl.abs(theta) + tl.sqrt(theta * theta + 1.0))
        tangent = tl.where(half == 0.0, 0.0, tl.where(theta < 0.0, -tangent, tangent))
        value0 -= tangent.to(tl.float64) * mixed
        value1 += tangent.to(tl.float64) * mixed
        cosine = 1.0 / tl.sqrt(tangent * tangent + 1.0)
        sine = tangent * cosine
        swap = value1 > value0
        a = tl.where(swap, sine, cosine)
        b = tl.where(swap, cosine, -sine)
        first, v1 = a * v0 + b * v1, a * v1 - b * v0
        y0, y1 = a * y0 + b * y1, a * y1 - b * y0
        value = tl.maximum(value0, value1)
        second = tl.minimum(value0, value1)
        rest0 = y0 - value.to(tl.float32) * first
        rest1 = y1 - second.to(tl.float32) * v1
        # the second may be as much larger as it is wrong
        error1 = tl.sqrt(tl.sum(rest1 * rest1))
        second += error1
        apart = value - second > _LEAST_GAP * value
        gap = tl.where(apart, value - second, 1.0).to(tl.float32)
        error = tl.sqrt(tl.sum(rest0 * rest0))
        angle = error / gap
        near = (value > _NOTHING) & apart & (angle <= tol)
        turn += 1
        remembered = tl.maximum(_FADES * remembered, error)
        sudden = remembered > tl.maximum(tol * tl.where(apart, gap, 0.0), _SUDDEN * error)
        told = (turn >= _FEWEST) & (sudden == 0)
        near &= (error1 <= _SETTLED * gap) & (told | (number <= 3))
        near &= labels_follow(first * root, valid, n, angle)

    found = value > _NOTHING
    first = tl.where(found, first * root, 0.0)
    size = tl.abs(first)
    large = valid & (size >= (1.0 - _SIGN_TIE) * tl.max(size))
    at = tl.min(tl.where(large, token, BLOCK))
    squares = tl.sum(first * first)
    scale = tl.where(squares > 0.0, 1.0 / tl.sqrt(tl.where(squares > 0.0, squares, 1.0)), 0.0)
    scale = tl.where(tl.sum(tl.where(token == at, first, 0.0)) < 0.0, -scale, scale)
    first = first * scale + 0.0
    # numbers, as Triton brings bools to another layout by way of local memory
    chosen = tl.where(first > _ZERO * tl.max(tl.abs(first)), 1, 0)
    sample_ids = ids + sample * tokens
    tl.store(vector + sample * tokens + token, first, mask=inside)
    tl.store(labels + sample * tokens + token, chosen.to(tl.uint8), mask=inside)
    place = tl.where(chosen > 0, tl.cumsum(chosen, 0) - 1, tokens)
    tl.store(sample_ids + place, token.to(tl.int64), mask=place < tokens)
    fill_ids(sample_ids, tl.sum(chosen), tokens, BLOCK)
    value = tl.where(found, value, 0.0)
    if CUT:
        value = 1.0 - value
    tl.store(eigenvalue + sample, value.to(tl.float32))
    tl.store(converged + sample, near.to(tl.uint8))


def launch(
    embeddings: Tensor,  # (B, N, C)
    key_padding_mask: Tensor | None,  # (B, N)
    method: str,
    iterations: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of Bipartition."""
    batch, tokens, width = embeddings.shape
    most = longest("bipartition", embeddings.device)
    if tokens > most:
        raise ValueError(
            f"embeddings: got shape {tuple(embeddings.shape)}, allowed is (B, N, C) with N at most "
            f"{most} on backend triton"
        )

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=embeddings.device)

    vector = empty(batch, tokens, dtype=torch.float32)
    labels = empty(batch, tokens, dtype=torch.bool)
    ids = empty(batch, tokens, dtype=torch.int64)
    eigenvalue, converged = empty(batch, dtype=torch.float32), empty(batch, dtype=torch.bool)
    if batch == 0:
        return vector, labels, ids, eigenvalue, converged
    padding, padding_stride = rows_of(key_padding_mask, labels.view(torch.uint8))
    chosen = setting("bipartition", embeddings.device, tokens)
    block = power_of_2(tokens)
    of_threads = 32 * chosen["num_warps"] * chosen["bytes"] // embeddings.element_size()
    chunk = min(max(of_threads // block, 1), power_of_2(width))
    with torch.cuda.device_of(embeddings):
        bipartition_kernel[(batch,)](
            *(embeddings, padding, vector, labels.view(torch.uint8), ids, eigenvalue),
            converged.view(torch.uint8),
            *(tokens, width, *embeddings.stride(), padding_stride, iterations, tol),
            CUT=method == "ncut",
            PADDED=key_padding_mask is not None,
            BLOCK=block,
            CHUNK=chunk,
            **options(chosen["num_warps"]),
        )
    return vector, labels, ids, eigenvalue, converged
