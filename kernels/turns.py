"""Scratch memory of a fixed size: what does not fit is done in turns, in one order.

A sample's turns are the same whatever the batch: so are the bits of its sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import options, setting

SCRATCH = 1 << 20  # bytes that an op takes beside its inputs and outputs, at most
_GRID = 65535  # programs along an axis of a grid that is not its first


class Turn(NamedTuple):
    """The first of what one turn looks at, and how many."""

    sample: int
    samples: int
    head: int
    heads: int
    row: int
    rows: int


def turns(batch: int, heads: int, rows: int, room: int, samples: int | None = None) -> list[Turn]:
    """Returns turns of at most `room` rows in all, and of at most `samples` samples.

    Several samples go together only with all heads, several heads only with all rows.
    """
    rows_each = max(min(rows, room), 1)
    heads_each = max(min(heads, room // rows_each), 1)
    samples_each = room // (rows_each * heads_each) if heads_each == heads else 1
    samples_each = max(min(samples_each, batch, samples or batch, _GRID), 1)
    return [
        Turn(
            *(sample, min(samples_each, batch - sample)),
            *(head, min(heads_each, heads - head)),
            *(row, min(rows_each, rows - row)),
        )
        for sample in range(0, batch, samples_each)
        for head in range(0, heads, heads_each)
        for row in range(0, rows, rows_each)
    ]


def samples_apart(scores: Tensor, heads: int, programs: int, size: int, room: int) -> int:
    """Returns how many samples at a time have their heads summed apart; 0: in one program each.

    Args:
        scores: (B, N), or (B, H, N) of heads that nobody adds up.
        programs: that would start otherwise.
        size: bytes of a sum.
        room: bytes for the sums of heads.
    """
    fills = setting("sum_heads", scores.device)["programs"]
    if scores.dim() == 3 or heads == 1 or 2 * programs > fills:
        return 0
    return room // (size * heads * scores.shape[-1])


@triton.jit(do_not_specialize=["number", "adds"])
def sum_heads_kernel(parts, out, number, tokens, adds, factor, BLOCK: tl.constexpr):
    """Adds up the (B, H, N) sums of heads, in their order, to what is in out (B, N) for `adds`."""
    sample = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    total = tl.load(out + sample * tokens + token, mask=inside & (adds + token * 0 != 0), other=0.0)
    total = total.to(parts.dtype.element_ty)
    for head in range(0, number):
        part = parts + (sample * number + head) * tokens
        total += tl.load(part + token, mask=inside, other=0.0)
    tl.store(out + sample * tokens + token, (total * factor).to(tl.float32), mask=inside)


def sum_heads(parts: Tensor, out: Tensor, adds: bool, factor: float) -> None:
    """Writes `factor` times the sum of (B, H, N) over H, and of (B, N) `out` for `adds`, to it."""
    batch, number, tokens = parts.shape
    chosen = setting("sum_heads", out.device)
    sum_heads_kernel[(batch, triton.cdiv(tokens, chosen["block"]))](
        *(parts, out, number, tokens, int(adds), factor),
        BLOCK=chosen["block"],
        **options(chosen["num_warps"]),
    )


class Sums:
    """Where turns leave their column sums: in scores, or those of each head apart, then added up.

    Args:
        scores: (B, N), or (B, H, N) of heads that nobody adds up.
        every: turns, in their order.
        apart: whether heads that are added up have sums of their own first.
        factor: of the whole sum.
        dtype: of the sums of heads.
    """

    def __init__(
        self, scores: Tensor, every: list[Turn], apart: bool, factor: float, dtype: torch.dtype
    ) -> None:
        self.scores, self.last, self.factor = scores, every[-1], factor
        self.alone = apart or scores.dim() == 3  # whether heads have programs of their own
        self.parts = None
        if apart:
            largest = every[0]
            number = largest.samples * largest.heads * scores.shape[-1]
            self.parts = scores.new_empty(number, dtype=dtype)

    def programs(self, turn: Turn) -> int:
        """Returns how many programs a turn's kernel has along its heads."""
        return turn.heads if self.alone else 1

    def place(self, turn: Turn) -> dict[str, Tensor | int | float]:
        """Returns where a turn's kernel writes its sums, as the kernels name these arguments."""
        if self.parts is not None:
            out, factor = self._parts(turn), 1.0
        else:
            out, factor = self._out(turn), self._own_factor(turn)
            out = out[:, turn.head :] if self.alone else out
        apart = int(self.alone)
        return {"out": out, "heads_apart": apart, "out_stride": out.stride(0), "factor": factor}

    def adds(self, turn: Turn) -> int:
        """Returns whether a turn's kernel adds to what is there, as 1 or 0."""
        return int(self.parts is None and self._begun(turn))

    def add_up(self, turn: Turn) -> None:
        """Adds up a turn's sums of heads, where they are apart, in their order."""
        if self.parts is not None:
            sum_heads(self._parts(turn), self._out(turn), self._begun(turn), self._own_factor(turn))

    def _out(self, turn: Turn) -> Tensor:
        return self.scores[turn.sample : turn.sample + turn.samples]

    def _parts(self, turn: Turn) -> Tensor:
        tokens = self.scores.shape[-1]
        return self.parts[: turn.samples * turn.heads * tokens].view(turn.samples, -1, tokens)

    def _begun(self, turn: Turn) -> bool:
        return turn.row > 0 or (turn.head > 0 and self.scores.dim() == 2)

    def _own_factor(self, turn: Turn) -> float:
        ended = (turn.head, turn.row) == (self.last.head, self.last.row)
        return self.factor if ended else 1.0
