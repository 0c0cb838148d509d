"""Several processes make what one would that is told the gradients of all, bit for bit."""

from functools import cache

import pytest
import torch

from tests.processes import training
from tests.processes.launch import launch, results

N_PROCESSES = 2


@pytest.fixture(scope="module")
def of_each(tmp_path_factory):
    """Results of all scenarios on each of two processes: to start them takes the longest."""
    folder = tmp_path_factory.mktemp("processes")
    launch("tests.processes.training", *training.SCENARIOS, n=N_PROCESSES, folder=folder)
    return results(folder, N_PROCESSES)


@cache
def alone(name):
    return training.run_alone(name, N_PROCESSES)


def different(one, other):
    """Names of tensors that are not the same bits."""
    return [
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


@pytest.mark.parametrize("name", training.SCENARIOS)
def test_processes_train_as_one_does_with_all_gradients(name, of_each):
    first, second = (found[name] for found in of_each)

    assert different(first["weights"], second["weights"]) == []
    assert different(first["weights"], alone(name)["weights"]) == []
    assert first["norms"] == second["norms"] == alone(name)["norms"]


@pytest.mark.parametrize("name", training.SCENARIOS)
def test_the_first_process_has_the_state_of_all_rows_to_save(name, of_each):
    state, wanted = of_each[0][name]["state"], alone(name)["state"]

    assert state.keys() == wanted.keys()
    for number, tensors in wanted.items():
        assert different(state[number], tensors) == []
