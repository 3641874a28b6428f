"""A file larger than the memory at hand is converted, fitted, checked and read at random."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MB = 200  # of the file
GROWTH = 100  # MB of memory that reading it may take

# RssAnon: what the process holds; pages of mapped files come and go as memory allows
SCRIPT = """
import json, sys, threading, time
from sma_fast.training.data import ByteSequences, Collator, Examples, Targets, load

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

def watch():
    while True:
        peak[0] = max(peak[0], held())
        time.sleep(0.005)

load(sys.argv[2], cache=sys.argv[3])  # a small one first: what is imported late is no growth
peak = [held()]
before = peak[0]
threading.Thread(target=watch, daemon=True).start()
dataset = load(sys.argv[1], cache=sys.argv[3])
examples = Examples(dataset, ByteSequences("seq", 1024), Targets.fit(dataset, "y"))
rows = examples.check()
batch = Collator()(examples.__getitems__(range(0, rows, rows // 64)))
json.dump({"rows": rows, "growth": peak[0] - before}, sys.stdout)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
def test_memory_stays_bounded(tmp_path):
    row = "MKVLAGHDERTY" * 40
    block = "".join(f"{row},{i}.5\n" for i in range(2000))
    blocks = MB * 1_000_000 // len(block)
    with open(tmp_path / "large.csv", "w") as file:
        file.write("seq,y\n")
        for _ in range(blocks):
            file.write(block)
    (tmp_path / "small.csv").write_text("seq,y\nMKV,1\n")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "large.csv", "small.csv", "cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == blocks * 2000
    assert found["growth"] < GROWTH
