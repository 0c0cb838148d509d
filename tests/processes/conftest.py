"""Runs on two and on three processes; to start them takes the longest, so each is started once."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.processes import bad_input, trainers, training
from tests.processes.launch import launch, results

ON_TWO = (
    *(f"optimizer:{name}" for name in training.SCENARIOS),
    *(f"trainer:{name}" for name in trainers.KINDS),
    *(f"trainer:stack/stack-on-{n}" for n in (1, 2, 3)),
    "trainer:stock/stock-on-2",
    *(f"bad:{name}" for name in bad_input.CASES),
)
ON_THREE = ("optimizer:no-floats", "optimizer:uneven", "optimizer:uneven-release", "trainer:stack")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """What every process has found, by their number and the run, and the folder of all runs."""
    folder: Path = tmp_path_factory.mktemp("processes")
    alone = {name: trainers.run(name, folder, n=1, n_parts=2) for name in trainers.KINDS}
    launch(str(folder), *ON_THREE, n=3)
    three = results(folder, 3)
    launch(str(folder), *ON_TWO, n=2)
    return SimpleNamespace(folder=folder, alone=alone, three=three, two=results(folder, 2))
