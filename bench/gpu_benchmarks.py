"""The stage of bench.gpu that runs the benchmarks: what has targets first, should time run out."""

import time
from typing import NamedTuple

from bench.gpu_processes import GOOD, TICK, Asked, Record, each_test, pytest


class Run(NamedTuple):
    """Benchmarks that share a process and a type."""

    name: str
    dtype: str
    batch: str | None  # "full", a number, or each shape's own
    which: str  # an expression for -k


# What does not depend on the tokens' type is timed in one of them.
ONE_TYPE = "select_tokens or draw_queries or of_all_queries"
FIXED = "fixed_cost or peak_memory or pretraining_step"
# in bfloat16, with a batch that fills the GPU
TARGETS = (
    "bench_self_guided_masking and (protein or molecule) and not masking_drawn"
    " or bench_attention_scores and protein or bench_random_masking and vit"
    " or (bench_gather_tokens or bench_restore_tokens) and (vit or protein)"
)
# Most important first: down to "cuts" all have a target.
RUNS = (
    Run("targets", "bfloat16", "full", f"({TARGETS}) and not ({FIXED})"),
    Run(
        *("small batch", "bfloat16", "8"),
        f"bench_self_guided_masking and (protein or molecule) and not (masking_drawn or {FIXED})",
    ),
    Run("rows", "float32", None, "select_tokens_of_many"),
    Run("all queries", "float16", None, "of_all_queries"),
    Run("step", "bfloat16", "full", "pretraining_step_of_pictures"),
    Run("cuts", "float32", "full", "bench_bipartition"),
    Run("small batch, drawn", "bfloat16", "8", "masking_drawn"),
    Run("bfloat16", "bfloat16", "full", f"not ({ONE_TYPE} or {FIXED} or {TARGETS})"),
    Run("float32", "float32", "full", f"not (of_many or of_all_queries or {FIXED} or bipartition)"),
    Run("fixed cost", "bfloat16", None, "bench_overhead"),
)
FILES = tuple(
    f"bench/bench_{name}.py"
    for name in (
        *("self_guided_masking", "attention_scores", "random_masking", "gather_tokens"),
        *("restore_tokens", "select_tokens", "bipartition", "pretraining_step"),
        *("informed_scores", "draw_queries", "aggregate_attention", "overhead"),
    )
)


def benchmarks(result: dict, asked: Asked, until: float) -> bool:
    """Runs what has not been measured yet of RUNS; returns whether all of it was."""
    stage = result.setdefault("benchmarks", {})
    good = True
    for each in RUNS:
        which = f"({each.which}) and ({asked.chosen})" if asked.chosen else each.which
        run = stage.setdefault(each.name, {})
        if not (run.get("complete") and run["which"] == which):
            _measure(result, run, each._replace(which=which), asked, until)
        good = good and run["complete"]
    return good


def _measure(result: dict, run: dict, wanted: Run, asked: Asked, until: float) -> None:
    command = [*FILES, "--benchmark-quiet", "--device", asked.device, "--dtype", wanted.dtype]
    command += ["-k", wanted.which, *(["--batch", wanted.batch] if wanted.batch else [])]
    command += ["--quick", "--no-compile"] if asked.quick else []
    run |= {**wanted._asdict(), "complete": False}
    record = Record(run)
    rows = result["rows"]
    saved = time.monotonic()

    def take(line: dict) -> None:
        nonlocal saved
        if "outcome" in line:
            record.add(line)
        elif "op" in line:
            rows[:] = [row for row in rows if _key(row) != (wanted.name, line["test"])]
            rows.append({"run": wanted.name, **line})
            measured = {name: line[name] for name in ("copy_rate", "matrix_rate") if name in line}
            if measured:
                result["rates"].setdefault(wanted.dtype, measured)
        elif "rates" in line:
            result["rates"].update(line["rates"])
        if time.monotonic() > saved + TICK:
            asked.save()
            saved = time.monotonic()

    done, last = record.done(), list(record.failures)
    ended = each_test(pytest(*command, "--rows={lines}"), until, take, done, last)
    run.pop("tail", None)
    run |= ended.summary()
    run["complete"] = ended.status in GOOD and not record.failures
    asked.save()


def _key(row: dict) -> tuple[str, str]:
    return row["run"], row["test"]
