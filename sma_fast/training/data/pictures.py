"""Pixels as tokens: for pictures."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.numbers import Moments, floats, is_list
from sma_fast.training.data.rows import Rows, batches

MODES = {1: "L", 3: "RGB"}  # of PIL, by channels
RESIZE = ("nearest", "box", "bilinear", "bicubic", "lanczos")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than 8 bits, cut by a conversion


class Pictures:
    """Encodes each pixel as a token of its channels, row by row, standardised.

    Args:
        column: with pictures: as `load` gives them, or lists of H * W * channels values.
        size: (H, W) of all pictures.
        channels: 1 (grey) or 3 (RGB); pictures of other modes are converted.
        resize: filter that brings pictures to `size`: nearest, box, bilinear, bicubic or lanczos.
            Default: pictures of another size are refused.
        mean: (channels,) what is subtracted, in the pixels' units (0 to 255 in picture files).
        std: (channels,) what is divided by, after that.
    """

    input_type = "continuous"

    def __init__(
        self,
        column: str,
        size: tuple[int, int],
        channels: int,
        resize: str | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if channels not in MODES:
            raise DataError(f"channels: got {channels}, allowed is 1 or 3")
        if resize not in (None, *RESIZE):
            raise DataError(f"resize: got {resize!r}, allowed is None, {', '.join(RESIZE)}")
        if len(size) != 2 or min(size) < 1:
            raise DataError(f"size: got {size}, allowed is (height, width), at least 1 each")
        self.column, self.channels, self.resize = column, channels, resize
        self.size = (int(size[0]), int(size[1]))
        self.mean, self.std = np.asarray(mean, np.float64), np.asarray(std, np.float64)

    @classmethod
    def fit(
        cls,
        dataset: datasets.Dataset,
        column: str = "image",
        *,
        size: tuple[int, int] | None = None,
        channels: int = 3,
        resize: str | None = None,
    ) -> "Pictures":
        """Returns the encoding with mean and standard deviation of a data set, in one pass.

        Args:
            dataset: the train part only.
            column: with pictures.
            size: (H, W). Default: that of the first picture, where nothing is resized.
            channels: 1 (grey) or 3 (RGB).
            resize: filter, as for the class; needs `size`.

        Returns:
            Pictures.

        Raises:
            DataError: naming a picture that is broken or of another size.
        """
        if size is None and resize is not None:
            raise DataError(f"size: got None with resize={resize!r}, allowed is (height, width)")
        found, moments = None, Moments()
        for rows in batches(dataset, [column], 256):
            if found is None:
                found = cls(column, size or _first_size(rows, column), channels, resize, [0], [1])
            moments.add(found._pixels(rows).reshape(-1, channels).astype(np.float64))
        if found is None:
            raise DataError("dataset: got no pictures, allowed is at least 1")
        return cls(column, found.size, channels, resize, *moments.result())

    @property
    def columns(self) -> list[str]:
        """Names of the columns that `encode` reads."""
        return [self.column]

    @property
    def max_length(self) -> int:
        """N = H * W, the number of tokens of every picture."""
        return self.size[0] * self.size[1]

    def encode(self, batch: Rows | pa.Table | Mapping[str, Sequence]) -> dict[str, np.ndarray]:
        """Returns standardised pixels.

        Args:
            batch: B rows.

        Returns:
            {"inputs": (B, H * W, channels) float32}.

        Raises:
            DataError: naming a picture that is broken or of another size.
        """
        pixels = self._pixels(Rows.of(batch)).astype(np.float32)
        return {"inputs": (pixels - self.mean.astype(np.float32)) / self.std.astype(np.float32)}

    def _pixels(self, rows: Rows) -> np.ndarray:
        array = rows.column(self.column)
        shape = (len(rows), self.max_length, self.channels)
        if is_list(array.type):
            values = floats(rows, self.column)
            if len(rows) and values.shape[1] != self.max_length * self.channels:
                raise DataError(
                    f"{rows.place(0)}, column {self.column!r}: got {values.shape[1]} values, "
                    f"allowed is {self.size[0]} * {self.size[1]} * {self.channels}; "
                    "give size and channels of these pictures"
                )
            return values.reshape(shape)
        pixels = np.empty(shape, np.uint8)
        for row, (data, path) in enumerate(_files(rows, self.column)):
            place = path or rows.place(row)
            picture = _open(data, path, place)
            pixels[row] = self._fitted(picture, place).reshape(shape[1:])
        return pixels

    def _fitted(self, picture: Image.Image, place: str) -> np.ndarray:
        height, width = self.size
        if picture.mode in _DEEP:
            raise DataError(
                f"{place}: got a picture of mode {picture.mode}, allowed are 8 bits a channel; "
                "convert it"
            )
        picture = picture.convert(MODES[self.channels])
        if picture.size != (width, height):
            if self.resize is None:
                raise DataError(
                    f"{place}: got a picture of {picture.height} x {picture.width} pixels, allowed "
                    f"is {height} x {width}; give resize (--resize bilinear) to bring all to this "
                    "size"
                )
            picture = picture.resize((width, height), Image.Resampling[self.resize.upper()])
        return np.asarray(picture)

    def state(self) -> dict[str, Any]:
        """Returns the arguments as JSON, for `from_state`."""
        return {
            "kind": "Pictures",
            "column": self.column,
            "size": list(self.size),
            "channels": self.channels,
            "resize": self.resize,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Pictures":
        """Returns the encoding that gave `state`."""
        names = ("column", "size", "channels", "resize", "mean", "std")
        return cls(*(state[name] for name in names))


def damaged(dataset: datasets.Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    """Returns which pictures cannot be read, and a message for each of these.

    Args:
        dataset: as `load` returns it.
        column: with pictures.

    Returns:
        (len(dataset),) bool, and the messages.
    """
    found, messages = np.zeros(len(dataset), bool), []
    begin = 0
    for rows in batches(dataset, [column], 256):
        if is_list(rows.column(column).type):
            break  # of pixels
        for row, (data, path) in enumerate(_files(rows, column)):
            try:
                _open(data, path, path or rows.place(row))
            except DataError as error:
                found[begin + row] = True
                messages.append(str(error))
        begin += len(rows)
    return found, messages


def _first_size(rows: Rows, column: str) -> tuple[int, int]:
    if is_list(rows.column(column).type):
        raise DataError(
            f"size: got None for column {column!r}, which holds lists, allowed is (height, width)"
        )
    data, path = next(_files(rows, column))
    picture = _open(data, path, path or rows.place(0))
    return picture.height, picture.width


def _files(rows: Rows, column: str):
    array = rows.column(column)
    if pa.types.is_struct(array.type):
        for cell in array:
            cell = cell.as_py() or {}
            yield cell.get("bytes"), cell.get("path")
    elif pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        for cell in array:
            yield cell.as_py(), None
    else:
        raise DataError(
            f"{rows.source() or 'batch'}: got column {column!r} of {array.type}, allowed are "
            "pictures or lists of pixels; choose another column"
        )


def _open(data: bytes | None, path: str | None, place: str) -> Image.Image:
    try:
        if data is None and path is None:
            raise OSError("there is none")
        if data == b"":
            raise OSError("no bytes, or damaged ones in a zip file")
        with Image.open(path if data is None else io.BytesIO(data)) as picture:
            picture.load()
            return picture
    except Exception as error:  # each of PIL's formats raises its own
        unknown = isinstance(error, UnidentifiedImageError)  # PIL names an object in memory
        reason = "no format that is known" if unknown else error
        raise DataError(
            f"{place}: got no whole picture ({reason}); replace the file or take it out, or "
            "leave such pictures out with --skip-damaged"
        ) from error
