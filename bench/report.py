"""Prints one table of a run: `python -m bench.report [--save] [--markdown] [JSON ...]`.

Takes the JSON of `pytest bench --benchmark-json=...`, several to be joined (shapes, batch sizes,
types), or one summary that an earlier run saved; without any, the newest of a CPU in bench/results.
`--save` writes the summary there, named by date and machine. Nothing in it is typed by hand. The
JSON of bench.gpu is printed by bench.report_gpu.
"""

import argparse
import json
import pathlib
import re

from bench.targets import targets_of

RESULTS = pathlib.Path(__file__).parent / "results"
RATES = ("copy_rate", "matrix_rate")  # in each row of a run, once in a summary
SIGNIFICANT = 4  # digits that a summary keeps


def summary(runs: list[dict]) -> dict:
    """Returns what is worth keeping of pytest-benchmark's JSON: the machine, its rates, the rows.

    Raises:
        ValueError: where the runs are of different machines, versions or commits.
    """
    joined: dict = {}
    for run in runs:
        head = {
            "date": run["datetime"][:10],
            "commit": run["commit_info"]["id"],
            "uncommitted_changes": run["commit_info"]["dirty"],
            **run["sma_fast"],
        }
        rates = head.pop("rates")
        if not joined:
            joined = {**head, "rates": {}, "rows": []}
        for name in head:
            if name != "date" and head[name] != joined[name]:
                raise ValueError(f"{name}: got {head[name]} beside {joined[name]}")
        for benchmark in run["benchmarks"]:
            row = benchmark["extra_info"]
            joined["rows"].append({name: row[name] for name in row if name not in RATES})
        joined["rates"].update(rates)
    return rounded(joined)


def table(result: dict) -> str:
    """Returns the summary as text."""
    lines = [f"{name}: {result[name]}" for name in ("date", "machine", "commit", "memory")]
    for dtype, rates in result["rates"].items():
        lines.append(
            f"{dtype}: copy {rates['copy_rate'] / 1e9:.1f} GB/s, "
            f"matrix {rates['matrix_rate'] / 1e9:.0f} GFLOP/s; after the run "
            f"{rates['copy_rate_after'] / 1e9:.1f} and {rates['matrix_rate_after'] / 1e9:.0f}"
        )
    if result["quick"]:
        lines.append("QUICK: scaled-down shapes, these times mean nothing")
    return "\n".join([*lines, *aligned(result), *_untouched(result)])


def aligned(result: dict) -> list[str]:
    """Returns the lines of all rows, and how many targets are met."""
    head = ("op", "part", "shape", "type", "backend", "ours", "floor", "x floor")
    cells = [(*head, "peers (times ours)", "target", "met")]
    for row in result["rows"]:
        cells += cells_of(row, result["quick"])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    met = [line[-1] for line in cells[1:]]
    return [
        *(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ),
        f"targets met: {met.count('yes')} of {len(met) - met.count('')}",
    ]


def markdown(result: dict) -> str:
    """Returns README's table: the rows that have a target, and what each was to reach."""
    config = result["config"]
    rates = [
        f"{dtype}: copy {rate['copy_rate'] / 1e9:.0f} GB/s, matrix "
        f"{rate['matrix_rate'] / 1e9:.0f} GFLOP/s"
        for dtype, rate in result["rates"].items()
    ]
    lines = [
        f"{result['date']}, {result['machine']} ({config.get('CPU instruction set', '')}), torch "
        f"{config['torch']}; {'; '.join(rates)}; commit {result['commit'][:10]}.",
        "",
        "| op | shape | part | time | over floor | peers, times ours | to reach | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        targets = targets_of(row)
        if not targets:
            continue
        cells = cells_of(row, quick=False)
        _, _, _, _, _, ours, _, over, peers, _, _ = cells[0]
        reach = "; ".join(str(t).replace("<=", "≤").replace(">=", "≥") for t in targets)
        met = "; ".join(line[-1] for line in cells)
        name = f"`{row['op']}` | {row['shape']} | {row['part']}"
        lines.append(f"| {name} | {ours} | {over} | {peers} | {reach} | {met} |")
    return "\n".join([*lines, "", *_untouched(result), losses(result)])


def _untouched(result: dict) -> list[str]:
    # of a pretraining step: how much of it lies in layers that are the same in both models
    rows = {
        (row["shape"], row["part"]): row
        for row in result["rows"]
        if row["op"] == "pretraining_step" and "ours_s" in row
    }
    lines = []
    for (shape, part), row in rows.items():
        others = {(shape, "changed parts"), (shape, "untouched layers")}
        if part != "whole" or not others <= rows.keys():
            continue
        layers_s = row["ours_s"] - rows[shape, "changed parts"]["ours_s"]  # the same in both
        alone_s = rows[shape, "untouched layers"]["ours_s"]
        ours, published, alone = (
            part_s / whole_s
            for part_s, whole_s in (
                (layers_s, row["ours_s"]),
                (layers_s, row["peers"]["published"]["median_s"]),
                (alone_s, row["ours_s"]),
            )
        )
        lines.append(
            f"A step on {shape}: {ours:.0%} of ours and {published:.0%} of the published one lie "
            "in layers that this project leaves as they are: what our whole step takes beyond its "
            f"changed parts (timed alone, with cold inputs, these layers take {alone:.0%} of it)."
        )
    return lines


def losses(result: dict) -> str:
    """Returns where another way was faster, with or without a target."""
    found = [
        f"`{row['op']}` {row['part']} on {row['shape']} ({name} {peer['ratio']:.2f})"
        for row in result["rows"]
        for name, peer in row["peers"].items()
        if peer.get("ratio", 1) < 1
    ]
    return f"Faster than ours, times ours: {', '.join(found) or 'nothing'}."


def save(result: dict) -> pathlib.Path:
    """Writes the summary to bench/results and returns its path.

    Raises:
        ValueError: for a quick run.
    """
    if result["quick"]:
        raise ValueError("--save: got a quick run, allowed is a full one")
    path = RESULTS / file_name(result)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def file_name(result: dict) -> str:
    machine = re.sub(r"[^a-z0-9]+", "-", result["machine"].lower()).strip("-")
    return f"{result['date']}-{machine}.json"


def cells_of(row: dict, quick: bool) -> list[tuple[str, ...]]:
    """Returns one line for the row, and one more for each target beyond the first."""
    if "peak_bytes" in row:
        ours, floor, over = _mib(row), "", ""
        peers = [f"{name} {_mib(peer)}" for name, peer in row["peers"].items()]
    else:
        ours, floor = _time(row["ours_s"]), _time(row["floor_s"])
        over = "" if row["over_floor"] is None else f"{row['over_floor']:.2f}"
        peers = [f"{name} {peer['ratio']:.4g}" for name, peer in row["peers"].items()]
    peers += [f"{name}: {why}" for name, why in row["skipped"].items()]
    start = (row["op"], row["part"], row["shape"], row["dtype"], row["backend"], ours, floor, over)
    ends = []
    for target in () if quick else targets_of(row):
        met = {True: "yes", False: "NO", None: "not measured"}[target.met(row)]
        ends.append((str(target), met))
    ends = ends or [("", "")]
    lines = [(*start, ", ".join(peers), *ends[0])]
    return lines + [("",) * (len(start) + 1) + end for end in ends[1:]]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} us"


def _mib(measured: dict) -> str:
    return f"{measured['peak_bytes'] / 2**20:.1f} MiB"


def rounded(value):
    """Returns the value with SIGNIFICANT digits in all its floats."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def _load(files: list[pathlib.Path]) -> dict:
    if not files:
        found = sorted(RESULTS.glob("20*.json"))
        files = [file for file in found if "sources" not in json.loads(file.read_text())][-1:]
        if not files:
            raise ValueError("JSON: bench/results holds no run yet, name the file of one")
    loaded = [json.loads(file.read_text()) for file in files]
    if len(loaded) == 1 and "rows" in loaded[0]:
        return loaded[0]
    if any("sma_fast" not in run for run in loaded):
        raise ValueError("JSON: allowed are runs of `pytest bench`, or a single summary")
    return summary(loaded)


def main() -> None:
    from bench import report_gpu  # which takes its cells from here

    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=pathlib.Path, metavar="JSON")
    parser.add_argument("--save", action="store_true", help="write the summary to bench/results")
    parser.add_argument("--markdown", action="store_true", help="print README's table instead")
    arguments = parser.parse_args()
    try:
        result = _load(arguments.files)
        if "sources" in result:
            print(report_gpu.markdown(result) if arguments.markdown else report_gpu.text(result))
            return
        print(markdown(result) if arguments.markdown else table(result))
        if arguments.save:
            print(f"saved as bench/results/{save(result).name}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
