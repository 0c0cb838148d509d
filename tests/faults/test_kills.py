"""A process that is killed while it writes leaves what a run goes on from, to the same bits.

A few kills here; `make faults` runs many, and `QFT_KILLS=1000 make faults` more.
"""

import json
import os
import subprocess
import sys

from tests.faults.campaign import ENTRIES

KILLS = int(os.environ.get("QFT_KILLS", "3"))
SEED = os.environ.get("QFT_KILLS_SEED", "0")


def test_a_killed_run_goes_on_as_if_nothing_had_been():
    command = [sys.executable, "-m", "tests.faults.campaign", *ENTRIES]
    run = subprocess.run(
        [*command, "--kills", str(KILLS), "--seed", SEED],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in run.stdout.splitlines()]

    assert run.returncode == 0, run.stderr
    assert len(lines) == KILLS * len(ENTRIES)
    assert [line for line in lines if line["problems"]] == []
    assert all(line["status"] for line in lines), "every process was killed"
