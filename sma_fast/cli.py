"""The sma-fast command: demo, pretrain, finetune, evaluate, show, info."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import sma_fast
from sma_fast import _dispatch

_DEMO_NEEDS = ("transformers", "accelerate", "sklearn", "matplotlib")
_MASKS = ("guided", "random", "selfmae", "attmask", "attmask-hint", "hpm")
_STAGES = 4  # of sma_fast.training.callbacks, which is not imported for a help text
_RESULT = "The folder of --out then holds the model, results.json and the last checkpoints."
_TRAIN_NEEDS = ("transformers", "accelerate", "datasets", "sklearn", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code.

    Args:
        arguments: of the command line. Default: sys.argv.

    Returns:
        0, or 1 with a message where the command failed. Bad options exit with 2. Messages are one
        line that begins with "sma-fast: error:".
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    named = any(a.partition("=")[0] == "--data" for a in arguments)
    parser = _Parser(prog="sma-fast", description="Self-guided masking for masked autoencoders.")
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

    pretrain = commands.add_parser(
        "pretrain",
        usage="%(prog)s SOURCE ... --out DIR [options]",
        help="pretrain a model on any data",
        description="Hides tokens that the model chooses itself and learns to reconstruct them. "
        "Killed at any moment, the same command with --resume goes on, to the same weights.",
        epilog=_RESULT,
    )
    _data_arguments(pretrain, named)
    _train_arguments(pretrain)
    pretrain.add_argument(
        "--model",
        dest="kind",
        choices=("sma", "mae"),
        default="sma",
        help="mae: a masked autoencoder of pictures, over patches (default: %(default)s)",
    )
    pretrain.add_argument(
        "--mask",
        choices=_MASKS,
        metavar="MASK",
        help="which tokens are hidden: guided or random; of mae selfmae, random, attmask, "
        "attmask-hint or hpm (default: the first)",
    )
    pretrain.add_argument(
        "--augment",
        choices=("flip", "crop", "none"),
        help="of pictures, of mae only; crop is MAE's, and flips too (default: flip)",
    )

    finetune = commands.add_parser(
        "finetune",
        usage="%(prog)s SOURCE ... --out DIR --label COLUMN ... --task TASK [options]",
        help="train a pretrained model, or a new one, to predict labels",
        description="Trains to predict labels; the best checkpoint is chosen on the validation "
        "part, and the test part is looked at once, at the end.",
        epilog=_RESULT,
    )
    _data_arguments(finetune, named)
    _train_arguments(finetune)
    finetune.add_argument(
        "--from",
        dest="pretrained",
        type=Path,
        metavar="DIR",
        help="a folder of sma-fast pretrain, or of save_pretrained",
    )
    finetune.add_argument(
        "--label", nargs="+", required=True, metavar="COLUMN", help="columns to predict"
    )
    finetune.add_argument(
        "--task",
        choices=("classification", "multilabel", "regression"),
        required=True,
        help="what the labels are",
    )
    finetune.add_argument(
        "--patience",
        type=_positive,
        metavar="N",
        help="stop after so many evaluations without a lower loss (default: never)",
    )

    evaluate = commands.add_parser(
        "evaluate",
        usage="%(prog)s CHECKPOINT SOURCE ... [options]",
        help="scores of a fine-tuned model, or the loss of a pretrained one",
        description="Prints the scores of a model that finetune made, or the loss of one that "
        "pretrain made, on all rows of the source; with --split-column on its test part.",
    )
    evaluate.add_argument("checkpoint", type=Path, help="a folder that sma-fast wrote")
    _data_arguments(evaluate, named)
    evaluate.add_argument("--batch-size", type=_positive, default=64, metavar="N")

    show = commands.add_parser(
        "show",
        help="draw what a pretrained model masks, and why",
        description="Draws for a few rows the attention each token receives, which tokens are "
        "masked, and what the model predicts there against the truth; for a masked autoencoder "
        "what its masks go by, the masks, and the reconstruction.",
    )
    show.add_argument("checkpoint", type=Path, help="a folder that sma-fast pretrain wrote")
    _data_arguments(show, named)
    which = show.add_mutually_exclusive_group()
    which.add_argument(
        "--rows", type=_positive, default=4, metavar="N", help="drawn at random (default: 4)"
    )
    which.add_argument("--row", type=_positive, nargs="+", metavar="I", help="these, from 1")
    show.add_argument("--seed", type=int, default=0, metavar="S", help="of rows and masks")
    show.add_argument("--out", type=Path, default=Path("masks.png"), metavar="FILE.png")
    commands.add_parser("info", help="versions, build, and which code answers each op")

    options = parser.parse_args(arguments)
    if options.command == "info":
        return _print(_info())
    if options.command == "demo":
        return _demo(demo, options)
    return _train(commands.choices[options.command], options)


class _Parser(argparse.ArgumentParser):
    # one line for an error, and no option by half of its name

    def __init__(self, **named: Any) -> None:
        super().__init__(**named, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sma-fast: error: {_line(message)}: see {self.prog} --help\n")


def _data_arguments(parser: argparse.ArgumentParser, named: bool) -> None:
    # named: the source follows --data, which may stand anywhere, instead of being positional
    data = parser.add_argument_group("data")
    what = "files, a folder or zip of pictures, or a name on the hub"
    if named:
        data.add_argument("--data", dest="source", nargs="+", required=True, help=what)
    else:
        data.add_argument("source", nargs="+", help=f"{what}; or after --data")
    data.add_argument("--validation", metavar="PATH", help="source of the validation part")
    data.add_argument("--test", metavar="PATH", help="source of the test part")
    data.add_argument("--split-column", metavar="NAME", help="says which part a row belongs to")
    data.add_argument(
        "--parts",
        nargs="+",
        type=_part,
        metavar="PART=VALUE",
        help="values of that column, e.g. valid=validation",
    )
    data.add_argument(
        "--validation-share",
        type=float,
        metavar="X",
        help="of the train part, where there is no validation part (default: 0.05)",
    )
    data.add_argument(
        "--test-share", type=float, metavar="X", help="of all rows, cut off first (default: none)"
    )
    data.add_argument(
        "--split-seed", type=int, default=0, metavar="N", help="of that cut (default: %(default)s)"
    )
    data.add_argument("--format", help="instead of the one that the extension names")
    data.add_argument("--columns", nargs="+", metavar="NAME", help="for files without a header")
    data.add_argument(
        "--input",
        nargs="+",
        dest="inputs",
        metavar="COLUMN",
        help="what to encode (default: the text, or all columns of a table but labels)",
    )
    data.add_argument("--min-length", type=_positive, metavar="N", help="leave out shorter rows")
    data.add_argument("--max-length", type=_positive, metavar="N", help="leave out longer rows")
    data.add_argument(
        "--too-long",
        choices=("error", "truncate"),
        default="error",
        help="what to do with rows longer than the model (default: %(default)s)",
    )
    data.add_argument(
        "--alphabet", metavar="CHARS", help="the only characters that sequences may hold"
    )
    data.add_argument(
        "--exclude", nargs="+", metavar="COLUMN", help="columns of a table that are no inputs"
    )
    data.add_argument("--resize", metavar="FILTER", help="bring pictures to --size")
    data.add_argument("--size", nargs=2, type=_positive, metavar=("H", "W"), help="of pictures")
    data.add_argument(
        "--skip-damaged", action="store_true", help="leave damaged pictures out, and count them"
    )
    data.add_argument("--cache", metavar="DIR", help="folder of converted files")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    train = parser.add_argument_group("training (default: what the preset says)")
    train.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for all that is written"
    )
    train.add_argument(
        "--preset",
        help="protein, molecule, physics, language or image (default: that of --from, or "
        "language); of mae: mae-32, mae-tiny, mae-base or mae-large (default: mae-32)",
    )
    train.add_argument(
        "--scale", help="full, or small for two cores (default: that of --from, or full)"
    )
    train.add_argument(
        "--set",
        nargs="+",
        type=_assignment,
        dest="model",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of SMAConfig, or MAEConfig, e.g. num_latents=64",
    )
    train.add_argument(
        "--set-mask",
        nargs="+",
        type=_assignment,
        dest="masking",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of SMAMasking, or of the policy, e.g. mask_ratio=0.2",
    )
    train.add_argument("--epochs", type=float, metavar="X", help="passes over the data")
    train.add_argument("--steps", type=_positive, metavar="N", help="optimiser steps, not --epochs")
    train.add_argument(
        "--batch-size", type=_positive, metavar="N", help="rows of a step, over all processes"
    )
    train.add_argument("--learning-rate", type=float, metavar="X", help="at its peak")
    train.add_argument("--weight-decay", type=float, metavar="X", help="of AdamW")
    train.add_argument("--warmup-steps", type=int, metavar="N", help="of the learning rate")
    train.add_argument("--scheduler", help="cosine, constant or linear")
    train.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of weights, order, masks and dropout (default: %(default)s)",
    )
    train.add_argument(
        "--accumulate", type=_positive, default=1, metavar="N", help="batches that make a step"
    )
    train.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read data"
    )
    train.add_argument("--limit-train", type=_positive, metavar="N", help="rows of the train part")
    train.add_argument(
        "--save-steps",
        type=_positive,
        metavar="N",
        help="steps between checkpoints, and validations (default: a tenth of the run)",
    )
    train.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    train.add_argument(
        "--compile",
        action="store_true",
        help=f"torch.compile; annealed masks then change in {_STAGES} stages, not at every step",
    )
    train.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time"
    )
    train.add_argument("--fsdp", metavar="MODE", help="of transformers' TrainingArguments")
    train.add_argument("--tensorboard", action="store_true", help="write curves for TensorBoard")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")


def _train(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from sma_fast.training.extras import MissingExtra, require

    try:
        require(*_TRAIN_NEEDS, *(["matplotlib"] if options.command == "show" else []))
    except MissingExtra as error:
        return _fail(error)

    import dataclasses

    from sma_fast.training import run
    from sma_fast.training.options import DataOptions, TrainOptions
    from sma_fast.training.pretrained import preset_of

    given: dict[str, Any] = vars(options)
    for name in ("parts", "model", "masking"):
        if given.get(name) is not None:
            given[name] = dict(given[name])
    for name in ("source", "columns", "inputs", "exclude", "size"):
        given[name] = None if given[name] is None else tuple(given[name])

    def of(kind: type) -> Any:
        return kind(**{f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given})

    mae = given.get("kind") == "mae"
    chosen = {"preset": "mae-32" if mae else "language", "scale": "full"}
    if options.command == "pretrain":
        chosen["mask"] = "selfmae" if mae else "guided"
    try:
        if given.get("pretrained"):
            chosen |= preset_of(options.pretrained)
        if options.command in ("pretrain", "finetune"):
            given.update({name: given[name] or value for name, value in chosen.items()})
        data = of(DataOptions)
        if options.command == "show":
            from sma_fast.training.show import show

            named = (options.out, options.rows, options.row, options.seed)
            print("\n".join(show(options.checkpoint, data, *named)))
            return 0
        if options.command == "evaluate":
            results = run.evaluate(options.checkpoint, data, options.batch_size)
        elif options.command == "pretrain":
            results = run.pretrain(of(TrainOptions), data)
        else:
            results = run.finetune(
                of(TrainOptions), data, tuple(options.label), options.task, options.pretrained
            )
    except (
        ValueError,
        OSError,
        MissingExtra,
    ) as error:  # ours say what to do; OSError: a disk that is full
        return _fail(error)
    if int(os.environ.get("RANK", 0)) == 0:  # of the processes of torchrun
        print(json.dumps(results, indent=1))
    return 0


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


def _print(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nobody reads on, such as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(error: Exception) -> int:
    print(f"sma-fast: error: {_line(str(error))}", file=sys.stderr)
    return 1


def _line(text: str) -> str:
    return " ".join(text.split())


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a whole number of at least 1")
    return number


def _part(text: str) -> tuple[str, str]:
    part, sign, value = text.partition("=")
    if not sign or part not in ("train", "valid", "test"):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is train=, valid= or test=VALUE")
    return part, value


def _assignment(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is NAME=VALUE")
    try:
        return name, json.loads(value)  # numbers, true, false, null
    except ValueError:
        return name, value


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
