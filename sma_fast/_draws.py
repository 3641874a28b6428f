"""Where random numbers come from: torch's generators, or each row's own seed.

With a generator a row's numbers depend on the rows beside it, so a batch that is cut in two draws
other masks. Inside `by_row` they depend on the row's seed alone, on any device.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# splitmix64, whose constants are written here as int64: multiplications wrap around
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_BITS = 24  # of a float32 in [0, 1), as torch draws them


class _Rows:
    # the seeds of a batch's rows, and how often they were used
    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds
        self.used = 0


_rows: _Rows | None = None


@contextlib.contextmanager
def by_row(seeds: Tensor) -> Iterator[None]:
    """Draws inside are each row's own, where no generator is given.

    The first draw inside, the second, and so on, differ from one another.

    Args:
        seeds: (B,) int64, on the device of the draws.
    """
    global _rows
    before, _rows = _rows, _Rows(seeds)
    try:
        yield
    finally:
        _rows = before


def rand(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device | None
) -> Tensor:
    """Returns float32 of `shape`, uniform in [0, 1).

    Args:
        shape: (B, N).
        generator: Default: torch's global one, or the rows' seeds inside `by_row`.
        device: of the result.
    """
    if generator is not None:
        return torch.rand(tuple(shape), generator=generator, dtype=torch.float32, device=device)
    if _rows is None:  # the overload that takes a generator refuses symbolic sizes
        return torch.rand(*shape, dtype=torch.float32, device=device)
    return _bits(shape).float() * 2.0**-_BITS


def randint(
    high: int, shape: Sequence[int], generator: torch.Generator | None, device: torch.device | None
) -> Tensor:
    """Returns int64 of `shape`, uniform in [0, `high`).

    Args:
        high: at most 2^24, and far below it, or the smallest numbers come up too often.
        shape: (B, R).
        generator: Default: torch's global one, or the rows' seeds inside `by_row`.
        device: of the result.
    """
    if generator is not None:
        return torch.randint(high, shape, generator=generator, device=device)
    if _rows is None:
        return torch.randint(high, shape, device=device)
    return _bits(shape) * high >> _BITS


def _bits(shape: Sequence[int]) -> Tensor:
    # (B, N) int64 in [0, 2^24): splitmix64 of the row's seed, the number of the draw, the column
    batch, width = shape
    if len(_rows.seeds) != batch:
        raise ValueError(f"seeds: got {len(_rows.seeds)}, allowed is {batch}, one for each row")
    _rows.used += 1
    column = torch.arange(1, width + 1, device=_rows.seeds.device) + (_rows.used << 32)
    x = _mixed(_mixed(_rows.seeds).unsqueeze(1) + column * _STEP)
    return _shifted(x, 64 - _BITS)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return x >> by & (1 << 64 - by) - 1  # of int64, with zeros moving in
