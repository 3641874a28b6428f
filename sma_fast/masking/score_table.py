"""A table of patch scores, one row a picture, in a file that is mapped into memory."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sma_fast import _check

_WHOLE = (0.0, 0.0, 1.0, 1.0, 0.0)  # a picture as it is
_MAGIC = b"sma_fast patch scores 2\n"  # what every table's file begins with; 2 is of the rows
_HEADER = 64  # bytes, the magic among them


class ScoreTable:
    """Keeps scores of pictures' patches from epoch to epoch, whatever is cut out of the pictures.

    A view is (left, top, right, bottom, flipped): the part of the picture that is seen, as shares
    of its width and height, and whether it was mirrored, 1 or 0. Scores that were made of one view
    are read for another between the patches' centres, bilinearly; outside the first view they are
    those of its edge.

    Args:
        file: made where it is not there, of 4 N + 24 bytes a picture; else opened.
        pictures: how many, at least 1.
        patches: N, a square number.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; so for a
            file that is no table, or one of other pictures.
    """

    def __init__(self, file: str | Path, pictures: int, patches: int) -> None:
        _check.positive_count("pictures", pictures)
        _check.positive_count("patches", patches)
        self.side = round(patches**0.5)
        if self.side**2 != patches:
            raise ValueError(f"patches: got {patches}, allowed is a square number")
        # "stored": of an epoch 1 more than it, 0 where nothing was
        row = np.dtype([("stored", "<i4"), ("view", "<f4", 5), ("scores", "<f4", patches)])
        file = Path(file)
        header = _MAGIC + f"{pictures} pictures of {patches} patches\n".encode()
        size = _HEADER + pictures * row.itemsize
        if not os.path.lexists(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with part_of(file).open("wb") as stream:
                stream.write(header.ljust(_HEADER, b"\0"))
                stream.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a full disk is found now, not in training
                    os.posix_fallocate(stream.fileno(), 0, size)
            part_of(file).replace(file)
        check_table(file)
        with file.open("rb") as stream:
            found = stream.read(_HEADER).rstrip(b"\0")
        if found != header or file.stat().st_size != size:
            of = found.removeprefix(_MAGIC).decode(errors="replace").strip()
            raise ValueError(
                f"table: got {file} of {of}, {file.stat().st_size} bytes, allowed is one of "
                f"{pictures} pictures of {patches} patches, {size} bytes: name another file"
            )
        self._rows = np.memmap(file, row, "r+", offset=_HEADER, shape=(pictures,))

    def read(
        self, index: Tensor, since: int, until: int, view: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns scores as seen in a view, and which of them are of the epochs asked for.

        Args:
            index: (B,) integers.
            since, until: the first epoch that counts, and the last: later ones are of another run.
            view: (B, 5) numbers. Default: the whole pictures.

        Returns:
            (B, N) float32, 0 where there are none, and (B,) bool, both on the CPU.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        rows = self._rows[self._checked(index)]
        stored = rows["stored"]
        fresh = torch.from_numpy((stored > max(since, 0)) & (stored <= until + 1))
        scores = torch.from_numpy(rows["scores"].copy())
        scores = torch.where(fresh[:, None], scores, 0.0)
        made = torch.from_numpy(rows["view"].copy())
        return self._seen(scores, made, _views(view, len(scores))), fresh

    def write(self, index: Tensor, epoch: int, scores: Tensor, view: Tensor | None = None) -> None:
        """Keeps scores.

        Args:
            index: (B,) integers.
            epoch: that they are of, from 0.
            scores: (B, N) floats.
            view: (B, 5) numbers, in which they were made. Default: the whole pictures.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        at = self._checked(index)
        _check.count("epoch", epoch, None)
        _check.tensor("scores", scores, 2, "(B, N)", _check.FLOATS)
        if scores.shape != (len(at), self.side**2):
            raise ValueError(
                f"scores: got shape {tuple(scores.shape)}, allowed is {(len(at), self.side**2)}"
            )
        views = _views(view, len(at))
        self._rows["scores"][at] = scores.detach().float().cpu().numpy()
        self._rows["view"][at] = views.numpy()
        self._rows["stored"][at] = epoch + 1

    def _checked(self, index: Tensor) -> np.ndarray:
        _check.tensor("index", index, 1, "(B,)", _check.INTS)
        at = index.cpu().numpy()
        if at.size and not (0 <= at.min() and at.max() < len(self._rows)):
            raise ValueError(
                f"index: holds {at.min()} to {at.max()}, allowed is 0 to {len(self._rows) - 1}"
            )
        return at

    def _seen(self, scores: Tensor, made: Tensor, view: Tensor) -> Tensor:
        # (B, N) of view `made` -> (B, N) of `view`
        if torch.equal(made, view):
            return scores
        centre = (torch.arange(self.side) + 0.5) / self.side
        x, y = centre[None, None, :], centre[None, :, None]  # of a patch in its view
        at = torch.stack(torch.broadcast_tensors(*self._outside(x, y, view)), dim=3)
        left, top, right, bottom, flipped = made[:, :, None, None].unbind(1)
        x = (at[..., 0] - left) / (right - left)
        y = (at[..., 1] - top) / (bottom - top)
        x = torch.where(flipped > 0.5, 1 - x, x)
        grid = torch.stack([x, y], dim=3) * 2 - 1  # (B, side, side, 2), in [-1, 1]
        square = scores.reshape(-1, 1, self.side, self.side)
        seen = torch.nn.functional.grid_sample(
            square, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return seen.flatten(1)

    @staticmethod
    def _outside(x: Tensor, y: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        # from shares of a view to shares of the picture
        left, top, right, bottom, flipped = view[:, :, None, None].unbind(1)
        x = torch.where(flipped > 0.5, 1 - x, x)
        return left + x * (right - left), top + y * (bottom - top)


def check_table(file: Path) -> None:
    """Refuses what is there under that name and is no table of scores.

    Args:
        file: that is to be opened, written over or deleted; none there is none to refuse.

    Raises:
        ValueError: naming it and saying what to do.
    """
    if not os.path.lexists(file):
        return
    if file.is_file():
        with file.open("rb") as stream:
            if stream.read(len(_MAGIC)) == _MAGIC:
                return
    raise ValueError(
        f"table: got {file}, which is there and no table of scores, allowed is a new file or such "
        "a table: name another one, or move that away"
    )


def part_of(file: Path) -> Path:
    """Returns where a table is written, to appear under its name when it is whole."""
    return file.with_name(f".{file.name}.part")


def check_views(view: Tensor | None, batch: int) -> None:
    """Refuses views that are not those of a batch.

    Args:
        view: (B, 5) numbers, or None.
        batch: B.

    Raises:
        TypeError, ValueError: naming `view`, what was given and what is allowed.
    """
    if view is None:
        return
    _check.tensor("view", view, 2, "(B, 5)", (*_check.FLOATS, *_check.INTS))
    if view.shape != (batch, 5):
        raise ValueError(f"view: got shape {tuple(view.shape)}, allowed is {(batch, 5)}")


def _views(view: Tensor | None, batch: int) -> Tensor:
    check_views(view, batch)
    if view is None:
        return torch.tensor([_WHOLE]).expand(batch, 5)
    return view.detach().float().cpu()
