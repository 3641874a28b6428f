"""One variant of a benchmark, ours or a peer's: checked, planned, and timed round by round."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch

import sma_fast
from bench import gpu_rounds, roofline

ROUNDS = 100  # at most


@dataclasses.dataclass
class Variant:
    """`check` raises AssertionError where an answer is wrong."""

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], None]
    device: str
    ours: bool
    forced: str | None = None  # the backend to force while it runs
    answered: bool = False  # once, and rightly
    estimate: float = 0.0  # seconds a call
    rounds: int = 1
    calls: int = 1
    on_gpu: gpu_rounds.Rounds | None = None  # instead of the clock
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def timing(self) -> str:
        return self.on_gpu.timing if self.on_gpu else "clock"

    def force(self) -> contextlib.AbstractContextManager:
        return sma_fast.use_backend(self.forced) if self.forced else contextlib.nullcontext()

    def answer(self) -> None:
        """Calls it once, and checks the answer."""
        with self.force():
            start = roofline.clock(self.device)
            answer = self.call()
            self.estimate = roofline.clock(self.device) - start
        self.check(answer)
        self.answered = True

    def plan(self, budget: float, calls: int, graph: bool, quick: bool) -> None:
        """Chooses the rounds that fit into a time.

        Args:
            budget: seconds.
            calls: in a round by the clock; 1: the GPU has rounds of its own.
            graph: it may be captured.
        """
        # the first call warmed up or compiled; only a slow one that did not compile is not repeated
        if self.device == "cuda" and calls == 1:
            with self.force():
                self.on_gpu = gpu_rounds.Rounds(self.call, self.check, graph)
            self.estimate, self.calls = self.on_gpu.estimate, self.on_gpu.calls
            budget /= 2  # each round comes twice
        else:
            if self.estimate < 1.0 or self.name == "compiled":
                self.estimate = self.round()
            self.calls = calls
        rounds = 2 if quick else int(budget / (self.estimate * self.calls))
        self.rounds = min(max(rounds, 2), ROUNDS)

    def round(self) -> float:
        """Returns the seconds of one call, from a round of them."""
        tidy_memory()
        if self.on_gpu:
            return self.on_gpu.seconds()
        with self.force():
            start = roofline.clock(self.device)
            for _ in range(self.calls):
                self.call()
            return (roofline.clock(self.device) - start) / self.calls


def tidy_memory() -> None:
    torch.empty(1 << 16, dtype=torch.uint8)


class Rest:
    """The variants beside ours: what goes wrong with one of them takes nothing else with it.

    `skipped` has the reasons why they are not timed, `failed` those of our own other backends that
    are no mere lack of memory or of an implementation.
    """

    def __init__(self, variants: Iterable[Variant], skipped: dict[str, str]) -> None:
        self.variants = list(variants)
        self.skipped = skipped
        self.failed: list[str] = []

    def each(self, step: Callable[[Variant], None]) -> None:
        """Does a step with each variant, and goes on without those that fail in it."""
        for variant in self.variants[:]:
            try:
                step(variant)
            except Exception as error:
                self.variants.remove(variant)
                self._leave_out(variant, error)

    def _leave_out(self, variant: Variant, error: Exception) -> None:
        memory_ran_out = isinstance(error, torch.OutOfMemoryError)
        why = "out of memory" if memory_ran_out else _first_line(error)
        if variant.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as broken:  # then ours cannot be timed in this process either
                raise RuntimeError(f"{variant.name} broke the GPU's context: {why}") from broken
        if variant.ours and not memory_ran_out:
            if variant.answered or isinstance(error, AssertionError):
                self.failed.append(f"{variant.name}: {why}")
        self.skipped[variant.name] = why
        variant.on_gpu = None  # with its copies of the inputs
        if memory_ran_out and variant.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    if isinstance(error, AssertionError):
        return f"a wrong answer: {error}".splitlines()[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
