"""The sma-fast command: `sma-fast demo`, `sma-fast info`."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sma_fast
from sma_fast import _dispatch

_DEMO_NEEDS = ("transformers", "accelerate", "sklearn", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code.

    Args:
        arguments: of the command line. Default: sys.argv.

    Returns:
        0, or 1 with a message where the command failed. Bad options exit with 2.
    """
    parser = argparse.ArgumentParser(
        prog="sma-fast", description="Self-guided masking for masked autoencoders."
    )
    parser.add_argument("--version", action="version", version=sma_fast.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="mask, pretrain and probe on scikit-learn's digits",
        description="Masks real pictures with every backend of this machine, pretrains a small "
        "model with guided and with random masks, and probes what their features know.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="folder for masks.png, curves.png and results.json (default: %(default)s)",
    )
    demo.add_argument(
        "--seeds",
        type=_positive,
        default=3,
        metavar="N",
        help="pretraining runs of each kind (default: %(default)s)",
    )
    demo.add_argument(
        "--steps",
        type=_positive,
        default=None,
        metavar="N",
        help="optimiser steps of each run (default: as many as take a few minutes)",
    )
    commands.add_parser("info", help="versions, build, and which code answers each op")

    options = parser.parse_args(arguments)
    if options.command == "info":
        print(_info())
        return 0
    return _demo(demo, options)


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from sma_fast.training.extras import MissingExtra, require

    reason = _not_writable(options.out)
    if reason:
        parser.error(f"argument --out: cannot write to {options.out}: {reason}")
    try:
        require(*_DEMO_NEEDS)
    except MissingExtra as error:
        return _fail(error)

    from sma_fast.training import demo, demo_backends

    try:
        demo.run(options.out, seeds=options.seeds, steps=options.steps or demo.STEPS)
    except demo_backends.BackendMismatch as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    print(f"sma-fast: error: {error}", file=sys.stderr)
    return 1


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a whole number of at least 1")
    return number


def _not_writable(folder: Path) -> str | None:
    # makes the folder and tries it, before minutes of work go to a place that takes nothing
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _info() -> str:
    lines = [_dispatch.config_text(), ""]
    for op, devices in sma_fast.backends().items():
        for device, states in devices.items():
            lines.append(f"{op} on {device}")
            lines += [f"    {backend:<10} {state}" for backend, state in states.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
