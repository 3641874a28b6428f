"""The tables of bench.gpu's JSON: all rows as text, and README's table of what was to be reached.

What was not measured is said to be so.
"""

from bench.report import aligned, cells_of, losses
from bench.targets import EXTRA_BYTES, GPU_TARGETS, Target


def text(result: dict) -> str:
    """Returns the JSON as text."""
    head = ("date", "machine", "driver", "commit", "uncommitted_changes", "sources")
    lines = [f"{name}: {result.get(name)}" for name in head]
    lines += [*_rates(result), *ran(result), *_failures(result)]
    if result["quick"]:
        lines.append("QUICK: scaled-down shapes, these times mean nothing")
    return "\n".join([*lines, *aligned(result), extra_memory(result)])


def markdown(result: dict) -> str:
    """Returns what README says of a GPU: how it was measured, and the table of targets."""
    config = result["config"]
    commit = result["commit"] or ""
    changed = ", with changes" if result["uncommitted_changes"] else ""
    lines = [
        f"{result['date']}, {result['machine']}, driver {result.get('driver')}, CUDA "
        f"{result['nvcc']}, torch {config['torch']}, Triton {config['triton']}, Python "
        f"{config['python']}; {'; '.join(_rates(result))}; commit {commit[:10]}{changed}. "
        f"{'; '.join(ran(result))}.",
        "",
        *table(result["rows"]),
    ]
    return "\n".join([*lines, "", extra_memory(result), losses(result)])


def table(rows: list[dict]) -> list[str]:
    """Returns README's table: a line for each target."""
    lines = [
        "| op | shape | part | B | type | time | over floor | peers, times ours | to reach | met |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, targets in _by_row().items():
        op, part, shape, dtype, batch = key
        time, over, peers, met = "not measured", "", "", ""
        row = next((row for row in rows if _key(row) == key), None)
        if row:
            _, _, _, _, backend, ours, _, over, peers, _, _ = cells_of(row, quick=False)[0]
            time = f"{ours} ({backend})"
            met = "; ".join(line[-1] for line in cells_of(row, quick=False))
        reach = "; ".join(str(t).replace("<=", "≤").replace(">=", "≥") for t in targets)
        cells = (f"`{op}`", shape, part, batch, dtype, time, over, peers, reach, met)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _by_row() -> dict[tuple, list[Target]]:
    found: dict[tuple, list[Target]] = {}
    for t in GPU_TARGETS:
        found.setdefault((t.op, t.part, t.shape, t.dtype, t.batch_size), []).append(t)
    return found


def _key(row: dict) -> tuple | None:
    return row["device"] == "cuda" and (
        *(row[name] for name in ("op", "part", "shape", "dtype", "batch")),
    )


def _rates(result: dict) -> list[str]:
    return [
        f"{dtype}: copy {rate['copy_rate'] / 1e9:.0f} GB/s, "
        f"matrix {rate['matrix_rate'] / 1e12:.3g} TFLOP/s"
        for dtype, rate in result["rates"].items()
    ]


def ran(result: dict) -> list[str]:
    """Returns a line for each stage: what ran, and how it ended."""
    lines = ["tests: not run"]
    if "tests" in result:
        stage = result["tests"]
        counts = (f"{stage.get(n, 0)} {n}" for n in ("passed", "failed", "error", "skipped"))
        left = stage.get("left")
        lines = [f"tests: {', '.join(counts)}, {'?' if left is None else left} not run"]
    runs = result.get("benchmarks", {})
    bad = [f"{name}: {_said(run)}" for name, run in runs.items() if not run["complete"]]
    lines.append(f"benchmarks: {len(result['rows'])} rows" + f" ({'; '.join(bad)})" * bool(bad))
    for tool, stage in result.get("sanitizer", {}).items():
        said = "; ".join(stage.get("said", ()))
        counts = ", ".join(f"{stage[n]} tests {n}" for n in ("passed", "failed") if n in stage)
        lines.append(f"{tool}: " + ", ".join(filter(None, (stage["status"], counts, said))))
    return lines if "sanitizer" in result else [*lines, "compute-sanitizer: not run"]


def _said(run: dict) -> str:
    failed = len(run["failures"])
    return f"{failed} failed" if failed else run.get("status", "cut short")


def _failures(result: dict) -> list[str]:
    runs = result.get("benchmarks", {})
    found = [("", test, why) for test, why in result.get("tests", {}).get("failures", {}).items()]
    found += [(f"{run}: ", *each) for run in runs for each in runs[run]["failures"].items()]
    return [f"{run}{test}: {why[-1] if why else 'failed'}" for run, test, why in found]


def extra_memory(result: dict) -> str:
    """Returns the most that each op took beside its inputs and outputs."""
    most: dict[str, dict] = {}
    for row in result["rows"]:
        if row.get("extra_bytes") is not None:
            name = row["op"] + " backward" * (row["part"] == "backward")
            if row["extra_bytes"] >= most.get(name, row)["extra_bytes"]:
                most[name] = row
    found = [
        f"`{name}` {row['extra_bytes'] / 2**20:.2g} MiB on {row['shape']}, {row['dtype']}"
        + " (NO)" * (row["extra_bytes"] > EXTRA_BYTES)
        for name, row in most.items()
    ]
    limit = f"at most {EXTRA_BYTES / 2**20:g} MiB was to be reached"
    return f"Memory beside inputs and outputs ({limit}): {'; '.join(found) or 'not measured'}."
