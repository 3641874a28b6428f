"""Lines of text files with their numbers, gzipped or not."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sma_fast.training.data.errors import DataError

LONGEST = 1 << 28  # bytes in a line; a file without line ends is not read into memory whole
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_BROKEN = (EOFError, zlib.error, gzip.BadGzipFile)


def open_binary(path: Path) -> BinaryIO:
    """Returns the bytes of a file as a stream, decompressed where they are gzipped.

    Args:
        path: a file; what is in it decides, not its name.

    Returns:
        Stream to read from.

    Raises:
        DataError: where the name ends in .gz and the contents are not gzipped.
    """
    with open(path, "rb") as stream:
        start = stream.read(2)
    if start == _GZIP:
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".gz" and start:
        raise DataError(
            f"{path}: got a file that begins with {start!r}, allowed behind .gz is gzip; "
            "rename the file or compress it"
        )
    return open(path, "rb")


def truncated(path: Path, where: str, error: Exception) -> DataError:
    """Returns the error to raise for a gzip file that cannot be read to its end.

    Args:
        path: the file.
        where: how far it was read, such as "after line 7".
        error: of the decompressor.

    Returns:
        DataError.
    """
    return DataError(
        f"{path}, {where}: the gzip file is truncated or damaged ({error}); "
        "copy or download it again (gzip -t tests it)"
    )


class Lines:
    """The lines of a UTF-8 file; `number` and `bytes` say how far it was read.

    Args:
        path: a text file, gzipped or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        """Returns the lines with their ends, a byte order mark left out.

        Raises:
            DataError: for a damaged gzip file, bytes that are not UTF-8, or an endless line.
        """
        with open_binary(self.path) as stream:
            while True:
                try:
                    raw = stream.readline(LONGEST)
                except _BROKEN as error:
                    raise truncated(self.path, f"after line {self.number}", error) from error
                if not raw:
                    return
                self.number += 1
                self.bytes += len(raw)
                yield self._text(raw)

    def _text(self, raw: bytes) -> str:
        if len(raw) == LONGEST:
            raise DataError(
                f"{self.place()}: got a line of {LONGEST} bytes or more, allowed is less; "
                "is it a text file?"
            )
        if self.number == 1:
            raw = raw.removeprefix(_BOM)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.place()}: got byte 0x{raw[error.start]:02x} at position "
                f"{error.start + 1}, allowed is UTF-8; convert the file (iconv -t utf-8)"
            ) from error

    def place(self, number: int | None = None) -> str:
        """Returns "file, line n" for a message.

        Args:
            number: of the line. Default: the one read last.

        Returns:
            Text.
        """
        return f"{self.path}, line {number or self.number}"


def decompress(path: Path, target: BinaryIO) -> None:
    """Writes the bytes of a file, decompressed where they are gzipped, to `target`.

    Args:
        path: the file.
        target: where they go.

    Raises:
        DataError: for a damaged gzip file.
    """
    with open_binary(path) as stream:
        try:
            while block := stream.read(1 << 20):
                target.write(block)
        except _BROKEN as error:
            raise truncated(path, f"after byte {target.tell()}", error) from error
