"""A process that is killed or cannot write leaves what a run goes on from, to the same bits.

A few here; `make faults` runs many.
"""

import json
import subprocess
import sys

import pytest

from tests.faults.campaign import ENTRIES


@pytest.mark.parametrize(("n", "flags"), [(3, ()), (1, ("--full",))], ids=["kills", "full disks"])
def test_a_run_goes_on_as_if_nothing_had_been(n, flags):
    command = [sys.executable, "-m", "tests.faults.campaign", *ENTRIES, "--kills", str(n), *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines()]

    assert run.returncode == 0, run.stderr
    assert len(lines) == n * len(ENTRIES)
    assert [line for line in lines if line["problems"]] == []
    assert all(line["status"] for line in lines), "every process was killed, or ended by an error"
