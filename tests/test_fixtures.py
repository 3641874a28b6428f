"""What conftest.py's fixtures do with a test that runs no op."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_pytest(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SMA_FAST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=environment | variables,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_golden_tests_skip_where_there_are_no_golden_files(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    test = "tests/test_compat_sma.py::test_masks_as_published[reference-image_cross]"
    done = run_pytest(test, SMA_FAST_DATA=str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout and "error" not in done.stdout.lower()
    assert "no golden files: " in done.stdout


def test_a_test_that_forces_a_backend_must_run_it(tmp_path):
    file = tmp_path / "test_gather_tokens.py"
    file.write_text("def test_idle(backend):\n    pass\n")
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    done = run_pytest("-p", "conftest", str(file), PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "AssertionError: no op ran on reference" in done.stdout
