"""Which checkpoint folders may be trusted: those whose last file says what all others should be.

A checkpoint is a folder `checkpoint-STEP` of transformers.Trainer. When everything else in it is
written, `complete.json` is, under another name first: it lists each file with its size and CRC. A
process that is killed, or a full disk, leaves a folder without it, and that folder is passed over.
"""

import json
import os
import re
import zlib
from pathlib import Path

COMPLETE = "complete.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be used; the message names it and says what to do."""


def mark_complete(folder: Path) -> None:
    """Writes what the files of `folder` are, so that `check` can tell whether they still are.

    Folders in it, such as checkpoints of a run, are not looked into.
    """
    files = {
        path.name: [path.stat().st_size, _crc(path)]
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != COMPLETE
    }
    beside = folder / f".{COMPLETE}"
    with beside.open("w") as file:
        json.dump(files, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / COMPLETE)


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
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match and (path / COMPLETE).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


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


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
