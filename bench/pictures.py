"""Masks of pictures compared: `python -m bench.pictures --data ../shared/data --out pictures-out`.

Pretrains masked autoencoders on the train pictures with random, AttMask and self-guided masks, the
last ones also with scores kept for some epochs and with few hints, with equal budgets and several
seeds, through `sma_fast.training.run`. Of checkpoints along the way, and of no training, a linear
probe and k-NN read the classes of the test pictures from the mean of the patch embeddings. Figures:
curves over epochs; pictures with similarity, cut, score, informed mask, hints and reconstruction.

Runs that are done are kept in the folder and not repeated. `--scale full` is ViT-tiny of 224 px for
a GPU; each run resizes its pictures on a core of its own, so `--jobs 4` there, if there are cores.
The summary goes to bench/results with `--save`.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench import runs

# selfmae with scores kept for five epochs, which saves most of its unmasked forwards, and with
# masks that follow the rank from a quarter of training on, but for a tenth of hints
VARIANTS = {
    "selfmae-kept": ("selfmae", {"table": "scores.bin"}),
    "selfmae-informed": ("selfmae", {"initial_hints": 0.1}),
}
MASKS = ("random", "attmask", "selfmae", *VARIANTS)
PIXELS = 32  # height and width of the pictures
VALIDATION = 0.02  # of the 10,000 train pictures
TRAINED = 9800  # the others


class Scale(NamedTuple):
    preset: str
    model: dict[str, Any]  # fields of MAEConfig that differ
    epochs: int
    checkpoints: int  # to probe
    batch_size: int


SCALES = {
    "small": Scale(
        "mae-32",
        {
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "decoder_hidden_size": 64,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
        },
        epochs=20,
        checkpoints=5,
        batch_size=128,
    ),
    "full": Scale("mae-tiny", {}, epochs=400, checkpoints=10, batch_size=512),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs what is not done yet, prints the table, and saves the summary where asked.

    Args:
        arguments: of the command line. Default: sys.argv.

    Returns:
        0, or 1 where a run failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("pictures-out"))
    parser.add_argument("--scale", choices=tuple(SCALES), default="small")
    parser.add_argument(
        "--masks",
        nargs="+",
        default=MASKS,
        help=f"of sma-fast pretrain --model mae, and {', '.join(VARIANTS)}",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of every run, to try the command out")
    parser.add_argument("--pictures", type=int, help="use this many of the train pictures")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: cores, or 1 on a GPU)")
    parser.add_argument(
        "--reprobe", action="store_true", help="read the classes again from runs that are done"
    )
    parser.add_argument("--save", action="store_true", help="summary into bench/results")
    options = parser.parse_args(arguments)
    if options.save and (options.epochs or options.pictures):
        parser.error("--save: allowed without --epochs and --pictures only")
    options.zip = options.data / "vision" / "cifar10_jpeg_12k.zip"
    if not options.zip.is_file():
        parser.error(f"--data: {options.zip} is not there: name the folder with vision/")
    # with the options: a process that runs one does not look at SCALES
    options.chosen = _chosen(options)
    options.jobs = options.jobs or runs.at_a_time()
    runs.begin(options.out)
    if instead := _other_options(options):
        parser.error(f"--out: {options.out} holds runs of {instead}: name another folder")
    began = time.perf_counter()
    jobs = [(mask, seed) for seed in range(options.seeds) for mask in options.masks]
    started_anew = not any(_folder(options, *job).exists() for job in jobs)
    todo = [job for job in jobs if options.reprobe or not _probes(options, *job).exists()]
    for job in todo:
        _probes(options, *job).unlink(missing_ok=True)
    runs.in_processes(functools.partial(_run, options=options), todo, options.jobs)
    missing = [job for job in jobs if not _probes(options, *job).exists()]
    if missing:
        print(f"failed: {missing}", file=sys.stderr)
        return 1
    summary = summarise(options)
    if started_anew:
        summary["seconds"] = time.perf_counter() - began
    print(table(summary))
    _draw(options, summary)
    if options.save:
        runs.save("pictures", summary, figures=sorted(options.out.glob("*.png")))
    return 0


def _chosen(options: argparse.Namespace) -> Scale:
    scale = SCALES[options.scale]
    return scale._replace(
        epochs=options.epochs or scale.epochs,
        batch_size=min(scale.batch_size, options.pictures or TRAINED),
    )


def _other_options(options: argparse.Namespace) -> dict | None:
    # what the runs in the folder were asked for, where that is not what is asked for now
    asked = {name: getattr(options, name) for name in ("scale", "epochs", "pictures")}
    file = options.out / "options.json"
    if file.exists():
        before = json.loads(file.read_text())
        return None if before == asked else before
    file.write_text(json.dumps(asked) + "\n")
    return None


def _folder(options: argparse.Namespace, mask: str, seed: int) -> Path:
    return options.out / f"{mask}-{seed}"


def _probes(options: argparse.Namespace, mask: str, seed: int) -> Path:
    return _folder(options, mask, seed) / "probes.json"


def _run(job: tuple[str, int], options: argparse.Namespace) -> None:
    from bench import pictures_probe
    from sma_fast.training import checkpoints

    mask, seed = job
    folder = _folder(options, mask, seed)
    if not checkpoints.is_whole(folder):
        _pretrain(mask, seed, options)
    results = json.loads((folder / "results.json").read_text())
    in_epoch = results["steps"] / options.chosen.epochs
    kept = {name: results[name] for name in ("steps", "seconds", "parameters")}
    kept["random_masks"] = results.get("random_masks")  # None but with selfmae
    kept["loss"] = results["validation"][-1]["loss"]
    pictures = pictures_probe.Pictures(options.zip, folder, options.pictures)
    found = pictures_probe.probes(folder, seed, pictures)
    kept["probes"] = [{"epoch": entry["step"] / in_epoch, **entry} for entry in found]
    checkpoints.write_whole(_probes(options, mask, seed), json.dumps(kept) + "\n")


def _pretrain(mask: str, seed: int, options: argparse.Namespace) -> None:
    from sma_fast.training import run
    from sma_fast.training.options import DataOptions, TrainOptions

    scale = options.chosen
    policy, masking = VARIANTS.get(mask, (mask, {}))
    in_epoch = (options.pictures or TRAINED) // scale.batch_size
    train = TrainOptions(
        out=_folder(options, mask, seed),
        kind="mae",
        preset=scale.preset,
        mask=policy,
        masking=masking,
        model=scale.model,
        epochs=scale.epochs,
        batch_size=scale.batch_size,
        seed=seed,
        save_steps=max(1, scale.epochs * in_epoch // scale.checkpoints),
        keep_checkpoints=True,
        limit_train=options.pictures,
        progress_bar=False,
        resume=True,
    )
    data = DataOptions(
        source=(str(options.zip),), split_column="split", validation_share=VALIDATION
    )
    if train.config().image_size != PIXELS:
        data = dataclasses.replace(data, resize="bilinear")
    run.pretrain(train, data)


def summarise(options: argparse.Namespace) -> dict:
    """Returns means and standard deviations over the seeds of all runs in the folder."""
    of = runs.over_seeds
    summary = runs.described(options.out, options.scale, options.jobs)
    summary["masks"] = {}
    for mask in options.masks:
        found = [
            json.loads(_probes(options, mask, seed).read_text()) for seed in range(options.seeds)
        ]
        summary["masks"][mask] = {
            "steps": found[0]["steps"],
            "parameters": found[0]["parameters"],
            "seconds": of([r["seconds"] for r in found]),
            "loss": of([r["loss"] for r in found]),
            "random_masks": [r["random_masks"] for r in found],
            "probes": [
                {
                    "epoch": entries[0]["epoch"],
                    "knn": of([e["knn"] for e in entries]),
                    "linear": of([e["linear"] for e in entries]),
                }
                for entries in zip(*(r["probes"] for r in found), strict=True)
            ],
        }
    return summary


def table(summary: dict) -> str:
    """Returns the summary as a Markdown table, a row for each mask and one for no training."""
    cell = runs.cell
    lines = [
        "| masks | epochs | linear probe | k-NN | loss under random masks | seconds |",
        "|---|---|---|---|---|---|",
    ]
    # of any mask: before training the runs of a seed are one model
    first = next(iter(summary["masks"].values()))["probes"][0]
    lines.append(f"| (no training) | 0 | {cell(first['linear'])} | {cell(first['knn'])} | | |")
    for mask, entry in summary["masks"].items():
        last = entry["probes"][-1]
        lines.append(
            f"| {mask} | {last['epoch']:.0f} | {cell(last['linear'])} | {cell(last['knn'])} | "
            f"{cell(entry['loss'])} | {cell(entry['seconds'], 0)} |"
        )
    return "\n".join(lines)


def _draw(options: argparse.Namespace, summary: dict) -> None:
    from bench import pictures_plots, pictures_probe
    from sma_fast.models import MAEForPretraining
    from sma_fast.training import show_mae
    from sma_fast.training.pretrained import load_model

    pictures_plots.curves(options.out / "curves.png", summary)
    if "selfmae" in options.masks:
        folder = _folder(options, "selfmae", 0)
        pictures = pictures_probe.Pictures(options.zip, folder, options.pictures)
        test = pictures.is_test.nonzero()[0]
        pixels = pictures.pixels(test[:: max(1, len(test) // 8)][:8])
        model = load_model(folder, MAEForPretraining).eval()
        colours = show_mae.colours_of(pictures.inputs)
        pictures_plots.masks(options.out / "masks.png", model, pixels, colours)
        shares = pictures_probe.shares_by_rank(model, pictures.pixels(test[:400]))
        summary["by_rank"] = shares
        print(
            "selfmae: of the masked patches rank alone would mask "
            f"{sum(shares) / len(shares):.3f}, the mean over training, and {shares[-1]:.3f} at its "
            f"end; at random {shares[0]:.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
