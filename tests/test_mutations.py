"""What tests/mutate.py counts on damaged and hostile inputs of each kind, and on faults of each script."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

# Nothing may be wrong; of a folder every file is labelled, named or counted.
WRONG = ("traceback", "crash", "hang", "stray files", "changed outside", "unaccounted")
WRONG += ("half files", "not resumed", "unequal", "no line")  # after a kill, or on a full disk


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *((kind, 100) for kind in ("photos", "videos", "tables", "checkpoints", "exports")),
        *(("kills", 20), ("disks", 40)),
    ],
)
def test_damaged_and_hostile_inputs_end_in_a_line(kind, count, tmp_path):
    if kind == "disks":
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=False).returncode:
            pytest.skip("no disk can be mounted here")
        subprocess.run(["umount", tmp_path], check=True)
    command = [sys.executable, ROOT / "tests" / "mutate.py", "--kind", kind, "--count", str(count)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    counts = json.loads(run.stdout.splitlines()[-1])[kind]
    assert counts["inputs"] >= 10
    assert not any(counts.get(name, 0) for name in WRONG), run.stderr[-2000:]
    assert counts.get("peak MB", 0) < 1536
