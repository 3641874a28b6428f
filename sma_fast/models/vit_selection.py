"""Masks that come from outside, as the model of pictures takes them: checked, and how they lie."""

import torch
from torch import Tensor

from sma_fast import _check, ops
from sma_fast.masking.sma import given_selection


def given(mask: Tensor | ops.TokenSelection, patches: Tensor) -> ops.TokenSelection:
    """Returns the selection that `mask` is or belongs to.

    Args:
        mask: (B, N) bool, True = masked, or a selection without padding.
        patches: (B, N, patch channels), that it belongs to.

    Returns:
        TokenSelection; of a bool mask as wide as the fullest row needs, where its numbers can be
        read.

    Raises:
        TypeError, ValueError: naming `mask`; rows that mask nothing or everything are found where
            their numbers are read: of a selection on the CPU only, in a compiled graph never.
    """
    batch, count = patches.shape[:2]
    selection = mask if isinstance(mask, ops.TokenSelection) else None
    known = mask if selection is None else selection.mask
    _check.tensor("mask", known, 2, "(B, N) or a TokenSelection", (torch.bool,))
    if known.shape != (batch, count):
        raise ValueError(f"mask: got shape {tuple(known.shape)}, allowed is ({batch}, {count})")
    _check.device("mask", known, patches)
    if torch.compiler.is_compiling():
        return given_selection(known) if selection is None else selection
    if selection is None:
        number = known.sum(dim=1)  # (B,)
        least, most = _bounds(number)
        _check_numbers(least, most, count)
        if least == most:
            return ops.select_tokens(known.float(), num_masked=most)
        selection = ops.select_tokens(known.float(), num_masked=number, max_masked=most)
        return selection._replace(ids_visible=selection.ids_visible[:, : count - least])._replace(
            ids_restore=_moved(selection, count - least)
        )
    if batch and known.device.type == "cpu":
        _check_numbers(*_bounds(selection.num_masked), count)
        if bool((selection.ids_restore < 0).any()):
            raise ValueError("mask: got a selection with padding, allowed is one without")
    return selection


def attend(selection: ops.TokenSelection) -> Tensor | None:
    """Returns which of the class token and the rows of ids_visible exist, or None for all.

    Args:
        selection: without padding.

    Returns:
        (B, 1 + V) bool, or None where the widths say that every row is full.
    """
    count = selection.mask.shape[1]
    if selection.ids_visible.shape[1] + selection.ids_masked.shape[1] == count:
        return None
    return torch.nn.functional.pad(selection.ids_visible >= 0, (1, 0), value=True)


def checked_noise(noise: Tensor, patches: Tensor) -> Tensor:
    """Returns `noise` on the device of `patches`; raises naming it where it is not (B, N) floats.

    Args:
        noise: (B, N).
        patches: (B, N, patch channels).
    """
    batch, count = patches.shape[:2]
    _check.tensor("noise", noise, 2, "(B, N)", _check.FLOATS)
    if noise.shape != (batch, count):
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, allowed is ({batch}, {count})")
    return noise.to(patches.device)


def _moved(selection: ops.TokenSelection, width: int) -> Tensor:
    # ids_restore where ids_visible becomes `width` wide
    less = selection.ids_visible.shape[1] - width
    return torch.where(selection.mask, selection.ids_restore - less, selection.ids_restore)


def _bounds(number: Tensor) -> tuple[int, int]:
    if not number.numel():
        return 1, 1
    least, most = torch.stack(number.aminmax()).tolist()  # one wait for a GPU
    return least, most


def _check_numbers(least: int, most: int, count: int) -> None:
    if least < 1 or most >= count:
        wrong = least if least < 1 else most
        raise ValueError(
            f"mask: got a row with {wrong} of {count} patches masked, allowed is 1 to {count - 1}"
        )
