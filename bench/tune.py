"""Measures Triton's launch settings on this GPU: `python -m bench.tune [--op OP] [--write]`.

Of each entry of kernels.settings the candidates are timed on the benchmarks' shapes, as bench.gpu
times (graph replay, median, inputs beyond the L2), one setting after the other from those in use; a
class of size goes by the mean over its shapes, with what was taken for the entries before it. What
spills, there or in another variant of the report, does not compile, asks for more shared memory
than there is or gives another answer is left out. --write puts the best into kernels/settings.py,
for this architecture alone, with device, versions and date.

--dry-run needs no GPU: it goes the same way with times that are made up. With --compile the
registers and spills it prints are real.
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu_rounds, kernels_triton
from bench.cubins import Usage
from bench.tune_cases import ENTRIES, Case

FILE = Path(__file__).parents[1] / "kernels" / "settings.py"
MARK = "# ---- from here on written by bench.tune ----\n"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # named in the file, measured or not
ROUNDS = 11
GAIN = 0.02  # a candidate that is not faster by so much changes nothing
SHARED_BYTES = 227 * 1024  # of a block, where no GPU says

Class = dict[str, int | None]
Call = functools.partial


class LeftOut(Exception):
    """Why a candidate is not to be taken."""


def settings() -> Any:
    return importlib.import_module("sma_fast.kernels.settings")


def launching() -> Any:
    return importlib.import_module("sma_fast.kernels.launching")


@contextlib.contextmanager
def in_use(entry: str, classes: tuple[Class, ...], architecture: str) -> Iterator[None]:
    """Puts classes in the place of what is measured for an architecture."""
    measured = settings().MEASURED
    before = measured.get(architecture)
    measured[architecture] = {**(before or {}), entry: classes}
    try:
        yield
    finally:
        if before is None:
            del measured[architecture]
        else:
            measured[architecture] = before


class OnGpu:
    """Times calls on this machine's GPU."""

    device = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.capability = 10 * properties.major + properties.minor
        self.shared_bytes = getattr(
            properties, "shared_memory_per_block_optin", SHARED_BYTES
        )  # torch from 2.7 on
        self.name = properties.name

    def inputs(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def usage(self, launch: kernels_triton.Launch) -> Usage:
        return kernels_triton.usage(launch, self.capability)

    def answer(self, call: Call) -> Any:
        return call()

    def seconds(self, call: Call, check: Callable[[Any], None]) -> float:
        """Returns the median over rounds of a call's time; raises where its answer is wrong."""
        check(call())
        rounds = gpu_rounds.Rounds(call, check, graph=True)
        return statistics.median(rounds.seconds() for _ in range(ROUNDS))


class MadeUp:
    """Stands in for a GPU: tensors without memory, and times and registers from a hash."""

    device = "cpu"
    shared_bytes = SHARED_BYTES

    def __init__(self, capability: int, compiles: bool) -> None:
        from torch._subclasses import FakeTensorMode

        self.capability, self.compiles = capability, compiles
        self.name = "made up"
        self.fake = FakeTensorMode()

    def inputs(self) -> contextlib.AbstractContextManager:
        return self.fake

    def usage(self, launch: kernels_triton.Launch) -> Usage:
        if self.compiles:
            return kernels_triton.usage(launch, self.capability)
        number = _hash(f"{launch} {launch.options}")
        return Usage(16 + number % 200, 0, 0, 8 * (number % 61 == 0))

    def answer(self, call: Call) -> Any:
        return None

    def seconds(self, call: Call, check: Callable[[Any], None]) -> float:
        with self.fake:
            launches = kernels_triton.recorded(call)
        return 1e-6 * (100 + _hash(str([(*map(str, launches), x.options) for x in launches])) % 900)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class Tuner:
    """One entry of the table, on one machine."""

    def __init__(self, machine: OnGpu | MadeUp, entry: str) -> None:
        self.machine, self.entry = machine, entry
        self.architecture = f"sm_{machine.capability}"
        with launching().on_architecture(self.architecture):
            self.classes = launching().classes(entry, torch.device("cpu"))

    def tuned(self) -> tuple[Class, ...]:
        """Returns the classes with the best settings, having printed all that were tried."""
        found = list(self.classes)
        for number, cases in self._by_class().items():
            found[number] = self._best(number, cases)
        return tuple(found)

    def _by_class(self) -> dict[int, list[Case]]:
        found: dict[int, list[Case]] = {}
        for case in ENTRIES[self.entry].cases:
            fits = (n for n, x in enumerate(self.classes) if (x["up_to"] or case.size) >= case.size)
            found.setdefault(next(fits, len(self.classes) - 1), []).append(case)
        return dict(sorted(found.items()))

    def _best(self, number: int, cases: list[Case]) -> Class:
        best = self.classes[number]
        print(f"\n{self.entry}, up to {best['up_to']}: {', '.join(map(str, cases))}")
        trials = [Trial(self, number, case) for case in cases]
        now = [trial.first() for trial in trials]
        self._print(best, now, 1.0, trials)
        for name, values in ENTRIES[self.entry].candidates.items():
            current, start = best, now
            for value in values:
                candidate = {**current, name: value}
                if value == current[name]:
                    continue
                try:
                    seconds = [trial.seconds(candidate) for trial in trials]
                except LeftOut as reason:
                    print(f"  {_shown(candidate)}: left out, {reason}", flush=True)
                    continue
                over = math.prod(a / b for a, b in zip(seconds, start, strict=True))
                over **= 1 / len(trials)
                self._print(candidate, seconds, over, trials)
                against = math.prod(a / b for a, b in zip(seconds, now, strict=True))
                if against >= (1 - GAIN) ** len(trials):
                    continue
                try:
                    trials[0].check_report(candidate)
                except LeftOut as reason:
                    print(f"  {_shown(candidate)}: left out, {reason}", flush=True)
                    continue
                best, now = candidate, seconds
        print(f"  taken: {_shown(best)}")
        return best

    def _print(
        self, tried: Class, seconds: list[float], over: float, trials: list["Trial"]
    ) -> None:
        times = ", ".join(f"{1e6 * x:.1f}" for x in seconds)
        registers = max((trial.registers for trial in trials), default=0)
        print(
            f"  {_shown(tried)}: {times} us, {over:.2f} of the best before, {registers} registers",
            flush=True,
        )


def _shown(tried: Class) -> str:
    return " ".join(f"{name} {x}" for name, x in tried.items() if name != "up_to")


class Trial:
    """One class of an entry on one case."""

    def __init__(self, tuner: Tuner, number: int, case: Case) -> None:
        self.tuner, self.number, self.machine = tuner, number, tuner.machine
        launch = importlib.import_module(f"sma_fast.kernels.{case.op}").launch
        with self.machine.inputs():
            arguments = case.arguments(case.shape, self.machine.device, case.dtype)
        self.call = functools.partial(launch, *arguments)
        self.wanted: Any = None
        self.fixed: set[kernels_triton.Launch] = set()  # that the settings at hand start
        self.registers = 0

    def first(self) -> float:
        """Returns the seconds with the settings in use, whatever they spill."""
        with self._with(self.tuner.classes[self.number]):
            self.fixed = set(self._launches())
            usages = [self.machine.usage(launch) for launch in self.fixed]
            self.registers = max((usage.registers for usage in usages), default=0)
            self.wanted = self.machine.answer(self.call)
            return self.machine.seconds(self.call, self._check)

    def seconds(self, candidate: Class) -> float:
        """Returns the seconds with a candidate; raises LeftOut where it is not to be taken."""
        with self._with(candidate):
            launches = self._launches()
            self.registers = 0
            for launch in set(launches):
                usage = self._usage(launch)
                if usage.spilled_bytes and launch not in self.fixed:  # else not its doing
                    raise LeftOut(f"spills {usage.spilled_bytes} bytes")
                self.registers = max(self.registers, usage.registers)
            try:
                return self.machine.seconds(self.call, self._check)
            except AssertionError as error:
                raise LeftOut(f"gives another answer: {error}") from error
            except torch.OutOfMemoryError as error:
                raise LeftOut("out of memory") from error

    def check_report(self, candidate: Class) -> None:
        """Raises LeftOut where a variant of the report is not to have a candidate.

        That is where it does not compile or fit, or spills more than those in its place.
        """

        def report(chosen: Class) -> set[kernels_triton.Launch]:
            with self._with(chosen):
                return set(kernels_triton.launches(self.machine.capability))

        before, after = report(self.tuner.classes[self.number]), report(candidate)
        most = max((self.machine.usage(x).spilled_bytes for x in before - after), default=0)
        for launch in after - before:
            if self._usage(launch).spilled_bytes > most:
                raise LeftOut(f"spills in {launch}")

    def _usage(self, launch: kernels_triton.Launch) -> Usage:
        try:
            usage = self.machine.usage(launch)
        except Exception as error:  # of Triton's many compilers, whichever refuses it
            raise LeftOut(f"does not compile: {str(error).splitlines()[:1]}") from error
        if usage.shared_bytes > self.machine.shared_bytes:
            raise LeftOut(f"asks for {usage.shared_bytes} bytes of shared memory")
        return usage

    def _launches(self) -> list[kernels_triton.Launch]:
        with self.machine.inputs():
            return kernels_triton.recorded(self.call)

    @contextlib.contextmanager
    def _with(self, chosen: Class) -> Iterator[None]:
        classes = list(self.tuner.classes)
        classes[self.number] = chosen
        architecture = self.tuner.architecture
        with (
            launching().on_architecture(architecture),
            in_use(self.tuner.entry, tuple(classes), architecture),
        ):
            yield

    def _check(self, answer: Any) -> None:
        torch.testing.assert_close(answer, self.wanted, rtol=1e-3, atol=1e-5, equal_nan=True)


def rendered(measured: dict[str, dict[str, tuple[Class, ...]]], where: dict[str, dict]) -> str:
    """Returns the part of kernels/settings.py behind MARK.

    Args:
        measured: by architecture and entry.
        where: by architecture and entry, on what each was measured.
    """
    lines = []
    for name in sorted({*ARCHITECTURES, *measured}, key=lambda x: int(x.removeprefix("sm_"))):
        entries = len(measured.get(name, {}))
        said = f"{entries} of {len(ENTRIES)} entries measured, DEFAULT holds for others"
        lines.append(f"# {name}: {said if entries else 'never measured, DEFAULT holds'}")
    if not any(measured.values()):
        return "\n".join([*lines, "MEASURED = {}", "MEASURED_ON = {}", ""])
    lines.append("MEASURED = {")
    for name, entries in sorted(measured.items()):
        lines.append(f'    "{name}": {{')
        for entry, classes in sorted(entries.items()):
            lines += _entry_lines(entry, classes)
        lines.append("    },")
    lines += ["}", "MEASURED_ON = {"]
    for name, entries in sorted(where.items()):
        lines.append(f'    "{name}": {{')
        lines += [f'        "{entry}": "{on}",' for entry, on in sorted(entries.items())]
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def _entry_lines(entry: str, classes: tuple[Class, ...]) -> list[str]:
    # as ruff would have them
    every = [[f'"{key}": {x}' for key, x in each.items()] for each in classes]
    one_line = f'        "{entry}": ({{{", ".join(every[0])}}},),'
    if len(every) == 1 and len(one_line) <= 100:
        return [one_line]
    lines = [f'        "{entry}": (']
    for items in every:
        line = f"            {{{', '.join(items)}}},"
        exploded = ["            {", *(f"                {x}," for x in items), "            },"]
        lines += [line] if len(line) <= 100 else exploded
    return [*lines, "        ),"]


def written(machine: OnGpu | MadeUp, found: dict[str, tuple[Class, ...]]) -> str:
    """Returns kernels/settings.py with what was found in place of what was measured before."""
    import triton

    head, _, _ = FILE.read_text().partition(MARK)
    on = f"{machine.name}, torch {torch.__version__}, Triton {triton.__version__}"
    on = f"{on}, {datetime.date.today().isoformat()}"
    name = f"sm_{machine.capability}"
    before, where = settings().MEASURED, settings().MEASURED_ON
    measured = {**before, name: before.get(name, {}) | found}
    where = {**where, name: where.get(name, {}) | dict.fromkeys(found, on)}
    return head + MARK + rendered(measured, where)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", default=[], help="entries, or ops with all of theirs")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, help="in place of kernels/settings.py")
    parser.add_argument("--dry-run", action="store_true", help="run nothing, make times up")
    parser.add_argument("--compile", action="store_true", help="in a dry run")
    parser.add_argument("--architecture", type=int, default=90, metavar="N", help="of a dry run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.dry_run and options.write and options.out is None:
        parser.error("--write: what a dry run makes up needs a file of its own, --out")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --dry-run needs none")
    chosen = [x for x in ENTRIES if not options.op or {x, x.split(".")[0]} & set(options.op)]
    unknown = set(options.op) - {y for x in ENTRIES for y in (x, x.split(".")[0])}
    if unknown:
        parser.error(
            f"--op: unknown {', '.join(sorted(unknown))}, allowed are {', '.join(ENTRIES)}"
        )
    machine = MadeUp(options.architecture, options.compile) if options.dry_run else OnGpu()
    print(f"{machine.name}, sm_{machine.capability}" + ", no time is real" * options.dry_run)
    found = {}
    with contextlib.ExitStack() as taken:  # what is taken for an entry holds for those after it
        for entry in chosen:
            found[entry] = Tuner(machine, entry).tuned()
            taken.enter_context(in_use(entry, found[entry], f"sm_{machine.capability}"))
            if options.write:  # after each: what was measured stays, should the time run out
                (options.out or FILE).write_text(written(machine, found))
    if options.write:
        print(f"\nwritten: {(options.out or FILE).name}, {len(found)} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
