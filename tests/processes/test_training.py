"""Several processes have the bits of one process that gets the gradients of all."""

from functools import cache

import pytest
import torch

from tests.processes import training
from tests.processes.forked import ON_FOUR, ON_THREE, ON_TWO


@cache
def alone(name, n):
    return training.run_alone(name, n)


def different(one, other):
    """Return the names of tensors whose bits differ."""
    return [
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


@pytest.mark.parametrize("name", training.SCENARIOS)
def test_two_processes_train_as_one_does_with_all_gradients(name, runs):
    first, second = (found[f"optimizer:{name}"] for found in runs.two)

    assert different(first["weights"], second["weights"]) == []
    assert different(first["weights"], alone(name, 2)["weights"]) == []
    assert first["norms"] == second["norms"] == alone(name, 2)["norms"]


@pytest.mark.parametrize("name", training.SCENARIOS)
def test_the_first_process_has_the_state_of_all_rows_to_save(name, runs):
    state, wanted = runs.two[0][f"optimizer:{name}"]["state"], alone(name, 2)["state"]

    assert state.keys() == wanted.keys()
    for number, tensors in wanted.items():
        assert different(state[number], tensors) == []


@pytest.mark.parametrize("name", [name for name in training.SCENARIOS if "no-floats" in name])
def test_three_processes_train_as_one_does_with_all_gradients(name, runs):
    """These scenarios have no float parameters, whose sum a backend may compute in any order."""
    found = runs.three[0][f"optimizer:{name}"]

    assert different(found["weights"], alone(name, 3)["weights"]) == []
    assert found["norms"] == pytest.approx(alone(name, 3)["norms"], rel=1e-6)


@pytest.mark.parametrize(
    "run",
    [
        run
        for run in dict.fromkeys([*ON_TWO, *ON_THREE])
        if run.startswith(("optimizer:", "trainer:"))
    ],
)
def test_all_processes_end_with_the_same_weights(run, runs):
    for everyone in (runs.two, runs.three):
        for found in everyone if run in everyone[0] else []:
            assert different(everyone[0][run]["weights"], found[run]["weights"]) == []


@pytest.mark.parametrize(("n", "named"), [(3, "three"), (4, "four")])
def test_a_process_may_own_no_row_and_leave_out_a_layer(n, named, runs):
    """The head has three rows, so the fourth process owns none; release equals the stack."""
    found = [of_one[run] for of_one in vars(runs)[named] for run in ON_FOUR]

    assert len(found) == 2 * n
    for other in found[1:]:
        assert different(found[0]["weights"], other["weights"]) == []
    fresh, _, _ = training.make("uneven")
    before = training.model_tensors(fresh)
    changed = different(before, found[0]["weights"])
    assert not any(name.startswith("never") for name in changed)
    assert {"blocks.1.up.weight.codes", "head.weight.codes"} <= set(changed)
