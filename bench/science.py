"""Three sciences on real data: `python -m bench.science --data ../shared/data --out science-out`.

For physics (HIGGS), molecules (ESOL, FreeSolv, BBBP) and proteins (avgFP fluorescence, stability):
pretrain with guided and with random masks, fine-tune from either and from no pretraining with equal
budgets, several seeds each, beside plain baselines. Every run goes through `sma_fast.training.run`.
The best checkpoint is chosen on the validation part, the test part is looked at once.

Runs that are done are kept in the folder and not repeated, so a broken run goes on where it was.
The summary goes to bench/results with `--save`.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

from bench import runs

STARTS = ("guided", "random", "none")


@dataclasses.dataclass(frozen=True)
class Science:
    """One domain: its preset, what is pretrained on, and the steps of that at scale small.

    At scale full the preset's epochs count.
    """

    preset: str
    data: dict
    steps: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One fine-tuning task: of which science, on what, for which label, measured how.

    `steps` are those at scale small; `baseline` says how the plain models see the inputs, `limit`
    how many rows of the train part are used.
    """

    science: str
    data: dict
    label: str
    kind: str
    measures: tuple[str, ...]
    steps: int
    baseline: str
    limit: int | None = None


_HIGGS = {
    "source": ("higgs/higgs_pool.npz",),
    "inputs": ("X",),
    "test_share": 0.11,
    "validation_share": 0.03,
}
_SCAFFOLD = {"inputs": ("smiles",), "split_column": "scaffold_split"}
SCIENCES = {
    "physics": Science("physics", _HIGGS, 600),
    "molecule": Science(
        "molecule",
        {"source": ("chem/chembl30_90k.smi.gz",), "inputs": ("smiles",), "validation_share": 0.01},
        700,
    ),
    "protein": Science(
        "protein",
        {
            "source": ("protein/unlabeled_40k.txt.gz",),
            "inputs": ("text",),
            "min_length": 51,
            "max_length": 256,
            "validation_share": 0.01,
        },
        1000,
    ),
}


def _higgs(steps: int, limit: int | None = None) -> Task:
    measures = ("accuracy", "auc")
    return Task("physics", _HIGGS, "y", "classification", measures, steps, "table", limit)


def _scaffold(name: str, kind: str, measure: str, steps: int, **data: str) -> Task:
    source = {"source": (f"chem/{name}.csv",), **_SCAFFOLD, **data}
    return Task("molecule", source, "label", kind, (measure,), steps, "ngrams")


def _sequences(data: dict, steps: int) -> Task:
    data = {"inputs": ("seq",), **data}
    return Task("protein", data, "label", "regression", ("spearman",), steps, "onehot")


TASKS = {
    "higgs-1k": _higgs(120, 1000),
    "higgs-10k": _higgs(250, 10_000),
    "higgs-all": _higgs(400),
    "esol": _scaffold("esol", "regression", "rmse", 300),
    "freesolv": _scaffold("freesolv", "regression", "rmse", 200),
    "bbbp": _scaffold("bbbp", "classification", "auc", 300, too_long="truncate"),
    "avgfp": _sequences({"source": ("protein/avgfp_tape.csv.gz",), "split_column": "split"}, 750),
    "stability": _sequences(
        {
            "source": ("protein/stability.train.csv.gz",),
            "validation": "protein/stability.valid.csv.gz",
            "test": "protein/stability.test.csv.gz",
        },
        300,
    ),
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
    parser.add_argument("--out", type=Path, default=Path("science-out"))
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, help="runs at a time (default: cores, or 1 on a GPU)")
    parser.add_argument("--only", nargs="+", choices=(*SCIENCES, *TASKS), help="these only")
    parser.add_argument("--steps", type=int, help="of every run, to try the command out")
    parser.add_argument("--save", action="store_true", help="summary into bench/results")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print that summary, run nothing"
    )
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return 0
    if options.save and options.steps:
        parser.error("--save: allowed without --steps only")
    if not options.data.is_dir():
        parser.error(
            f"--data: {options.data} is not there: name the folder with higgs/, chem/, ..."
        )
    options.jobs = options.jobs or runs.at_a_time()
    only = set(options.only or (*SCIENCES, *TASKS))
    tasks = [t for t in TASKS if t in only or TASKS[t].science in only]
    sciences = sorted({TASKS[t].science for t in tasks})
    seeds = range(options.seeds)
    first = [
        ("pretrain", science, mask, seed)
        for seed in seeds
        for science in sciences
        for mask in STARTS[:2]
    ]
    then = [("finetune", task, s, seed) for seed in seeds for task in tasks for s in STARTS]
    then += [("baseline", task, "", seed) for seed in seeds for task in tasks]
    began = time.perf_counter()
    runs.begin(_folder(options))
    options.started_anew = not any(_file(options, job).exists() for job in first + then)
    for jobs in (first, then):
        todo = [job for job in jobs if not _file(options, job).exists()]
        runs.in_processes(functools.partial(_run, options=options), todo, options.jobs)
    missing = [job for job in first + then if not _file(options, job).exists()]
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if missing:
        print(f"failed: {missing}", file=sys.stderr)
        return 1
    summary = summarise(options, tasks, sciences)
    if options.started_anew:
        summary["seconds"] = time.perf_counter() - began
    print(table(summary))
    if options.save:
        runs.save("science", summary)
    return 0


def _file(options: argparse.Namespace, job: tuple) -> Path:
    name = "-".join(str(part) for part in job if part != "")
    return _folder(options) / name / "results.json"


def _folder(options: argparse.Namespace) -> Path:
    return options.out / (f"{options.steps}-steps" if options.steps else options.scale)


def _run(job: tuple, options: argparse.Namespace) -> None:
    kind, name, start, seed = job
    folder = _file(options, job).parent
    if kind == "baseline":
        from bench.science_baselines import baseline

        folder.mkdir(parents=True, exist_ok=True)
        result = baseline(TASKS[name], _data(TASKS[name].data, options), seed)
        _file(options, job).write_text(json.dumps(result) + "\n")
    elif kind == "pretrain":
        _pretrain(SCIENCES[name], start, seed, folder, options)
    else:
        _finetune(TASKS[name], start, seed, folder, options)


def _data(chosen: dict, options: argparse.Namespace):
    from sma_fast.training.options import DataOptions

    paths = {
        name: str(options.data / chosen[name]) for name in ("validation", "test") if name in chosen
    }
    source = tuple(str(options.data / path) for path in chosen["source"])
    if options.scale == "full":
        chosen = {name: value for name, value in chosen.items() if name != "max_length"}
    return DataOptions(**{**chosen, **paths, "source": source})


def _pretrain(science: Science, mask: str, seed: int, folder: Path, options) -> None:
    from sma_fast.training import run
    from sma_fast.training.options import TrainOptions

    train = TrainOptions(
        out=folder,
        preset=science.preset,
        scale=options.scale,
        mask=mask,
        seed=seed,
        steps=_steps(science.steps, options),
        progress_bar=False,
        resume=True,
    )
    run.pretrain(train, _data(science.data, options))


def _steps(small: int, options: argparse.Namespace) -> int | None:
    return options.steps or (small if options.scale == "small" else None)


def _finetune(task: Task, start: str, seed: int, folder: Path, options) -> None:
    from sma_fast.training import run
    from sma_fast.training.options import TrainOptions

    train = TrainOptions(
        out=folder,
        preset=SCIENCES[task.science].preset,
        scale=options.scale,
        seed=seed,
        steps=_steps(task.steps, options),
        limit_train=task.limit,
        progress_bar=False,
        resume=True,
    )
    pretrained = None
    if start != "none":
        pretrained = _file(options, ("pretrain", task.science, start, seed)).parent
    run.finetune(train, _data(task.data, options), (task.label,), task.kind, pretrained)


def summarise(options: argparse.Namespace, tasks: list[str], sciences: list[str]) -> dict:
    """Returns means and standard deviations over the seeds of all runs in the folder."""

    def read(*job) -> dict:
        return json.loads(_file(options, job).read_text())

    of, seeds = runs.over_seeds, range(options.seeds)
    summary = runs.described(_folder(options), options.scale, options.jobs)
    summary |= {"pretraining": {}, "tasks": {}}
    for science in sciences:
        for mask in STARTS[:2]:
            found = [read("pretrain", science, mask, seed) for seed in seeds]
            summary["pretraining"][f"{science}, {mask}"] = {
                "steps": found[0]["steps"],
                "parameters": found[0]["parameters"],
                "seconds": of([r["seconds"] for r in found]),
                "tokens_per_second": of([r["tokens_per_second"] for r in found]),
                "validation_loss": of([r["validation"][-1]["loss"] for r in found]),
                "own_loss": of([_own_loss(r) for r in found]),
            }
    for name in tasks:
        task = summary["tasks"][name] = {"steps": None}
        for start in STARTS:
            found = [read("finetune", name, start, seed) for seed in seeds]
            task["steps"] = found[0]["steps"]
            task[start] = {m: of([r["test"][m] for r in found]) for m in TASKS[name].measures}
            task[start]["seconds"] = of([r["seconds"] for r in found])
        found = [read("baseline", name, seed) for seed in seeds]
        task["baselines"] = {
            model: {m: of([r[model][m] for r in found]) for m in TASKS[name].measures}
            for model in found[0]
        }
    return summary


def _own_loss(results: dict) -> float:
    last = results["validation"][-1]  # under the masks that the model was trained with
    return last.get("guided_loss", last["loss"])


def table(summary: dict) -> str:
    """Returns the summary as Markdown, a table of tasks and one of pretraining for each science."""

    cell, lines = runs.cell, []
    for science in SCIENCES:
        tasks = {n: t for n, t in summary["tasks"].items() if TASKS[n].science == science}
        if not tasks:
            continue
        lines += [
            f"{science}:",
            "",
            "| task | measure | guided | random | none | baselines | steps | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, task in tasks.items():
            seconds = statistics.mean(task[start]["seconds"]["mean"] for start in STARTS)
            for measure in TASKS[name].measures:
                cells = [cell(task[start][measure]) for start in STARTS]
                plain = [f"{m} {e[measure]['mean']:.3f}" for m, e in task["baselines"].items()]
                lines.append(
                    f"| {name} | {measure} | {' | '.join(cells)} | {', '.join(plain)} | "
                    f"{task['steps']} | {seconds:.0f} |"
                )
        lines += [
            "",
            "| pretraining | steps | parameters | seconds | tokens/s | loss under random masks "
            "| under its own |",
            "|---|---|---|---|---|---|---|",
        ]
        for mask in STARTS[:2]:
            entry = summary["pretraining"][f"{science}, {mask}"]
            lines.append(
                f"| {mask} masks | {entry['steps']} | {entry['parameters']:,} | "
                f"{entry['seconds']['mean']:.0f} | {entry['tokens_per_second']['mean']:,.0f} | "
                f"{cell(entry['validation_loss'])} | {cell(entry['own_loss'])} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(main())
