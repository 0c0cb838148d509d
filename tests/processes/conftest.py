"""Runs on two, three and four processes; starting them takes the longest, so each starts once."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from tests.processes import forked, trainers
from tests.processes.launch import launch_forked, results


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Results of every process, by number of processes and run, and the folder of all runs.

    Under xdist one worker starts the processes for all workers.
    """
    base: Path = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            alone = {name: trainers.run(name, folder, n=1, n_parts=2) for name in trainers.KINDS}
            torch.save(alone, folder / "alone.pt")
            launch_forked(str(folder))
    return SimpleNamespace(
        folder=folder,
        alone=torch.load(folder / "alone.pt", weights_only=False),
        two=results(folder, "two", 2),
        three=results(folder, "three", 3),
        four=results(folder, "four", 4),
        ended={name: results(folder, name, 3) for name in forked.ENDS},
    )
