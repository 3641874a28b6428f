"""A table of patch scores, one row a picture, in a file that is mapped into memory."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_WHOLE = (0.0, 0.0, 1.0, 1.0, 0.0)  # a picture as it is


class ScoreTable:
    """Keeps scores of pictures' patches from epoch to epoch, whatever is cut out of the pictures.

    A view is (left, top, right, bottom, flipped): the part of the picture that is seen, as shares
    of its width and height, and whether it was mirrored, 1 or 0. Scores that were made of one view
    are read for another between the patches' centres, bilinearly; outside the first view they are
    those of its edge.

    Args:
        file: made where it is not there, of 2 N + 24 bytes a picture; else opened.
        pictures: how many.
        patches: N, a square number.

    Raises:
        ValueError: where the file is of other pictures, or N no square number.
    """

    def __init__(self, file: str | Path, pictures: int, patches: int) -> None:
        self.side = round(patches**0.5)
        if self.side**2 != patches:
            raise ValueError(f"patches: got {patches}, allowed is a square number")
        row = np.dtype([("epoch", "<i4"), ("view", "<f4", 5), ("scores", "<f2", patches)])
        file = Path(file)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            self._rows = np.memmap(file, row, "w+", shape=(pictures,))
            self._rows["epoch"] = np.iinfo(np.int32).min  # never
        elif file.stat().st_size != pictures * row.itemsize:
            raise ValueError(
                f"table: got {file} of {file.stat().st_size} bytes, allowed is one of {pictures} "
                f"pictures of {patches} patches, {pictures * row.itemsize} bytes: name another file"
            )
        else:
            self._rows = np.memmap(file, row, "r+", shape=(pictures,))

    def read(self, index: Tensor, since: int, view: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns scores as seen in a view, and which of them are of epoch `since` or later.

        Args:
            index: (B,) int64.
            since: an epoch.
            view: (B, 5) floats. Default: the whole pictures.

        Returns:
            (B, N) float32, 0 where there are none, and (B,) bool, both on the CPU.
        """
        rows = self._rows[self._checked(index)]
        fresh = torch.from_numpy(rows["epoch"] >= since)
        scores = torch.from_numpy(rows["scores"].astype(np.float32))
        scores = torch.where(fresh[:, None], scores, 0.0)
        made = torch.from_numpy(rows["view"].copy())
        return self._seen(scores, made, self._views(view, len(scores))), fresh

    def write(self, index: Tensor, epoch: int, scores: Tensor, view: Tensor | None = None) -> None:
        """Keeps scores.

        Args:
            index: (B,) int64.
            epoch: that they are of.
            scores: (B, N) floats.
            view: (B, 5) floats, in which they were made. Default: the whole pictures.
        """
        at = self._checked(index)
        self._rows["scores"][at] = scores.detach().cpu().numpy()
        self._rows["view"][at] = self._views(view, len(at)).numpy()
        self._rows["epoch"][at] = epoch

    def _checked(self, index: Tensor) -> np.ndarray:
        at = index.cpu().numpy()
        if at.size and not (0 <= at.min() and at.max() < len(self._rows)):
            raise ValueError(
                f"index: holds {at.min()} to {at.max()}, allowed is 0 to {len(self._rows) - 1}"
            )
        return at

    @staticmethod
    def _views(view: Tensor | None, batch: int) -> Tensor:
        if view is None:
            return torch.tensor([_WHOLE]).expand(batch, 5)
        return view.detach().float().cpu()

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
