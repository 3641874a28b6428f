"""select_tokens for few, long rows: several programs a row, in a fixed number of launches.

Each of four launches adds up, for eight more bits, how many keys of a row begin with the digits
found so far (sums of integers: their order does not matter). The next one counts what each program
will choose, and the last chooses and writes. With a random share, a second such order follows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import turns
from .launching import options, setting
from .selection import begins, chosen_of_chunk, how_many, keys_of_chunk, next_digit, store_choice

_UNSPECIALIZED = ["ratio", "second", "number", "step"]


@triton.jit
def wanted(
    found_row, row, ratio, number, row_numbers, width, second,
    ORDER: tl.constexpr, COUNT: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Returns how many tokens of a row are valid, masked, and to be taken in this order."""
    valid = tl.sum(tl.load(found_row + tl.arange(0, 256)))  # all of them have a first digit
    count, first = how_many(row, valid, ratio, number, row_numbers, width, second, COUNT, RANDOM)
    take = first
    if ORDER == 1:
        take = count
        if RANDOM == 1:
            take = count - first
    return valid, count, take


@triton.jit
def threshold_of_row(found, take, steps):
    """Returns the `take`-th largest key, its first `steps` digits, and how many equals to take."""
    kth = tl.zeros([], tl.uint32)
    left = take
    for step in range(0, steps):
        shift = tl.zeros([], tl.uint32) + (24 - 8 * step)
        kth, left = next_digit(tl.load(found + step * 256 + tl.arange(0, 256)), kth, left, shift)
    return kth, left


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def count_digits_kernel(
    values,  # (B, N): scores, or noise for ORDER 1
    padding,  # (B, N) bytes, for PADDED
    mask,  # (B, N) bytes: what goes first, for FIRST; what is chosen, for ORDER 1
    found,  # (B, orders, 4, 256): how many keys of a row have each digit
    row_numbers,  # (B,), for COUNT 2
    tokens,  # N
    tokens_of_part,
    width_masked,  # K
    values_stride,
    padding_stride,
    number,
    ratio,
    second,
    step,  # which eight bits, from the first
    ORDER: tl.constexpr,
    COUNT: tl.constexpr,
    RANDOM: tl.constexpr,
    PADDED: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tokens_of_part
    end = tl.minimum(begin + tokens_of_part, tokens)
    found_row = found + row * (1024 if RANDOM == 0 else 2048)
    _, _, take = wanted(
        found_row, row, ratio, number, row_numbers, width_masked, second, ORDER, COUNT, RANDOM
    )
    kth, _ = threshold_of_row(found_row + ORDER * 1024, take, step)
    shift = tl.zeros([], tl.uint32) + (24 - 8 * step)
    here = tl.zeros([256], tl.int32)
    for start in range(begin, end, BLOCK):
        key, eligible = keys_of_chunk(
            values, row * values_stride, padding, row * padding_stride, mask, row * tokens, start,
            end, PADDED, RANDOM if ORDER == 1 else 0, FIRST if ORDER == 0 else False, ORDER == 1,
            BLOCK,
        )  # fmt: skip
        eligible &= begins(key, kth, shift)  # as all do with no digit
        here += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=eligible)
    to = found_row + ORDER * 1024 + step * 256 + tl.arange(0, 256)
    tl.atomic_add(to, here, mask=here > 0, sem="relaxed")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def count_parts_kernel(
    values, padding, mask, found, parts, row_numbers, tokens, tokens_of_part, width_masked,
    values_stride, padding_stride, number, ratio, second,
    ORDER: tl.constexpr, COUNT: tl.constexpr, RANDOM: tl.constexpr, PADDED: tl.constexpr,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes how many of a part are chosen whatever the others hold, tie, and are valid.

    parts is (3, B, parts).
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tokens_of_part
    end = tl.minimum(begin + tokens_of_part, tokens)
    found_row = found + row * (1024 if RANDOM == 0 else 2048)
    _, _, take = wanted(
        found_row, row, ratio, number, row_numbers, width_masked, second, ORDER, COUNT, RANDOM
    )
    kth, _ = threshold_of_row(found_row + ORDER * 1024, take, 4)
    sure = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    valid = tl.zeros([], tl.int32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key, eligible = keys_of_chunk(
            values, row * values_stride, padding, row * padding_stride, mask, row * tokens, start,
            end, PADDED, RANDOM if ORDER == 1 else 0, FIRST if ORDER == 0 else False, ORDER == 1,
            BLOCK,
        )  # fmt: skip
        inside = token < end
        chosen = eligible & (key > kth)
        if ORDER == 1 and RANDOM == 1:
            chosen |= tl.load(mask + row * tokens + token, mask=inside, other=0) != 0
        if PADDED:
            inside &= tl.load(padding + row * padding_stride + token, mask=inside, other=1) == 0
        sure += tl.sum(chosen.to(tl.int32))
        ties += tl.sum((eligible & (key == kth)).to(tl.int32))
        valid += tl.sum(inside.to(tl.int32))
    number_of_parts = tl.num_programs(0) * tl.num_programs(1)
    to = parts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(to, sure)
    tl.store(to + number_of_parts, ties)
    tl.store(to + 2 * number_of_parts, valid)


@triton.jit
def parts_before(parts, PARTS: tl.constexpr):
    """Returns the sum of a row's parts before this program's."""
    part = tl.arange(0, PARTS)
    at = parts + tl.program_id(0) * tl.num_programs(1) + part
    return tl.sum(tl.load(at, mask=part < tl.program_id(1), other=0))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def mark_chosen_kernel(
    values, padding, mask, found, parts, row_numbers, tokens, tokens_of_part, width_masked,
    values_stride, padding_stride, number, ratio, second,
    COUNT: tl.constexpr, RANDOM: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes what the scores choose into `mask`, for a random share to follow."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tokens_of_part
    end = tl.minimum(begin + tokens_of_part, tokens)
    found_row = found + row * 2048
    _, _, take = wanted(
        found_row, row, ratio, number, row_numbers, width_masked, second, 0, COUNT, RANDOM
    )
    kth, left = threshold_of_row(found_row, take, 4)
    number_of_parts = tl.num_programs(0) * tl.num_programs(1)
    ties = parts_before(parts + number_of_parts, PARTS)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key, eligible = keys_of_chunk(
            values, row * values_stride, padding, row * padding_stride, mask, row * tokens, start,
            end, PADDED, 0, FIRST, False, BLOCK,
        )  # fmt: skip
        chosen, ties = chosen_of_chunk(key, eligible, kth, left, ties)
        tl.debug_barrier()  # what goes first is read before it is written over
        tl.store(mask + row * tokens + token, chosen.to(tl.uint8), mask=token < end)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def write_parts_kernel(
    values, padding, mask, found, parts, row_numbers, ids_visible, ids_masked, ids_restore,
    num_visible, num_masked, tokens, tokens_of_part, width_visible, width_masked,
    values_stride, padding_stride, number, ratio, second,
    ORDER: tl.constexpr, COUNT: tl.constexpr, RANDOM: tl.constexpr, PADDED: tl.constexpr,
    FIRST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chooses in the last order and writes all outputs, a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tokens_of_part
    end = tl.minimum(begin + tokens_of_part, tokens)
    found_row = found + row * (1024 if RANDOM == 0 else 2048)
    valid, count, take = wanted(
        found_row, row, ratio, number, row_numbers, width_masked, second, ORDER, COUNT, RANDOM
    )
    kth, left = threshold_of_row(found_row + ORDER * 1024, take, 4)
    number_of_parts = tl.num_programs(0) * tl.num_programs(1)
    ties = parts_before(parts + number_of_parts, PARTS)
    masked_before = parts_before(parts, PARTS) + tl.minimum(ties, left)  # first ties go first
    visible_before = parts_before(parts + 2 * number_of_parts, PARTS) - masked_before
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        key, eligible = keys_of_chunk(
            values, row * values_stride, padding, row * padding_stride, mask, row * tokens, start,
            end, PADDED, RANDOM if ORDER == 1 else 0, FIRST if ORDER == 0 else False, ORDER == 1,
            BLOCK,
        )  # fmt: skip
        chosen, ties = chosen_of_chunk(key, eligible, kth, left, ties)
        if ORDER == 1 and RANDOM == 1:
            chosen |= tl.load(mask + row * tokens + token, mask=inside, other=0) != 0
        seen = inside & (chosen == 0)
        if PADDED:
            seen &= tl.load(padding + row * padding_stride + token, mask=inside, other=1) == 0
        visible_before, masked_before = store_choice(
            chosen, seen, token, visible_before, masked_before, ids_visible, ids_masked,
            ids_restore, row, end, tokens, width_visible, width_masked,
        )  # fmt: skip
        tl.debug_barrier()  # what was chosen, or goes first, is read before it is written over
        tl.store(mask + row * tokens + token, chosen.to(tl.uint8), mask=inside)
    fill_part(ids_visible + row * width_visible, valid - count, width_visible, BLOCK)
    fill_part(ids_masked + row * width_masked, count, width_masked, BLOCK)
    if tl.program_id(1) == 0:
        tl.store(num_visible + row, valid - count)
        tl.store(num_masked + row, count)


@triton.jit
def fill_part(ids, begin, width, BLOCK: tl.constexpr):
    """Stores -1 behind a row's own number of ids, a block of each so many in turn."""
    first = begin + tl.program_id(1) * BLOCK
    for start in range(first, width, tl.num_programs(1) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(ids + place, tl.full([BLOCK], -1, tl.int64), mask=place < width)


def takes(scores: Tensor, tokens: int) -> bool:
    """Returns whether these rows are few and long."""
    chosen = setting("select_tokens.few", scores.device)
    return 0 < scores.shape[0] < chosen["rows"] and tokens >= chosen["tokens"]


def launch(
    orders: tuple[tuple[Tensor, int], ...],  # (B, N) scores, and noise for a random share; strides
    common: dict[str, Tensor | int],  # arguments of all kernels, as they name them
    outputs: dict[str, Tensor],  # the fields of TokenSelection but the mask
) -> None:
    """Writes the outputs and the mask, whose bytes say what goes first for FIRST."""
    scores, tokens = orders[0][0], common["tokens"]
    chosen = setting("select_tokens.few", scores.device)
    block, batch = chosen["block"], scores.shape[0]
    parts = max(chosen["programs"] // batch, 1)
    tokens_of_part = triton.cdiv(triton.cdiv(tokens, parts), block) * block
    parts = triton.cdiv(tokens, tokens_of_part)
    most = max(turns.SCRATCH // (4 * (1024 * len(orders) + 3 * parts)), 1)  # rows at a time
    digits = scores.new_empty((min(most, batch), len(orders), 4, 256), dtype=torch.int32)
    of_parts = {
        "parts": scores.new_empty((3, min(most, batch), parts), dtype=torch.int32),
        "PARTS": triton.next_power_of_2(parts),
    }
    for start in range(0, batch, most):
        rows = slice(start, start + most)
        grid = (min(most, batch - start), parts)
        digits.zero_()
        of_rows = {
            **common,
            **{name: common[name][rows] for name in ("padding", "row_numbers", "mask")},
            "found": digits,
            "tokens_of_part": tokens_of_part,
            "BLOCK": block,
            **options(chosen["num_warps"], fused=False),
        }
        for order, (values, stride) in enumerate(orders):
            of_order = {**of_rows, "values": values[rows], "values_stride": stride}
            for step in range(4):
                count_digits_kernel[grid](**of_order, step=step, ORDER=order)
            count_parts_kernel[grid](**of_order, parts=of_parts["parts"], ORDER=order)
            if order + 1 < len(orders):
                mark_chosen_kernel[grid](**of_order, **of_parts)
        write_parts_kernel[grid](
            **of_order,
            **of_parts,
            **{name: x[rows] for name, x in outputs.items()},
            width_visible=outputs["ids_visible"].shape[1],
            ORDER=len(orders) - 1,
        )
