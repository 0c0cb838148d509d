"""A process that is killed or cannot write leaves files from which a run resumes to the same bits.

A few kills are done here, many by `make faults`.
"""

import json
import subprocess
import sys

import pytest

from tests.faults.campaign import ENTRIES


@pytest.fixture(scope="module")
def lines():
    """Return the outcome of each kill, as the campaign prints it."""
    command = [sys.executable, "-m", "tests.faults.campaign", *ENTRIES]
    run = subprocess.run(
        [*command, "--kills", "3", "--full-disks", "1"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    ("n", "kinds"), [(3, ("call", "bytes")), (1, ("full",))], ids=["kills", "full disks"]
)
def test_a_run_goes_on_as_if_nothing_had_been(n, kinds, lines):
    found = [line for line in lines if line["kill"] in kinds]

    assert len(found) == n * len(ENTRIES)
    assert [line for line in found if line["problems"]] == []
    assert all(line["status"] for line in found), "every process was killed, or ended by an error"
