"""What the command line refuses: one line that says what to do, before anything is done."""

import json
import shutil
from pathlib import Path

import pytest
import runs
from runs import PHYSICS, PROTEIN

from sma_fast import cli


def refused(arguments: list[object], capsys: pytest.CaptureFixture, code: int = 1) -> str:
    """Returns the line on standard error."""
    try:
        ended = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        ended = error.code
    printed = capsys.readouterr()
    assert ended == code, printed.err
    assert printed.out == ""
    line = printed.err.splitlines()[-1]
    assert printed.err == line + "\n" and line.startswith("sma-fast: error: "), printed.err
    return line


@pytest.mark.parametrize("command", (["pretrain"], ["evaluate", "made"], ["show", "made"]))
def test_the_source_may_follow_an_option(command, tmp_path, capsys) -> None:
    missing, out = tmp_path / "missing.csv", ["--out", tmp_path / "out"]
    out = out if command == ["pretrain"] else []
    plain = refused([*command, missing, *out], capsys)
    assert refused([*command, *out, "--data", missing], capsys) == plain
    assert refused([*command, *out, f"--data={missing}"], capsys) == plain
    assert "required: source" in refused([*command, *out], capsys, 2)
    line = refused([*command, missing, *out, "--data", missing], capsys, 2)
    assert f"unrecognized arguments: {missing}" in line


OPTIONS = {
    "--mask-ratio 0.2": (2, "unrecognized arguments: --mask-ratio"),
    "--step 3": (2, "unrecognized arguments: --step"),
    "--steps 0": (2, "argument --steps: got '0'"),
    "--steps many": (2, "argument --steps: got 'many'"),
    "--mask some": (2, "argument --mask: invalid choice: 'some'"),
    "--set num_latents": (2, "got 'num_latents', allowed is NAME=VALUE"),
    "--preset chemistry": (1, "preset: got 'chemistry', allowed is protein, molecule"),
    "--scale huge": (1, "scale: got 'huge', allowed is full, small"),
    "--set latents=3": (1, "unexpected keyword argument 'latents'"),
    "--set-mask ratio=0.2": (1, "unexpected keyword argument 'ratio'"),
    "--set-mask mask_ratio=0": (1, "mask_ratio: got 0, allowed is (0, 1)"),
    "--set-mask mask_ratio=1": (1, "mask_ratio: got 1, allowed is (0, 1)"),
    "--set-mask mask_ratio=nan": (1, "mask_ratio: got"),
    "--set-mask mask=random": (1, "mask: got 'random' in masking, allowed is --mask"),
    "--set masking=3": (1, "masking: got 3 in model, allowed is --set-mask"),
    "--set input_type=discrete": (1, "input_type: got 'discrete' in model"),
    "--set input_channels=2": (1, "input_channels: got 2, allowed is 1 with preset 'physics'"),
    "--set embedded_channels=32": (1, "embedded_channels: got 32, allowed is latent_channels (64)"),
    "--set qk_channels=30": (1, "qk_channels: got 30, allowed is a multiple of"),
    "--set num_blocks=1.5": (1, "num_blocks: got 1.5, allowed is of type int"),
    "--set num_blocks=many": (1, "num_blocks: got 'many', allowed is of type int"),
    "--set share_decoder_queries=1": (1, "share_decoder_queries: got 1, allowed is of type bool"),
    "--preset protein --set num_discrete_tokens=30": (1, "num_discrete_tokens: got 30, allowed is"),
    "--preset protein --set num_latents=5": (1, "num_per_query: got 4, which draws 10 of 5"),
    "--learning-rate -1": (1, "learning_rate: got -1.0, allowed is above 0"),
    "--learning-rate nan": (1, "learning_rate: got nan, allowed is above 0"),
    "--weight-decay -1": (1, "weight_decay: got -1.0, allowed is at least 0"),
    "--epochs 0": (1, "epochs: got 0.0, allowed is above 0"),
    "--scheduler square": (1, "scheduler: got 'square', allowed is cosine"),
    "--validation-share 1": (1, "validation_share: got 1.0, allowed is [0, 1)"),
    "--seed -1": (1, "seed: got -1, allowed is"),
    "--fsdp full_shard": (1, "fsdp: got 'full_shard', allowed is with GPUs under torchrun only"),
}


@pytest.mark.parametrize("given", OPTIONS)
def test_options_are_refused_before_data_are_read(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, message = OPTIONS[given]
    start = ["pretrain", tmp_path / "missing.csv", "--out", tmp_path / "out"]
    start += ["--preset", "physics", "--scale", "small"]
    line = refused([*start, *given.split()], capsys, code)
    assert message in line
    assert "missing.csv" not in line
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    start = ["pretrain", tmp_path / "missing.csv", "--out", tmp_path / "out"]
    assert f"{tmp_path / 'missing.csv'}: got no such file" in refused(start, capsys)


def test_help(capsys: pytest.CaptureFixture) -> None:
    for command in ("pretrain", "finetune", "evaluate"):
        with pytest.raises(SystemExit) as ending:
            cli.main([command, "--help"])
        assert ending.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: sma-fast {command} ")
        for line in text.splitlines()[1:]:
            assert len(line) <= 80
            stripped = line.strip()
            if stripped.startswith("--"):  # every option says what it is
                assert "  " in stripped or stripped.split()[0] in HELP_BELOW, line


HELP_BELOW = (
    "--mask --split-column --parts --validation-share --input --too-long --set --set-mask "
    "--scheduler --gradient-checkpointing --label --task --split-seed --min-length --max-length "
    "--columns --augment --batch-size --learning-rate --weight-decay --warmup-steps --accumulate "
    "--limit-train --save-steps --test-share --format --validation --exclude --size --parts"
).split()


# a row of a file, and what is said about it; the bad row is line 5
TABLES = {
    "1,2,3": "line 5: got 3 cells, allowed is 5",
    '1,2,3,"4,1': "line 5: got a malformed row",
    "1,2,nan,4,1": "line 5, column 'c': got 'nan', allowed is a finite number",
    "1,2,,4,1": "line 5, column 'c': got an empty cell, allowed is a finite number",
    "1,x,3,4,1": "line 5, column 'b': got 'x', allowed is a finite number",
    "1,2,3,4,": "line 5, column 'y': got no label",
}
PROTEINS = {  # of the letters of amino acids
    "ACDEF1,1": "line 5, column 'sequence': got byte 0x31",
    "ACDEFGACDEFGACDEFGACDEFGACDEFGACDEFG,1": "line 5, column 'sequence': got 36 bytes, allowed is",
    ",1": "line 5, column 'sequence': got an empty text",
    "ACD\xffEF,1": "line 5: got byte 0xff at position 4, allowed is UTF-8",
    "ACDEF,nan": "line 5, column 'target': got",
}


def with_bad_row(file: Path, row: str) -> Path:
    lines = file.read_text().splitlines()
    lines[4] = row
    file.write_bytes("\n".join(lines).encode("latin-1"))
    return file


def nothing_trained(out: Path) -> bool:
    return not [path for path in out.rglob("*") if path.name != "run.json"]


@pytest.mark.parametrize("row", TABLES)
def test_bad_row_of_a_table(row: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = with_bad_row(runs.write_table(tmp_path / "t.csv"), row)
    line = refused(
        ["finetune", file, "--cache", tmp_path / "cache", "--out", tmp_path / "out", *PHYSICS]
        + ["--label", "y", "--task", "classification", "--steps", "3"],
        capsys,
    )
    assert f"{file}, {TABLES[row]}" in line
    assert nothing_trained(tmp_path / "out")


@pytest.mark.parametrize("row", PROTEINS)
def test_bad_row_of_proteins(row: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = with_bad_row(runs.write_proteins(tmp_path / "p.csv"), row)
    command = ["finetune", file, "--label", "target", "--task", "regression"]
    command += ["--cache", tmp_path / "cache", "--out", tmp_path / "out", "--steps", "3", *PROTEIN]
    command += ["--alphabet", "ACDEFGHIKLMNPQRSTVWY"]
    line = refused(command, capsys)
    assert f"{file}, {PROTEINS[row]}" in line
    assert nothing_trained(tmp_path / "out")


def test_label_column_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = runs.write_table(tmp_path / "t.csv")
    command = ["finetune", file, "--label", "z", "--task", "classification", *PHYSICS]
    line = refused([*command, "--cache", tmp_path, "--out", tmp_path / "out"], capsys)
    assert f"{file}: got column 'z', allowed is one of those there are: 'a'" in line


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = runs.write_table(tmp_path / "t.csv")
    line = refused(["pretrain", file, "--out", file, *PHYSICS], capsys)
    assert str(file) in line and "--out" in line


def test_json_of_a_run_is_not_half_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = runs.write_table(tmp_path / "t.csv")
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-3" / "complete.json").write_text(json.dumps({}))
    (tmp_path / "out" / "run.json").write_text('{"what": ')
    command = ["pretrain", file, "--out", tmp_path / "out", *PHYSICS]
    assert "add --resume to go on with it, or name another folder" in refused(command, capsys)
    line = refused([*command, "--resume"], capsys)
    assert f"{tmp_path / 'out' / 'run.json'}: cannot be read" in line
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
