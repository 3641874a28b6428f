"""bench.tune: how Triton's launch settings are measured, without a GPU, and how they are used."""

import contextlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parent.parent

from sma_fast.kernels import launching, settings  # noqa: E402

from bench import tune  # noqa: E402
from bench.cubins import Usage  # noqa: E402
from bench.tune_cases import ENTRIES  # noqa: E402

CPU = torch.device("cpu")


def test_every_entry_is_measured() -> None:
    assert set(ENTRIES) == set(settings.DEFAULT)
    for name, entry in ENTRIES.items():
        assert entry.cases, name
        for each in settings.DEFAULT[name]:
            assert set(entry.candidates) < set(each), name
    for architecture, measured in settings.MEASURED.items():
        assert set(settings.MEASURED_ON[architecture]) == set(measured) <= set(ENTRIES)


def test_classes_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    default = ({"up_to": 4, "num_warps": 1}, {"up_to": 16, "num_warps": 2})
    measured = ({"up_to": 8, "num_warps": 4}, {"up_to": None, "num_warps": 8})
    monkeypatch.setattr(settings, "DEFAULT", {"x": default, "y": default})
    monkeypatch.setattr(settings, "MEASURED", {"sm_90": {"x": measured}})

    def warps(entry: str) -> list[int]:
        return [launching.setting(entry, CPU, size)["num_warps"] for size in (4, 5, 16, 99)]

    assert warps("x") == warps("y") == [1, 2, 2, 2] and launching.longest("x", CPU) == 16
    with launching.on_architecture("sm_90"):
        assert warps("x") == [4, 4, 8, 8] and warps("y") == [1, 2, 2, 2]
    with launching.on_architecture("sm_89"):
        assert warps("x") == [1, 2, 2, 2]


def dry_run(*options: str) -> subprocess.CompletedProcess:
    inherited = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.tune", "--dry-run", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited,
    )


def assert_tidy(file: Path) -> None:
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if ruff is None:
        assert all(len(line) <= 100 for line in file.read_text().splitlines())
        return
    for command in (["check"], ["format", "--check", "--diff"]):
        options = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
        done = subprocess.run([ruff, *command, *options, file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_dry_run_measures_and_writes_all(tmp_path: Path) -> None:
    file = tmp_path / "settings.py"
    ended = dry_run("--write", "--out", str(file))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("made up, sm_90, no time is real\n")
    found = runpy.run_path(str(file))
    assert found["DEFAULT"] == settings.DEFAULT and set(found["MEASURED"]["sm_90"]) == set(ENTRIES)
    assert found["MEASURED"]["sm_90"] != settings.DEFAULT
    for name, classes in found["MEASURED"]["sm_90"].items():
        assert [x["up_to"] for x in classes] == [x["up_to"] for x in settings.DEFAULT[name]]
        on = found["MEASURED_ON"]["sm_90"][name]
        assert re.fullmatch(r"made up, torch \S+, Triton \S+, \d{4}-\d\d-\d\d", on)
        shown = re.findall(rf"^{re.escape(name)}, up to (\w+): ", ended.stdout, re.M)
        assert shown == [str(x["up_to"]) for x in classes]
    text = file.read_text()
    assert "# sm_80: never measured, DEFAULT holds\n" in text
    assert f"# sm_90: {len(ENTRIES)} of {len(ENTRIES)} entries measured" in text
    assert_tidy(file)
    for part in ended.stdout.split("\n\n"):  # what spills is not taken
        left_out = re.findall(r"^  (.*): left out, spills \d+ bytes$", part, re.M)
        assert not set(left_out) & set(re.findall(r"^  taken: (.*)$", part, re.M))
    assert "left out, spills" in ended.stdout


def test_compiled_candidates() -> None:
    ended = dry_run("--compile", "--op", "gather_tokens_backward.notes")
    assert ended.returncode == 0, ended.stderr
    registers = re.findall(r"of the best before, (\d+) registers", ended.stdout)
    assert registers and all(8 < int(number) < 256 for number in registers)
    assert "gather_tokens_backward, up" not in ended.stdout


def test_what_is_taken_holds_for_later_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = settings.MEASURED.copy(), []

    def tuned(tuner: tune.Tuner) -> tuple[dict, ...]:
        seen.append(settings.MEASURED.get("sm_90", {}).get("draw_queries"))
        return ({"up_to": None, "block": len(seen)},)

    monkeypatch.setattr(tune.Tuner, "tuned", tuned)
    assert tune.main(["--dry-run", "--op", "draw_queries"]) == 0
    assert seen == [before.get("sm_90", {}).get("draw_queries"), ({"up_to": None, "block": 1},)]
    assert settings.MEASURED == before


REPORTED = {  # what a variant of the report takes with a candidate: why it is left out
    "spills": (Usage(32, 0, 8, 0), "spills in a wide one, 4 warps"),
    "spills less": (Usage(32, 0, 4, 0), None),
    "does not fit": (Usage(32, 1 << 20, 0, 0), "asks for 1048576 bytes"),
    "does not compile": (None, "does not compile"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_candidates_are_for_all_variants_of_the_report(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, entry = tune.MadeUp(90, False), "informed_scores"
    taken, reason = REPORTED[name]

    def launches(capability: int) -> list[str]:
        with launching.on_architecture(f"sm_{capability}"):
            warps = launching.setting(entry, CPU)["num_warps"]
        return ["another op's", f"a narrow one, {warps} warps", f"a wide one, {warps} warps"]

    def usage(launch: str) -> Usage:
        if "wide" not in launch:
            return Usage(32, 0, 0, 0)
        if "4 warps" not in launch:
            return Usage(32, 0, 4, 0)  # what is spilled already
        if taken is None:
            raise RuntimeError("no such instruction")
        return taken

    monkeypatch.setattr(tune.kernels_triton, "launches", launches)
    machine.usage = usage
    trial = tune.Trial(tune.Tuner(machine, entry), 0, ENTRIES[entry].cases[0])
    trial.check_report(trial.tuner.classes[0])
    raises = pytest.raises(tune.LeftOut, match=reason) if reason else contextlib.nullcontext()
    with raises:
        trial.check_report({**trial.tuner.classes[0], "num_warps": 4})


def test_what_was_measured_before_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, other = ({"up_to": None, "block": 1},), ({"up_to": None, "block": 2},)
    before = {"sm_80": {"sum_heads": one}, "sm_90": {"sum_heads": one, "gather_tokens": one}}
    where = {name: dict.fromkeys(entries, "then") for name, entries in before.items()}
    monkeypatch.setattr(settings, "MEASURED", before)
    monkeypatch.setattr(settings, "MEASURED_ON", where)
    file = tmp_path / "settings.py"
    machine = tune.MadeUp(90, False)
    file.write_text(tune.written(machine, {"sum_heads": other}))
    found = runpy.run_path(str(file))
    assert found["MEASURED"] == {
        "sm_80": {"sum_heads": one},
        "sm_90": {"sum_heads": other, "gather_tokens": one},
    }
    assert found["MEASURED_ON"]["sm_80"] == {"sum_heads": "then"}
    assert found["MEASURED_ON"]["sm_90"]["gather_tokens"] == "then"
    assert found["MEASURED_ON"]["sm_90"]["sum_heads"].startswith("made up, torch")
    assert_tidy(file)


def test_the_table_is_as_it_would_be_written() -> None:
    text = tune.FILE.read_text()
    assert text.endswith(tune.MARK + tune.rendered(settings.MEASURED, settings.MEASURED_ON))


BAD = {
    "made up times": (["--dry-run", "--write"], "--write: what a dry run makes up"),
    "unknown op": (["--dry-run", "--op", "nothing"], "--op: unknown nothing, allowed are"),
    "no GPU": ([], "no GPU that torch can use; --dry-run needs none"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments, said = BAD[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert said in capsys.readouterr().err
