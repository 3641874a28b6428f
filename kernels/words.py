"""Tokens as integers: what only copies them does not ask what their bits mean."""

import torch
from torch import Tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_words(*tensors: Tensor) -> list[Tensor]:
    """Returns (B, N, ...) as integers (B, N, C), rows dense: a copy does not care what they mean.

    Elements that do not come 16 bytes at a time are taken together where all these rows allow it:
    C is the number of integers, and smaller then than that of elements.
    """
    words = [_rows(x) for x in tensors]
    size = words[0].itemsize
    steps = [step for x in words for step in (x.shape[2], x.stride(0), x.stride(1))]
    begins = [x.data_ptr() | size * x.storage_offset() for x in words]
    bytes_ = [size * step for step in steps] + begins
    dense = all(x.shape[2] == 1 or x.stride(2) == 1 for x in words)  # not where there are no rows
    if dense and any(step % 16 for step in steps):
        wider = next(w for w in (8, 4, 2, 1) if w == size or not any(x % w for x in bytes_))
        words = [x.view(_WORDS[wider]) for x in words]
    return words


def _rows(x: Tensor) -> Tensor:
    if x.dtype.itemsize == 16:  # complex128
        x = torch.view_as_real(x)
    x = x.view(_WORDS[x.dtype.itemsize])
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()
