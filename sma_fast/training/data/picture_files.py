"""Readers of folders and zip files of pictures: where they are, their class and their split."""

import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import datasets
import pyarrow as pa

from sma_fast.training.data.errors import DataError
from sma_fast.training.data.rows import LINE
from sma_fast.training.data.text import BYTES, ROWS

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "training", "valid", "validation", "val", "dev", "test")
_IMAGE = datasets.Image().pa_type  # struct of bytes and path


def list_folder(folder: Path) -> list[tuple[str, int, int]]:
    """Returns the pictures below a folder, hidden ones left out.

    Args:
        folder: with pictures, or with folders of them.

    Returns:
        (path inside the folder, size in bytes, time of change in ns), sorted.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in inside.parts):
            state = path.stat()
            found.append((inside.as_posix(), state.st_size, state.st_mtime_ns))
    return found


def read_folder(folder: Path) -> Iterator[pa.Table]:
    """Returns column "image" with the paths of a folder's pictures, which stay where they are.

    Args:
        folder: FILES, CLASS/FILES, SPLIT/FILES or SPLIT/CLASS/FILES.

    Returns:
        Tables with "image", "label" where there are classes and "split" where there are splits.

    Raises:
        DataError: where some pictures have a class and others not.
    """
    names = [name for name, _, _ in list_folder(folder)]
    kinds = _kinds(folder, names)
    for begin in range(0, len(names), ROWS):
        part = names[begin : begin + ROWS]
        images = [{"bytes": None, "path": str(folder / name)} for name in part]
        yield _table(images, part, kinds, begin)


def read_zip(path: Path) -> Iterator[pa.Table]:
    """Returns column "image" with the bytes of a zip file's pictures, as `read_folder` otherwise.

    A picture whose bytes are damaged has none: whoever opens it finds it damaged.

    Args:
        path: a zip file with the folders inside.

    Returns:
        Tables.

    Raises:
        DataError: for a damaged zip file, and one that cannot be unpacked here.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(
                name
                for name in archive.namelist()
                if name.lower().endswith(SUFFIXES)
                and not any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(name).parts)
            )
            kinds = _kinds(path, names)
            images, begin, size = [], 0, 0
            for number, name in enumerate(names, start=1):
                images.append({"bytes": _bytes(archive, name), "path": f"{path}/{name}"})
                size += len(images[-1]["bytes"])
                if number == len(names) or size >= BYTES:
                    yield _table(images, names[begin:number], kinds, begin)
                    images, begin, size = [], number, 0
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"{path}: got no whole zip file ({error}); copy or download it again"
        ) from error
    except (RuntimeError, NotImplementedError) as error:  # a password, or a rare compression
        raise DataError(f"{path}: cannot be unpacked ({error}); unpack it into a folder") from error


def _bytes(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError):
        return b""


def _kinds(source: Path, names: Sequence[str]) -> tuple[int | None, int | None]:
    # which folder of a path is the split, and which the class
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    if not any(folders):
        return None, None
    top = 0  # folders around everything say nothing
    while all(len(f) > top + 1 and f[top] == folders[0][top] for f in folders):
        if folders[0][top].lower() in SPLITS:
            break
        top += 1
    folders = [f[top:] for f in folders]
    split = 0 if all(f and f[0].lower() in SPLITS for f in folders) else None
    depths = {len(f) for f in folders}
    if split == 0 and depths == {1}:
        return top, None
    least = 1 if split is None else 2
    for name, parts in zip(names, folders, strict=True):
        if len(parts) < least:
            raise DataError(
                f"{source}/{name}: got a picture outside of the class folders, allowed is "
                "CLASS/FILE or SPLIT/CLASS/FILE for all or none; move it"
            )
    return (None if split is None else top), -1


def _table(images: list, names: Sequence[str], kinds: tuple, begin: int) -> pa.Table:
    columns = {"image": pa.array(images, _IMAGE)}
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    for column, index in zip(("split", "label"), kinds, strict=True):
        if index is not None:
            columns[column] = pa.array([f[index] for f in folders], pa.string())
    columns[LINE] = pa.array(range(begin + 1, begin + 1 + len(images)), pa.int64())
    return pa.table(columns)
