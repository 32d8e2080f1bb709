"""The short form of scripts/chaos.py: a run on real hosts that lose a worker, the driver and a node, with notice and
without."""

import subprocess
import sys
from pathlib import Path

import pytest
from hosts import why_not

CHAOS = Path(__file__).parent.parent.parent / "scripts" / "chaos.py"
KINDS = ["worker killed", "driver killed", "node killed", "preemption notice"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_the_bytes_are_those_of_an_undisturbed_run() -> None:
    size = ["--faults", "4", "--faults-per-run", "4", "--windows", "64", "--layers", "8"]
    done = subprocess.run([sys.executable, CHAOS, *size, "--kinds", *KINDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ")[0].removeprefix("| ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert sorted(rows[1:]) == sorted(KINDS)
