"""The speed to reach, from the issues: the one place where these figures stand."""

from typing import NamedTuple

from bench.shapes import COLREDUCE, FULL_BATCH, SELECT_ON_GPU, SHAPES


class Target(NamedTuple):
    """A bound on one row of the report.

    `measure` is "floor" (time over floor, at most), "copy rate" (bytes a second over those of a
    copy, at least), "best" (the faster of eager and compiled plain PyTorch over ours, at least),
    another peer's name (its time over ours, at least), "microseconds" or "MiB" (at most).
    """

    op: str
    part: str
    shape: str
    measure: str
    bound: float
    device: str = "cpu"
    dtype: str = "float32"
    batch: int | None = None  # None: the shape's own

    @property
    def batch_size(self) -> int:
        return self.batch or SHAPES[self.shape].batch

    @property
    def at_most(self) -> bool:
        return self.measure in ("floor", "microseconds", "MiB")

    def value(self, row: dict) -> float | None:
        """Returns what `row` measured, or None where the peer was left out."""
        if self.measure == "floor":
            return row["over_floor"]
        if self.measure == "copy rate":
            return row["bytes"] / row["ours_s"] / row["copy_rate"]
        if self.measure == "microseconds":
            if self.device == "cuda" and row["timing"] != "graph":
                return None  # the bound is one under graph replay
            return row["ours_s"] * 1e6
        if self.measure == "MiB":
            return row["peak_bytes"] / 2**20
        if self.measure == "half of published":
            return row["peers"]["published"]["peak_bytes"] / 2 / row["peak_bytes"]
        names = ("eager", "compiled") if self.measure == "best" else (self.measure,)
        ratios = [row["peers"].get(name, {}).get("ratio") for name in names]
        return None if None in ratios else min(ratios)

    def met(self, row: dict) -> bool | None:
        value = self.value(row)
        if value is None:
            return None
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        if self.measure == "copy rate":
            return f">= {self.bound:.0%} of the copy rate"
        if self.measure == "half of published":
            return f"<= {self.measure}"
        if not self.at_most and self.bound * 2 % 1 > 1e-6:  # not so many times faster, but a share
            return f"<= {1 / self.bound:.0%} of {self.measure}"
        unit = {"floor": "x floor", "microseconds": "us", "MiB": "MiB"}.get(
            self.measure, f"x {self.measure}"
        )
        return f"{'<=' if self.at_most else '>='} {self.bound:g} {unit}"


TARGETS = (
    Target("bipartition", "forward", "patches", "eigh", 10),
    Target("bipartition", "forward", "patches", "floor", 1.5),
    *(
        Target("self_guided_masking", "forward", shape, "floor", 1.4)
        for shape in ("protein", "molecule", "image", "long")
    ),
    Target("self_guided_masking", "forward", "protein", "best", 5),
    Target("self_guided_masking", "forward", "molecule", "best", 2.5),
    *(
        Target("self_guided_masking", "forward", shape, "best", 3)
        for shape in ("physics", "image", "long")
    ),
    *(
        Target("self_guided_masking", "forward", shape, "published", 20)
        for shape in ("protein", "molecule", "image")
    ),
    Target("random_masking", "forward", "vit", "mae", 8),
    *(
        Target(op, part, shape, "floor", 1.3)
        for op in ("gather_tokens", "restore_tokens")
        for part in ("forward", "backward")
        for shape in ("vit", "protein")
    ),
    Target("select_tokens", "forward", "protein", "topk+scatter+nonzero", 4),
    Target("select_tokens", "forward", "long", "topk+scatter+nonzero", 15),
    Target("select_tokens", "fixed cost", "2x16", "microseconds", 25),
    Target("self_guided_masking", "fixed cost", "2x16", "microseconds", 40),
    Target("self_guided_masking", "fixed cost, drawn", "2x16", "microseconds", 40),
    Target("self_guided_masking", "peak memory", "long", "MiB", 96),
    *(
        Target("pretraining_step", "changed parts", name, "published", 4, batch=batch)
        for name, batch in (("physics", 256), ("molecule", 8), ("protein", 8))
    ),
    Target("pretraining_step", "whole", "physics", "published", 2, batch=256),
    Target("pretraining_step", "whole", "molecule", "published", 1.5, batch=8),
    Target("pretraining_step", "whole", "protein", "published", 1.5, batch=8),
    *(  # at most 1.03 times a step with random masks
        Target("pretraining_step", "whole", name, "random mask", 1 / 1.03, batch=batch)
        for name, batch in (("physics", 256), ("molecule", 8), ("protein", 8))
    ),
    Target("pretraining_step", "informed mask", "vit-b16", "whole step", 1 / 0.03),  # 3 % of it
    *(
        Target("pretraining_step", "peak memory", name, "half of published", 1, batch=batch)
        for name, batch in (("physics", 256), ("molecule", 8), ("protein", 8))
    ),
)

# Memory beyond inputs and outputs that one op may take on a GPU, whatever M and N.
EXTRA_BYTES = 2**20


def _gpu(op: str, part: str, shape: str, measure: str, bound: float, **others) -> Target:
    given = {"device": "cuda", "dtype": "bfloat16", "batch": FULL_BATCH.get(shape)} | others
    return Target(op, part, shape, measure, bound, **given)


GPU_TARGETS = (
    *(
        _gpu(op, part, shape, "copy rate", 0.85)
        for op in ("gather_tokens", "restore_tokens")
        for part in ("forward", "backward")
        for shape in ("vit", "protein")
    ),
    *(  # scores are float32 whatever the tokens are
        _gpu("select_tokens", "forward", shape, "copy rate", 0.7, dtype="float32")
        for shape in SELECT_ON_GPU
    ),
    _gpu("attention_scores", "forward", "protein", "floor", 1.4),
    *(  # float16, as in its README
        _gpu("attention_scores", "all queries", shape, "flash-colreduce", 1.5, dtype="float16")
        for shape in COLREDUCE
    ),
    *(
        _gpu("self_guided_masking", "forward", shape, measure, bound)
        for shape in ("protein", "molecule")
        for measure, bound in (("floor", 1.5), ("compiled", 5), ("published", 25))
    ),
    *(
        _gpu("self_guided_masking", "forward", shape, "microseconds", 25, batch=8)
        for shape in ("protein", "molecule")
    ),
    _gpu("random_masking", "forward", "vit", "compiled", 4),
    *(
        _gpu("bipartition", "forward", "patches", measure, bound, dtype="float32")
        for measure, bound in (("eigh", 50), ("floor", 2))
    ),
    _gpu("pretraining_step", "informed mask", "vit-b16", "whole step", 1 / 0.03),
)


def targets_of(row: dict) -> list[Target]:
    """Returns the targets that speak of this row."""
    key = (row["op"], row["part"], row["shape"], row["device"], row["dtype"], row["batch"])
    return [
        t
        for t in (*TARGETS, *GPU_TARGETS)
        if key == (t.op, t.part, t.shape, t.device, t.dtype, t.batch_size)
    ]
