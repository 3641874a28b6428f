"""What a GPU is to reach: where it stands among the benchmarks, and when it counts."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from bench import gpu_benchmarks, gpu_processes, report_gpu, shapes, targets


def test_microseconds_on_a_gpu_are_those_of_graph_replay() -> None:
    (target,) = (
        t for t in targets.GPU_TARGETS if t.measure == "microseconds" and t.shape == "protein"
    )
    row = {"ours_s": 20e-6, "timing": "graph"}
    assert target.met(row) and not target.met({**row, "ours_s": 26e-6})
    assert target.met({**row, "timing": "events"}) is None


def test_no_benchmark_is_left_out() -> None:
    there = {f"bench/{file.name}" for file in (gpu_processes.ROOT / "bench").glob("bench_*.py")}
    assert set(gpu_benchmarks.FILES) == there


def test_readme_s_table_is_that_of_a_measurement_or_says_there_is_none() -> None:
    results = [
        json.loads(file.read_text())
        for file in (gpu_processes.ROOT / "bench/results").glob("*.json")
    ]
    measured = [result for result in results if result.get("driver")]
    readme = (gpu_processes.ROOT / "README.md").read_text()
    said = [
        "\n".join([*report_gpu.table(result["rows"]), "", report_gpu.extra_memory(result)])
        for result in measured or [{"rows": []}]
    ]
    assert any(text in readme for text in said)
    for sentence in ("No GPU has been measured yet", "No GPU has run this code yet"):
        assert (sentence in readme) == (not measured)


COLLECT = """
import contextlib, io, json, sys
import pytest

for which in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pytest.main(["bench", "--collect-only", "-q", "-p", "no:cacheprovider", "-k", which])
    lines = printed.getvalue().splitlines()
    print(json.dumps([line.partition("::")[2] for line in lines if "::" in line]))
"""
NAMES = {  # of what is not bench_OP[SHAPE]
    ("attention_scores", "all queries"): "bench_attention_scores_of_all_queries",
    ("pretraining_step", "informed mask"): "bench_pretraining_step_of_pictures",
    ("bipartition", "forward"): "bench_bipartition",
}


def test_what_has_targets_comes_first() -> None:
    runs = gpu_benchmarks.RUNS
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, json.dumps([run.which for run in runs])],
        cwd=gpu_processes.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    chosen = [
        {(test, run.dtype, run.batch) for test in json.loads(line)}
        for run, line in zip(runs, done.stdout.splitlines(), strict=True)
    ]
    wanted = set()
    for target in (*targets.TARGETS, *targets.GPU_TARGETS):
        if target.device != "cuda":
            continue
        name = NAMES.get((target.op, target.part), f"bench_{target.op}")
        name += "_backward" * (target.part == "backward")
        name += "_of_many" * (target.shape in shapes.SELECT_ON_GPU)
        if name not in ("bench_bipartition", "bench_pretraining_step_of_pictures"):
            name += f"[{target.shape}]"
        fixed = shapes.SHAPES[target.shape].fixed_batch
        batch = None if fixed else "8" if target.batch == 8 else "full"
        wanted.add((name, target.dtype, batch))
    first = [run.name for run in runs].index("cuts") + 1
    assert set().union(*chosen[:first]) == wanted
    assert sum(map(len, chosen)) == len(set().union(*chosen))  # and nothing twice
    everything = {test for run in chosen for test, _, _ in run}
    assert {"bench_informed_scores", "bench_gather_tokens[long]"} <= everything


def test_targets_name_shapes_at_their_batch() -> None:
    assert set(shapes.FULL_BATCH) == {*shapes.ALL, "patches", "vit-b16"}
    for target in targets.GPU_TARGETS:
        batches = {shapes.FULL_BATCH.get(target.shape), shapes.SHAPES[target.shape].batch, 8}
        assert target.device == "cuda" and target.batch_size in batches
