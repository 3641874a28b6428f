"""gather_tokens_backward in Triton: every token looks up the one row that was gathered from it.

What was gathered where is noted in the output itself, whose rows are not yet written (where they
hold no multiple of 8 bytes, in scratch memory, by turns): for each row 8 bytes that count its ids
and add up their places. Where one was counted the sum is its place. The rare token of several ids
raises a flag of its block of rows, and is summed up behind the others, in the order of its ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import turns
from .launching import copied, options, setting

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ONE = 1 << 32  # an id counted; a place stays below


@triton.jit
def clear_kernel(notes, flags, rows, number_flags, note_stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(notes + at * note_stride, tl.zeros([BLOCK], tl.int64), mask=at < rows)
    tl.store(flags + at, tl.zeros([BLOCK], tl.int8), mask=at < number_flags)


@triton.jit
def note_kernel(
    ids,  # (B, V)
    notes,  # (B, N) int64, one a row of the output
    flags,  # (F,) int8, F a power of 2: block i of rows has flag i modulo F
    last_flag,  # F - 1
    width,  # V
    tokens,  # N
    offset,  # of the ids that count: those in [offset, offset + N)
    blocks,  # of a sample's rows
    note_stride,
    ONE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + sample * width + place, mask=place < width, other=-1) - offset
    inside = (token >= 0) & (token < tokens)
    note = notes + (sample * tokens + token) * note_stride
    before = tl.atomic_add(note, ONE + place.to(tl.int64), mask=inside, sem="relaxed")
    block = sample * blocks + token // BLOCK_ROWS
    one = tl.full([BLOCK], 1, tl.int8)
    tl.store(flags + (block & last_flag), one, mask=inside & (before >= ONE))


@triton.jit
def gather_tokens_backward_kernel(
    grad,  # (B, V, C)
    notes,  # (B, N) int64, perhaps in out
    out,  # (B, N, C), contiguous
    tokens,  # N
    width,  # C
    note_stride,
    batch_stride,
    row_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = token < tokens
    row = sample * tokens + token
    note = tl.load(notes + row * note_stride, mask=live, other=0)
    tl.debug_barrier()  # all of the program's notes are read before one of its rows is written
    once = (note >> 32).to(tl.int32) == 1
    from_row = grad + sample * batch_stride + note.to(tl.int32).to(tl.int64) * row_stride
    to_row = out + row * width
    for first in range(0, width, BLOCK_WIDTH):
        column = first + tl.arange(0, BLOCK_WIDTH)
        in_width = column < width
        values = tl.load(
            from_row[:, None] + column[None, :], mask=once[:, None] & in_width[None, :], other=0
        )
        tl.store(to_row[:, None] + column[None, :], values, mask=live[:, None] & in_width[None, :])


@triton.jit
def sum_several_kernel(
    grad,  # (B, V, C)
    ids,  # (B, V)
    flags,
    out,  # (B, N, C), contiguous
    number_flags,
    all_blocks,
    blocks,  # of a sample's rows
    tokens,  # N
    width_ids,  # V
    width,  # C
    offset,
    batch_stride,
    row_stride,
    SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FLAGS: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK_FLAGS + tl.arange(0, BLOCK_FLAGS)
    raised = tl.load(flags + at, mask=at < number_flags, other=0) != 0
    flag = tl.min(tl.where(raised, at, number_flags), 0)
    while flag < number_flags:
        for block in range(flag, all_blocks, number_flags):
            sample = (block // blocks).to(tl.int64)
            first_token = block % blocks * BLOCK_ROWS
            of_sample = ids + sample * width_ids
            for token in range(first_token, min(first_token + BLOCK_ROWS, tokens)):
                number = 0
                for begin in range(0, width_ids, BLOCK_IDS):
                    place = begin + tl.arange(0, BLOCK_IDS)
                    id = tl.load(of_sample + place, mask=place < width_ids, other=-1)
                    number += tl.sum((id == token + offset).to(tl.int32), 0)
                if number > 1:
                    for first in range(0, width, BLOCK_WIDTH):
                        column = first + tl.arange(0, BLOCK_WIDTH)
                        total = tl.zeros([BLOCK_WIDTH], SUM)
                        for begin in range(0, width_ids, BLOCK_IDS):
                            place = begin + tl.arange(0, BLOCK_IDS)
                            id = tl.load(of_sample + place, mask=place < width_ids, other=-1)
                            hit = id == token + offset
                            nearest = tl.min(tl.where(hit, place, width_ids), 0)
                            while nearest < width_ids:
                                row = sample * batch_stride + nearest.to(tl.int64) * row_stride
                                total += tl.load(
                                    grad + row + column, mask=column < width, other=0
                                ).to(SUM)
                                hit = hit & (place > nearest)
                                nearest = tl.min(tl.where(hit, place, width_ids), 0)
                        tl.store(
                            out + (sample * tokens + token) * width + column,
                            total.to(out.dtype.element_ty),
                            mask=column < width,
                        )
        flag = tl.min(tl.where(raised & (at > flag), at, number_flags), 0)


def launch(grad: Tensor, ids: Tensor, num_tokens: int, offset: int = 0) -> Tensor:
    """Returns (B, N, ...): row j is the sum of the (B, V, ...) rows of grad with id offset + j."""
    batch = ids.shape[0]
    out = torch.empty((batch, num_tokens) + grad.shape[2:], dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    flat = grad.flatten(2) if grad.dim() > 2 else grad.unsqueeze(2)
    if flat.shape[2] > 1 and flat.stride(2) != 1:
        flat = flat.contiguous()
    ids = ids.contiguous()
    row_bytes = flat.shape[2] * out.element_size()
    chosen = copied("gather_tokens_backward", out.device, flat.shape[2], flat.shape[2])
    blocks = batch * triton.cdiv(num_tokens, chosen["BLOCK_ROWS"])
    most_flags = min(blocks, max(turns.SCRATCH // 16, 1))
    number_flags = 1 << most_flags.bit_length() - 1
    flags = torch.empty(number_flags, dtype=torch.int8, device=out.device)
    room, notes = batch * num_tokens, None
    if row_bytes % 8:
        room = min(room, max((turns.SCRATCH - number_flags) // 8, 1))
        notes = torch.empty(room, dtype=torch.int64, device=out.device)
    for turn in turns.turns(batch, 1, num_tokens, room):
        samples = slice(turn.sample, turn.sample + turn.samples)
        part = out[samples, turn.row : turn.row + turn.rows]  # dense: whole samples, or of one
        noted = part.view(-1).view(torch.int64) if notes is None else notes
        stride = row_bytes // 8 if notes is None else 1
        _gather_back(
            flat[samples], ids[samples], part, noted, stride, flags, offset + turn.row, chosen
        )
    return out


def _gather_back(
    grad: Tensor,
    ids: Tensor,
    out: Tensor,
    notes: Tensor,
    note_stride: int,
    flags: Tensor,
    offset: int,
    chosen: dict[str, int],
) -> None:
    """Writes out (B, N, ...): row j is the sum of the rows of grad (B, V, C) of id offset + j.

    notes has an int64 for each row, `note_stride` of them apart.
    """
    batch, tokens = out.shape[:2]
    width_ids, width = ids.shape[1], grad.shape[2]
    of_notes = setting("gather_tokens_backward.notes", out.device)
    several = setting("gather_tokens_backward.several", out.device)
    block = {"BLOCK": of_notes["block"], **options(of_notes["num_warps"])}
    block_rows = chosen["BLOCK_ROWS"]
    blocks = triton.cdiv(tokens, block_rows)
    number_flags = min(flags.numel(), batch * blocks)
    strides = (grad.stride(0), grad.stride(1))
    with torch.cuda.device_of(out):
        clear_kernel[(triton.cdiv(batch * tokens, block["BLOCK"]),)](
            *(notes, flags, batch * tokens, number_flags, note_stride), **block
        )
        if width_ids:
            note_kernel[(triton.cdiv(width_ids, block["BLOCK"]), batch)](
                *(ids, notes, flags, flags.numel() - 1),
                *(width_ids, tokens, offset, blocks, note_stride),
                **{"ONE": _ONE, "BLOCK_ROWS": block_rows, **block},
            )
        gather_tokens_backward_kernel[(blocks, batch)](
            *(grad, notes, out, tokens, width, note_stride, *strides), **chosen
        )
        if width_ids > 1:
            sum_several_kernel[(triton.cdiv(number_flags, several["flags"]),)](
                *(grad, ids, flags, out, number_flags, batch * blocks, blocks),
                *(tokens, width_ids, width, offset, *strides),
                SUM=tl.float64 if out.dtype == torch.float64 else tl.float32,
                BLOCK_ROWS=block_rows,
                BLOCK_FLAGS=several["flags"],
                BLOCK_IDS=several["ids"],
                BLOCK_WIDTH=several["width"],
                **options(several["num_warps"], all_registers=True),
            )
