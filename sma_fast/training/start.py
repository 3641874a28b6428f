"""Where a run begins: from nothing, or from the newest whole checkpoint of the same run."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sma_fast.training import checkpoints
from sma_fast.training.inputs import RunError
from sma_fast.training.options import DataOptions, TrainOptions
from sma_fast.training.pretrained import RUN


def starting_point(options: TrainOptions, data: DataOptions, what: str) -> Path | None:
    """Returns the checkpoint to go on from, None for the start; writes run.json there.

    Args:
        options, data: what is asked for.
        what: the command, for run.json.

    Raises:
        RunError: where the folder holds another run, or nothing to go on from.
    """
    asked = json.dumps(
        {"what": what, "options": _plain(options), "data": _plain(data)}, default=str, indent=1
    )
    file = options.out / RUN
    finished = checkpoints.complete_ones(options.out)
    if not options.resume and (finished or (options.out / checkpoints.COMPLETE).is_file()):
        raise RunError(
            f"{options.out}: holds checkpoints of an earlier run: add --resume to go on with it, "
            "or name another folder with --out"
        )
    if options.resume and finished:
        now = json.loads(asked)
        before = _read_run(file)
        if before != now:
            raise RunError(
                f"{file}: the run was started with other options: "
                f"{', '.join(_differences(before, now))}: give the same ones, or another --out"
            )
        start = checkpoints.newest(options.out)
        say(f"going on from {start}")
        return start
    if options.resume and (options.out / checkpoints.COMPLETE).is_file():
        raise RunError(
            f"{options.out}: holds a finished model and no checkpoint to go on from: name another "
            "folder with --out"
        )
    if options.resume:
        say(f"{options.out}: holds no finished checkpoint: starting from the beginning")
    if _first_process():
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            checkpoints.write_whole(file, asked)
        except OSError as error:
            raise RunError(
                f"{file}: cannot be written ({error.strerror or error}): make room on that disk, "
                "or name another folder with --out"
            ) from error
    return None


def _first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str) -> None:
    """Prints a line on stderr, from the first of several processes."""
    if _first_process():
        print(f"sma-fast: {text}", file=sys.stderr)


def _read_run(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file}: cannot be read ({error}), so nothing says how the run was started: name "
            "another folder with --out"
        ) from None


def _plain(options: TrainOptions | DataOptions) -> dict[str, Any]:
    fields = dataclasses.asdict(options)
    for name in (
        "resume",
        "progress_bar",
        "workers",
        "tensorboard",
        "cache",
        "out",
        "keep_checkpoints",
    ):
        fields.pop(name, None)  # a resumed run may differ in these
    return fields


def _differences(before: Mapping, now: Mapping, prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*before, *now}):
        was, is_now = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(is_now, dict):
            found += _differences(was, is_now, f"{prefix}{name}.")
        elif was != is_now:
            found.append(f"{prefix}{name} was {was!r}")
    return found
