"""Masks of pictures compared: `python -m bench.pictures --data ../shared/data --out pictures-out`.

Pretrains masked autoencoders on the train pictures with random, AttMask and self-guided masks, with
equal budgets and several seeds, through `sma_fast.training.run`. Of checkpoints along the way, and
of no training, a linear probe and k-NN read the classes of the test pictures from the mean of the
patch embeddings. Figures: curves over epochs; pictures with similarity, cut, score, informed mask,
hints and reconstruction.

Runs that are done are kept in the folder and not repeated. `--scale full` is ViT-tiny of 224 px for
a GPU. The summary goes to bench/results with `--save`.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench import science

MASKS = ("random", "attmask", "selfmae")
RESULTS = science.RESULTS


class Scale(NamedTuple):
    preset: str
    model: dict  # fields of MAEConfig
    epochs: int
    checkpoints: int  # to probe
    batch_size: int | None = None  # None: the preset's


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
        epochs=24,
        checkpoints=6,
        batch_size=128,
    ),
    "full": Scale("mae-tiny", {}, epochs=400, checkpoints=10),
}
NEIGHBOURS = 20
STRENGTH = 0.1  # C of the linear probe's logistic regression, the same for all


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
        "--masks", nargs="+", default=MASKS, help="of sma-fast pretrain --model mae"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of every run, to try the command out")
    parser.add_argument("--pictures", type=int, help="use this many of the train pictures")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: cores, or 1 on a GPU)")
    parser.add_argument("--save", action="store_true", help="summary into bench/results")
    options = parser.parse_args(arguments)
    if options.save and (options.epochs or options.pictures):
        parser.error("--save: allowed without --epochs and --pictures only")
    options.zip = options.data / "vision" / "cifar10_jpeg_12k.zip"
    if not options.zip.is_file():
        parser.error(f"--data: {options.zip} is not there: name the folder with vision/")
    options.jobs = options.jobs or science._jobs()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "commit").exists():
        (options.out / "commit").write_text(science._commit())
    began = time.perf_counter()
    jobs = [(mask, seed) for seed in range(options.seeds) for mask in options.masks]
    todo = [job for job in jobs if not _probes(options, *job).exists()]
    _run_all(todo, options)
    missing = [job for job in jobs if not _probes(options, *job).exists()]
    if missing:
        print(f"failed: {missing}", file=sys.stderr)
        return 1
    summary = summarise(options)
    if len(todo) == len(jobs):
        summary["seconds"] = time.perf_counter() - began
    print(table(summary))
    from bench import pictures_plots

    pictures_plots.curves(options.out / "curves.png", summary)
    if "selfmae" in options.masks:
        model, pixels = _shown(options)
        pictures_plots.masks(options.out / "masks.png", model, pixels)
    if options.save:
        path = RESULTS / f"pictures-{summary['date']}-{options.scale}.json"
        path.write_text(json.dumps(summary, indent=1) + "\n")
        print(f"saved: {path}")
    return 0


def _folder(options: argparse.Namespace, mask: str, seed: int) -> Path:
    return options.out / f"{mask}-{seed}"


def _probes(options: argparse.Namespace, mask: str, seed: int) -> Path:
    return _folder(options, mask, seed) / "probes.json"


def _run_all(jobs: list[tuple], options: argparse.Namespace) -> None:
    import multiprocessing

    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, initializer=science._one_thread, maxtasksperchild=1) as pool:
        work = [(job, options) for job in jobs]
        for done, (job, error) in enumerate(pool.imap_unordered(_run, work)):
            text = f"failed: {error}" if error else ""
            print(f"{done + 1}/{len(jobs)} {job[0]} {job[1]} {text}", file=sys.stderr)


def _run(work: tuple) -> tuple[tuple, str]:
    import traceback

    (mask, seed), options = work
    try:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):
            _pretrain(mask, seed, options)
            _probe(mask, seed, options)
    except Exception:  # said, and the exit code is 1; the other runs are not lost with this one
        return (mask, seed), traceback.format_exc()
    return (mask, seed), ""


def _pretrain(mask: str, seed: int, options: argparse.Namespace) -> None:
    from sma_fast.training import run
    from sma_fast.training.options import DataOptions, TrainOptions

    scale = SCALES[options.scale]
    epochs = options.epochs or scale.epochs
    data = DataOptions(source=(str(options.zip),), split_column="split", validation_share=0.02)
    train = TrainOptions(
        out=_folder(options, mask, seed),
        kind="mae",
        preset=scale.preset,
        mask=mask,
        model=scale.model,
        epochs=epochs,
        batch_size=scale.batch_size,
        seed=seed,
        keep_checkpoints=True,
        limit_train=options.pictures,
        progress_bar=False,
        resume=True,
    )
    in_epoch = (options.pictures or 9800) // train.schedule(False).batch_size
    train = dataclasses.replace(train, save_steps=max(1, epochs * in_epoch // scale.checkpoints))
    run.pretrain(train, data)


def _probe(mask: str, seed: int, options: argparse.Namespace) -> None:
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folder = _folder(options, mask, seed)
    pixels, labels, is_test = _pictures(options, folder)
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    found = []
    for step, model in _models(folder):
        features = _features(model, pixels)
        neighbours = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights="distance")
        neighbours.fit(features[train], labels[train])
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=300))
        linear.fit(features[train], labels[train])
        found.append(
            {
                "step": step,
                "knn": float(neighbours.score(features[test], labels[test])),
                "linear": float(linear.score(features[test], labels[test])),
            }
        )
    results = json.loads((folder / "results.json").read_text())
    in_epoch = results["steps"] / (options.epochs or SCALES[options.scale].epochs)
    for entry in found:
        entry["epoch"] = entry["step"] / in_epoch
    kept = {name: results[name] for name in ("steps", "seconds", "parameters")}
    kept["loss"] = results["validation"][-1]["loss"] if results["validation"] else None
    _probes(options, mask, seed).write_text(json.dumps({**kept, "probes": found}) + "\n")


def _pictures(options: argparse.Namespace, folder: Path):
    # standardised pixels (B, 3, H, W), labels and which are test pictures
    import numpy as np
    import torch

    from sma_fast.training.data import Examples, load
    from sma_fast.training.inputs import Encodings

    rows = load(str(options.zip))
    inputs = Encodings.read(folder).inputs
    samples = Examples(rows, inputs)
    height, width = inputs.size
    pixels = torch.from_numpy(
        np.stack([s["inputs"] for s in samples.__getitems__(range(len(samples)))])
    )
    pixels = pixels.reshape(-1, height, width, 3).permute(0, 3, 1, 2).contiguous()
    labels = np.asarray(rows["label"])
    is_test = np.asarray(rows["split"]) == "test"
    if options.pictures:  # evenly among those of each part
        parts = [np.flatnonzero(is_test), np.flatnonzero(~is_test)]
        keep = np.concatenate([part[:: -(-len(part) // options.pictures)] for part in parts])
        pixels, labels, is_test = pixels[torch.from_numpy(keep)], labels[keep], is_test[keep]
    return pixels, labels, is_test


def _models(folder: Path):
    import torch

    from sma_fast.models.vit import MAEForPretraining

    last = MAEForPretraining.from_pretrained(str(folder))
    torch.manual_seed(0)
    yield 0, MAEForPretraining(last.config).eval()
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])):
        yield int(path.name.split("-")[1]), _checkpoint(path, last)


def _checkpoint(path: Path, like):
    # without a policy's own weights
    import safetensors.torch

    weights = safetensors.torch.load_file(path / "model.safetensors")
    model = type(like)(like.config)
    own = model.state_dict()
    model.load_state_dict({name: x for name, x in weights.items() if name in own})
    return model.eval()


def _features(model, pixels):
    import torch

    with torch.no_grad():
        parts = [model.embeddings(batch).mean(dim=1) for batch in pixels.split(500)]
    return torch.cat(parts).numpy()


def _shown(options: argparse.Namespace):
    from sma_fast.models.vit import MAEForPretraining

    folder = _folder(options, "selfmae", 0)
    pixels, labels, is_test = _pictures(options, folder)
    test = is_test.nonzero()[0]
    return MAEForPretraining.from_pretrained(str(folder)).eval(), pixels[
        test[:: len(test) // 8][:8]
    ]


def summarise(options: argparse.Namespace) -> dict:
    """Returns means and standard deviations over the seeds of all runs in the folder."""
    import torch

    def of(values: list[float]) -> dict:
        spread = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.mean(values), "std": spread, "seeds": values}

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else science._processor()
    summary = {
        "date": datetime.date.today().isoformat(),
        "commit": (options.out / "commit").read_text(),
        "machine": f"{device}, {options.jobs} runs at a time",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "scale": options.scale,
        "masks": {},
    }
    for mask in options.masks:
        runs = [
            json.loads(_probes(options, mask, seed).read_text()) for seed in range(options.seeds)
        ]
        summary["masks"][mask] = {
            "steps": runs[0]["steps"],
            "parameters": runs[0]["parameters"],
            "seconds": of([r["seconds"] for r in runs]),
            "loss": of([r["loss"] for r in runs]),
            "probes": [
                {
                    "epoch": entries[0]["epoch"],
                    "knn": of([e["knn"] for e in entries]),
                    "linear": of([e["linear"] for e in entries]),
                }
                for entries in zip(*(r["probes"] for r in runs), strict=True)
            ],
        }
    return summary


def table(summary: dict) -> str:
    """Returns the summary as a Markdown table, a row for each mask and one for no training."""

    def cell(entry: dict, digits: int = 3) -> str:
        spread = "" if entry["std"] is None else f" ± {entry['std']:.{digits}f}"
        return f"{entry['mean']:.{digits}f}{spread}"

    lines = [
        "| masks | epochs | linear probe | k-NN | loss under random masks | seconds |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(summary["masks"].values()))["probes"][0]
    lines.append(f"| (no training) | 0 | {cell(first['linear'])} | {cell(first['knn'])} | | |")
    for mask, entry in summary["masks"].items():
        last = entry["probes"][-1]
        lines.append(
            f"| {mask} | {last['epoch']:.0f} | {cell(last['linear'])} | {cell(last['knn'])} | "
            f"{cell(entry['loss'])} | {cell(entry['seconds'], 0)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
