"""Which checkpoint folders may be trusted: those whose last file says what all others should be.

A checkpoint is a folder `checkpoint-STEP` of transformers.Trainer. When everything else in it is
written, `complete.json` is, under another name first: it lists each file with its size and CRC. A
process that is killed, or a full disk, leaves a folder without it, and that folder is passed over.
"""

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

COMPLETE = "complete.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be used; the message names it and says what to do."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a failure to write into `folder`, such as a full disk, into a message.

    Raises:
        CheckpointError: naming the file and saying what to do.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        place = getattr(error, "filename", None)
        if place is None:  # the file that was written to last; clocks tick slowly: or the larger
            files = {path: path.stat() for path in folder.glob("*") if path.is_file()}
            place = max(
                files, key=lambda p: (files[p].st_mtime_ns, files[p].st_size), default=folder
            )
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CheckpointError(
            f"{place}: cannot be written ({reason}): make room on that disk, or let it be written "
            "to, then give the same command with --resume"
        ) from error


def mark_complete(folder: Path) -> None:
    """Writes what the files of `folder` are, so that `check` can tell whether they still are.

    Folders in that of a run are not looked into; those in a checkpoint's own are.
    """
    paths = folder.rglob("*") if _FOLDER.fullmatch(folder.name) else folder.iterdir()
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _crc(path)]
        for path in sorted(paths)
        if path.is_file() and path.name not in (COMPLETE, f".{COMPLETE}")
    }
    write_whole(folder / COMPLETE, json.dumps(files, indent=1))


def write_whole(file: Path, text: str) -> None:
    """Writes a file that appears under its name with all of `text`, or not at all."""
    beside = file.with_name(f".{file.name}")
    with beside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)


def remove_old(folder: Path, best_step: int | None, limit: int = 2) -> None:
    """Removes all but the newest finished checkpoints of a run, and its best one.

    Args:
        folder: of the run.
        best_step: of the checkpoint to keep in any case; None for none.
        limit: finished checkpoints to keep, at least 1.
    """
    kept = complete_ones(folder)[-limit:]
    for step, old in _numbered(folder):  # halves of earlier removals too
        if old not in kept and step != best_step:
            (old / COMPLETE).unlink(missing_ok=True)  # first: half of it is never taken for whole
            shutil.rmtree(old)


def is_whole(folder: Path) -> bool:
    """Returns whether `check` finds nothing wrong."""
    try:
        check(folder)
    except CheckpointError:
        return False
    return True


def check(folder: Path) -> None:
    """Raises CheckpointError unless every file of a complete checkpoint is as it was written.

    Raises:
        CheckpointError: naming the file, what is wrong with it, and what to do.
    """
    advice = "take an earlier checkpoint, or start again without it"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder: name a folder that training wrote")
    try:
        files = json.loads((folder / COMPLETE).read_text())
        expected = {name: tuple(entry) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {COMPLETE}, so it was never finished, or is no checkpoint: {advice}"
        ) from None
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / COMPLETE}: is damaged: {advice}") from None
    for name, (size, crc) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing: {advice}")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: has {path.stat().st_size} bytes, {size} were written: {advice}"
            )
        if _crc(path) != crc:
            raise CheckpointError(f"{path}: holds other bytes than were written: {advice}")


def complete_ones(folder: Path) -> list[Path]:
    """Returns the finished checkpoints in the folder of a run, oldest first."""
    return [path for _, path in _numbered(folder) if (path / COMPLETE).is_file()]


def newest(folder: Path) -> Path | None:
    """Returns the newest checkpoint of a run that is whole, or None where there is none.

    One that was finished but damaged since is an error, not a reason to go further back in silence.

    Raises:
        CheckpointError: where the newest finished one is damaged.
    """
    found = complete_ones(folder)
    if not found:
        return None
    check(found[-1])
    return found[-1]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
