"""What the kernels that choose tokens share: ordered keys, the k-th largest, rounding, rows of ids.

An order is that of the reference: descending, ties to the lowest index, NaN as -inf, -0 as 0. Rows
that fit in registers are searched two bits of the key at a time, longer ones by histograms of eight
bits, a chunk after the other.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor


def float_bits(x: float | None) -> int:
    """Returns a float64 as an integer: Triton passes floats on as float32."""
    return 0 if x is None else struct.unpack("<q", struct.pack("<d", x))[0]


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
def how_many(
    row, valid, ratio, number, row_numbers, width, second, COUNT: tl.constexpr, RANDOM: tl.constexpr
):
    """Returns how many of `valid` tokens are masked, and how many of them the scores decide.

    With a pool the second number is that of the pool.
    """
    if COUNT == 0:
        count = rounded(ratio, valid)
    elif COUNT == 1:
        count = number + valid * 0
    else:
        count = tl.load(row_numbers + row).to(tl.int64)
        count = tl.maximum(tl.minimum(count, tl.minimum(valid, width)), 0).to(tl.int32)
    count = tl.minimum(count, valid)
    first = count
    if RANDOM == 1:
        first = rounded(second, count)
    if RANDOM == 2:
        first = tl.maximum(rounded(second, valid), count)
    return count, first


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
def keys_of_chunk(
    values, values_row, padding, padding_row, member, member_row, start, tokens,
    PADDED: tl.constexpr, AMONG: tl.constexpr, FIRST: tl.constexpr, NEGATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns keys and which are eligible: valid, and for AMONG 1 no member, for 2 a member.

    For FIRST members go before all others.
    """
    token = start + tl.arange(0, BLOCK)
    eligible = token < tokens
    if PADDED:
        eligible &= tl.load(padding + padding_row + token, mask=eligible, other=1) == 0
    if AMONG == 1:
        eligible &= tl.load(member + member_row + token, mask=eligible, other=1) == 0
    if AMONG == 2:
        eligible &= tl.load(member + member_row + token, mask=eligible, other=0) != 0
    key = ordered(tl.load(values + values_row + token, mask=eligible, other=0), NEGATED)
    if FIRST:
        goes_first = tl.load(member + member_row + token, mask=eligible, other=0) != 0
        key = tl.where(goes_first, ordered(tl.full([BLOCK], float("inf"), tl.float32), False), key)
    return key, eligible


@triton.jit
def next_digit(found, kth, left, shift):
    """Returns kth with one more digit, and how many are left to take among its keys.

    `found` counts by their next digit the keys that begin with those of kth; none left to take: a
    digit above all others.
    """
    digits = tl.arange(0, 256)
    from_here = tl.sum(found) - tl.cumsum(found, 0) + found  # keys of this digit and above
    digit = tl.max(tl.where((from_here >= left) & (left > 0), digits, -1))
    above = tl.sum(tl.where(digits > digit, found, 0))
    with_digit = kth | (tl.maximum(digit, 0).to(tl.uint32) << shift)
    return tl.where(digit < 0, 0xFFFFFFFF, with_digit), tl.where(digit < 0, 0, left - above)


@triton.jit
def begins(key, kth, shift):
    """Returns whether a key begins with kth's digits above those at `shift`."""
    return (key >> 1 >> (shift + 7)) == (kth >> 1 >> (shift + 7))  # no shift of 32 is defined


@triton.jit
def threshold_of_long(
    values, values_row, padding, padding_row, member, member_row, tokens, count,
    PADDED: tl.constexpr, AMONG: tl.constexpr, FIRST: tl.constexpr, NEGATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns the `count`-th largest key of a long row, and how many of its equals to take."""
    kth = tl.zeros([], tl.uint32)
    left = count
    for step in range(4):
        shift = tl.zeros([], tl.uint32) + (24 - 8 * step)
        found = tl.zeros([256], tl.int32)
        for start in range(0, tokens, BLOCK):
            key, eligible = keys_of_chunk(
                values, values_row, padding, padding_row, member, member_row, start, tokens,
                PADDED, AMONG, FIRST, NEGATED, BLOCK,
            )  # fmt: skip
            eligible &= begins(key, kth, shift)
            found += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=eligible)
        kth, left = next_digit(found, kth, left, shift)
    return kth, left


@triton.jit
def chosen_of_chunk(key, eligible, kth, left, ties):
    """Returns which are above the threshold or among the first ties, behind `ties` before them."""
    tie = eligible & (key == kth)
    place = ties + tl.cumsum(tie.to(tl.int32), 0)
    return (eligible & (key > kth)) | (tie & (place <= left)), ties + tl.sum(tie.to(tl.int32))


@triton.jit
def top_of_long(
    values, values_row, padding, padding_row, member, member_row, tokens, count,
    PADDED: tl.constexpr, AMONG: tl.constexpr, FIRST: tl.constexpr, NEGATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes which of the eligible are the `count` largest of a long row into `member`.

    Other tokens keep what stands there for AMONG 1, and are no members otherwise.
    """
    kth, left = threshold_of_long(
        values, values_row, padding, padding_row, member, member_row, tokens, count,
        PADDED, AMONG, FIRST, NEGATED, BLOCK,
    )  # fmt: skip
    ties = tl.zeros([], tl.int32)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key, eligible = keys_of_chunk(
            values, values_row, padding, padding_row, member, member_row, start, tokens,
            PADDED, AMONG, FIRST, NEGATED, BLOCK,
        )  # fmt: skip
        chosen, ties = chosen_of_chunk(key, eligible, kth, left, ties)
        inside = token < tokens
        if AMONG == 1:
            inside &= chosen
        tl.debug_barrier()  # what is among the members is read before it is written over
        tl.store(member + member_row + token, chosen.to(member.dtype.element_ty), mask=inside)


@triton.jit
def valid_of_long(padding, padding_row, tokens, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Returns how many tokens of a long row are no padding."""
    number = tl.zeros([], tl.int32) + tokens
    if PADDED:
        number = tl.zeros([], tl.int32)
        for start in range(0, tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            byte = tl.load(padding + padding_row + token, mask=token < tokens, other=1)
            number += tl.sum((byte == 0).to(tl.int32))
    return number


@triton.jit
def store_ids(ids, member, token, before, width):
    """Stores the members of a block of tokens, ascending, behind the `before` that went first."""
    place = before + tl.cumsum(member.to(tl.int32), 0) - 1
    tl.store(ids + place, token.to(tl.int64), mask=member & (place < width))
    return place


@triton.jit
def store_choice(
    chosen, seen, token, visible_before, masked_before, ids_visible, ids_masked, ids_restore,
    row, end, tokens, width_visible, width_masked,
):  # fmt: skip
    """Stores ids and places of a block of tokens before `end`, masked, visible or padding.

    Returns how many of a row are visible and masked with them, of how many were before.
    """
    place = store_ids(ids_masked + row * width_masked, chosen, token, masked_before, width_masked)
    at_visible = store_ids(
        ids_visible + row * width_visible, seen, token, visible_before, width_visible
    )
    place = tl.where(chosen, width_visible + place, tl.where(seen, at_visible, -1))
    tl.store(ids_restore + row * tokens + token, place.to(tl.int64), mask=token < end)
    return visible_before + tl.sum(seen.to(tl.int32)), masked_before + tl.sum(chosen.to(tl.int32))


@triton.jit
def fill_ids(ids, begin, width, BLOCK: tl.constexpr):
    """Stores -1 behind a row's own number of ids."""
    for start in range(begin, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(ids + place, tl.full([BLOCK], -1, tl.int64), mask=place < width)
