"""gather_tokens_backward in Triton: every token looks up the one row that was gathered from it.

What was gathered where is noted in the output itself, whose rows are not yet written (where they
hold no multiple of 8 bytes, in scratch memory, by turns): for each row 8 bytes that count its ids
and add up their places. Where one was counted the sum is its place; the
rare token of several ids looks for them in order. So sums have one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import turns
from .launching import copied, setting

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ONE = 1 << 40  # an id counted; places stay below


@triton.jit
def clear_kernel(notes, rows, note_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(notes + row * note_stride, tl.zeros([BLOCK], tl.int64), mask=row < rows)


@triton.jit
def note_kernel(
    ids,  # (B, V)
    notes,  # (B, N) int64, one a row of the output
    total,  # B * V
    width,  # V
    tokens,  # N
    offset,  # of the ids that count: those in [offset, offset + N)
    note_stride,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + at, mask=at < total, other=-1) - offset
    inside = (at < total) & (token >= 0) & (token < tokens)
    sample = at // width
    row = sample * tokens + token
    place = at - sample * width
    tl.atomic_add(notes + row * note_stride, ONE + place, mask=inside, sem="relaxed")


@triton.jit
def gather_tokens_backward_kernel(
    grad,  # (B, V, C)
    ids,  # (B, V)
    notes,  # (B, N) int64, perhaps in out
    out,  # (B, N, C), contiguous
    rows,  # B * N
    tokens,  # N
    width_ids,  # V
    width,  # C
    offset,
    note_stride,
    batch_stride,
    row_stride,
    SUM: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    note = tl.load(notes + row * note_stride, mask=live, other=0)
    tl.debug_barrier()  # all of the program's notes are read before one of its rows is written
    number = note // ONE
    sample = row // tokens
    once = number == 1
    several = number > 1
    any_several = tl.max(number, 0) > 1
    start = sample * batch_stride + (note - number * ONE) * row_stride
    for first in range(0, width, BLOCK_WIDTH):
        column = first + tl.arange(0, BLOCK_WIDTH)
        in_width = column < width
        values = tl.load(
            grad + start[:, None] + column[None, :],
            mask=once[:, None] & in_width[None, :],
            other=0,
        ).to(SUM)
        if any_several:
            for begin in range(0, width_ids, BLOCK_IDS):
                place = begin + tl.arange(0, BLOCK_IDS)
                asked = several[:, None] & (place < width_ids)[None, :]
                token = tl.load(
                    ids + (sample * width_ids)[:, None] + place[None, :], mask=asked, other=-1
                )
                hit = asked & (token - offset == (row % tokens)[:, None])
                first_hit = tl.min(tl.where(hit, place[None, :], width_ids), 1)
                while tl.min(first_hit, 0) < width_ids:
                    start_hit = sample * batch_stride + first_hit * row_stride
                    values += tl.load(
                        grad + start_hit[:, None] + column[None, :],
                        mask=(first_hit < width_ids)[:, None] & in_width[None, :],
                        other=0,
                    ).to(SUM)
                    hit = hit & (place[None, :] > first_hit[:, None])
                    first_hit = tl.min(tl.where(hit, place[None, :], width_ids), 1)
        tl.store(
            out + row[:, None] * width + column[None, :],
            values.to(out.dtype.element_ty),
            mask=live[:, None] & in_width[None, :],
        )


def launch(grad: Tensor, ids: Tensor, num_tokens: int, offset: int = 0) -> Tensor:
    """Returns (B, N, ...): row j is the sum of the (B, V, ...) rows of grad with id offset + j."""
    batch, width_ids = ids.shape
    out = torch.empty((batch, num_tokens) + grad.shape[2:], dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    flat = grad.flatten(2) if grad.dim() > 2 else grad.unsqueeze(2)
    if flat.shape[2] > 1 and flat.stride(2) != 1:
        flat = flat.contiguous()
    ids = ids.contiguous()
    row_bytes = flat.shape[2] * out.element_size()
    if row_bytes % 8 == 0:
        _gather_back(flat, ids, out, out.view(-1).view(torch.int64), row_bytes // 8, offset)
        return out
    notes = torch.empty(
        min(batch * num_tokens, max(turns.SCRATCH // 8, 1)), dtype=torch.int64, device=grad.device
    )
    for turn in turns.turns(batch, 1, num_tokens, notes.numel()):
        samples = slice(turn.sample, turn.sample + turn.samples)
        part = out[samples, turn.row : turn.row + turn.rows]  # dense: whole samples, or of one
        _gather_back(flat[samples], ids[samples], part, notes, 1, offset + turn.row)
    return out


def _gather_back(
    grad: Tensor, ids: Tensor, out: Tensor, notes: Tensor, note_stride: int, offset: int
) -> None:
    """Writes out (B, N, ...): row j is the sum of the rows of grad (B, V, C) of id offset + j.

    notes has an int64 for each row, `note_stride` of them apart.
    """
    batch, tokens = out.shape[:2]
    width_ids, width = ids.shape[1], grad.shape[2]
    rows, total = batch * tokens, ids.numel()
    chosen = copied("gather_tokens_backward", out.device, width, width)
    ids_at_once = setting("gather_tokens_backward", out.device, width)["ids"]
    of_notes = setting("gather_tokens_backward.notes", out.device)
    block = {"BLOCK": of_notes["block"], "num_warps": of_notes["num_warps"]}
    with torch.cuda.device_of(out):
        clear_kernel[(triton.cdiv(rows, block["BLOCK"]),)](notes, rows, note_stride, **block)
        if total:
            note_kernel[(triton.cdiv(total, block["BLOCK"]),)](
                *(ids, notes, total, width_ids, tokens, offset, note_stride), ONE=_ONE, **block
            )
        gather_tokens_backward_kernel[(triton.cdiv(rows, chosen["BLOCK_ROWS"]),)](
            *(grad, ids, notes, out, rows, tokens, width_ids, width, offset, note_stride),
            *(grad.stride(0), grad.stride(1)),
            SUM=tl.float64 if out.dtype == torch.float64 else tl.float32,
            ONE=_ONE,
            **chosen,
            BLOCK_IDS=max(ids_at_once // chosen["BLOCK_ROWS"], 16),
        )
