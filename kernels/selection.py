"""What the kernels that choose tokens share: ordered keys, the k-th largest, rounding, rows of ids.

An order is that of the reference: descending, ties to the lowest index, NaN as -inf, -0 as 0. Rows
that fit in registers are searched two bits of the key at a time, longer ones by histograms of eight
bits, a chunk after the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW = 4096  # the longest row that is held in registers
CHUNK = 2048  # of longer ones


def float_bits(x: float | None) -> int:
    """Returns a float64 as an integer: Triton passes floats on as float32."""
    return 0 if x is None else torch.tensor(x, dtype=torch.float64).view(torch.int64).item()


def warps(block: int) -> int:
    """Returns how many warps share a row of `block` tokens: eight tokens a thread."""
    return min(max(block // 256, 1), 16)


def rows_of(x: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """Returns a (B, N) tensor whose rows are dense, and its stride; a stand-in where there is none.

    Bools become bytes, whose every value but 0 is True.
    """
    if x is None:
        return stand_in, 0
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


@triton.jit
def rounded(bits, count):
    """Returns round(x * count) as int32, half to even, of a float64 x given by its bits."""
    x = bits.to(tl.int64).to(tl.float64, bitcast=True) * count.to(tl.float64)
    below = tl.floor(x)
    odd = tl.floor(below * 0.5) * 2.0 != below
    rest = x - below
    up = (rest > 0.5) | ((rest == 0.5) & odd)
    return (below + up.to(tl.float64)).to(tl.int32)


@triton.jit
def ordered(x, NEGATED: tl.constexpr):
    """Returns uint32 keys in the order of x, or of -x."""
    if x.dtype == tl.bfloat16:  # the upper half of a float32; the interpreter loses denormals
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    x = x.to(tl.float32)
    if NEGATED:
        x = -x
    x = tl.where(x != x, float("-inf"), x)
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # in the order of x, as signed integers
    return (bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def top(key, eligible, count):
    """Returns which of the eligible are the `count` largest of a row held in registers."""
    kth = tl.zeros([], tl.uint32)
    for step in range(16):  # not unrolled, which would take a minute to compile
        shift = tl.zeros([], tl.uint32) + (30 - 2 * step)
        found = tl.zeros([], tl.uint32)
        for digit in tl.static_range(1, 4):
            candidate = kth | (tl.full([], digit, tl.uint32) << shift)
            enough = tl.sum((eligible & (key >= candidate)).to(tl.int32)) >= count
            found = tl.where(enough, candidate, found)
        kth = tl.where(found > 0, found, kth)
    above = eligible & (key > kth)
    tie = eligible & (key == kth)
    left = count - tl.sum(above.to(tl.int32))
    return above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= left))


@triton.jit
def store_ids(ids, member, token, before, width):
    """Stores the members of a block of tokens, ascending, behind the `before` that went first."""
    place = before + tl.cumsum(member.to(tl.int32), 0) - 1
    tl.store(ids + place, token.to(tl.int64), mask=member & (place < width))
    return place


@triton.jit
def fill_ids(ids, begin, width, BLOCK: tl.constexpr):
    """Stores -1 behind a row's own number of ids."""
    for start in range(begin, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(ids + place, tl.full([BLOCK], -1, tl.int64), mask=place < width)
