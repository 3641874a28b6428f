"""`sma-fast` in processes of their own, forked from one that has imported everything already."""

import gc
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import load_file

TINY = (
    "--set embedded_channels=16 latent_channels=16 qk_channels=16 decoder_channels=16 "
    "num_self_attends_per_block=1 num_self_attention_heads=2 num_cross_attention_heads=2"
).split()
PHYSICS = ["--preset", "physics", "--scale", "small", "--batch-size", "16", *TINY]
PROTEIN = [
    *"--preset protein --scale small --batch-size 8 --input sequence --set embedded_channels=16 "
    "latent_channels=16 qk_channels=16 v_channels=16 decoder_channels=16 num_latents=4 "
    "max_position_embeddings=32 num_self_attends_per_block=1".split(),
]

WRITERS = ("torch.save", "safetensors.torch.save_file")

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["sma_fast.cli", "sma_fast.training.run", "sma_fast.models"])


def forks(cache: Path) -> SimpleNamespace:
    """Returns what stands in for multiprocessing in bench.runs: pools of forks.

    Args:
        cache: the folder of their converted files.
    """

    def pool(processes: int, initializer: Callable[[], None], maxtasksperchild: int) -> Any:
        return _forks.Pool(processes, _begin, (initializer, cache), maxtasksperchild)

    return SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=pool))


def _begin(initializer: Callable[[], None], cache: Path) -> None:
    import datasets

    gc.freeze()
    datasets.config.HF_DATASETS_CACHE = cache
    initializer()


@dataclass
class Ended:
    """How a process ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def results(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def refusal(self) -> str:
        """The only line of a message that says what to do."""
        assert self.code == 1, (self.code, self.out, self.err)
        lines = [line for line in self.err.splitlines() if line.startswith("sma-fast: error: ")]
        assert len(lines) == 1 and self.err.endswith(lines[0] + "\n"), self.err
        assert "Traceback" not in self.err, self.err
        return lines[0]


@dataclass
class Run:
    """A process of `sma-fast`.

    Args:
        arguments: of the command line.
        place: folder for what it prints.
        dies: (dotted name of a function, how many calls), to be killed inside the last of them.
        environment: variables beside those there are.
        largest_file: bytes that the process can write to a file: a disk that is full after them.
    """

    arguments: Sequence[Any]
    place: Path
    dies: tuple[str, int] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    largest_file: int | None = None

    def __post_init__(self) -> None:
        number = len(list(self.place.glob("*.out")))
        self.files = self.place / f"{number}.out", self.place / f"{number}.err"
        self.files[0].touch()
        given = (list(map(str, self.arguments)), self.files, self.dies, self.environment)
        self.process = _forks.Process(target=_run, args=(*given, self.largest_file))
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> Ended:
        self.process.join(120)
        assert self.process.exitcode is not None, "does not end"
        return Ended(self.process.exitcode, *(file.read_text() for file in self.files))


def _run(arguments, files, dies, environment, largest_file) -> None:
    gc.freeze()  # what was imported before the fork, through which every collection would look
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    os.environ |= environment
    import torch

    torch.set_num_threads(1)
    if dies is not None:
        _die_in(*dies)
    if "COMPILE_BACKEND" in environment:  # another one than inductor, which takes minutes
        from sma_fast.training import run

        wrapped, backend = run.training_arguments, environment["COMPILE_BACKEND"]
        run.training_arguments = lambda *a, **n: wrapped(*a, **n, torch_compile_backend=backend)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from sma_fast import cli

    try:
        code = cli.main(arguments)
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_in(name: str, calls: int) -> None:
    # killed in the last call: before its work, but behind half of the file that it would write
    owner_name, _, attribute = name.rpartition(".")
    try:
        owner = importlib.import_module(owner_name)
    except ModuleNotFoundError:
        module, _, kind = owner_name.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    original, done = getattr(owner, attribute), []

    def dying(*arguments, **named):
        done.append(1)
        if len(done) == calls:
            for path in arguments if name in WRITERS else ():
                if isinstance(path, str | Path):
                    Path(path).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(owner, attribute, dying)


def write_table(file: Path, rows: int = 112, seed: int = 0) -> Path:
    """Writes columns a, b, c, d of numbers and y, whether a + b is above 0."""
    draw = random.Random(seed)
    lines = ["a,b,c,d,y"]
    for _ in range(rows):
        values = [draw.gauss(0, 1) for _ in range(4)]
        lines.append(",".join(f"{v:.4f}" for v in values) + f",{int(values[0] + values[1] > 0)}")
    file.write_text("\n".join(lines) + "\n")
    return file


def write_proteins(file: Path, rows: int = 72, seed: int = 0) -> Path:
    """Writes columns sequence, of 8 to 30 letters, and target, the share of A."""
    draw = random.Random(seed)
    lines = ["sequence,target"]
    for _ in range(rows):
        text = "".join(draw.choices("ACDEFG", k=draw.randint(8, 30)))
        lines.append(f"{text},{text.count('A') / len(text):.4f}")
    file.write_text("\n".join(lines) + "\n")
    return file


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name, strict=True)


def difference(a: Path, b: Path) -> float:
    """Returns the largest difference of two models' weights, relative to their size.

    Biases of keys are left out: they change no attention, so that their gradient is rounding only,
    which Adam makes as large as any other.
    """
    one, other = weights(a), weights(b)
    names = [name for name in one if not name.endswith(".key.bias")]
    assert one.keys() == other.keys() and names
    return max(np.abs(one[n] - other[n]).max() / max(np.abs(one[n]).max(), 1e-2) for n in names)
