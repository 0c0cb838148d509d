"""Trainers on several processes have the bits of one that accumulates, and can be resumed."""

import pytest
import torch

from tests.processes import trainers
from tests.processes.test_training import different


# A batch that is filled up has other examples, so "ragged" is left out.
@pytest.mark.parametrize("kind", sorted(trainers.KINDS.keys() - {"ragged"}))
def test_two_processes_train_as_one_that_accumulates(kind, runs):
    found, alone = runs.two[0][f"trainer:{kind}"], runs.alone[kind]

    assert different(found["weights"], alone["weights"]) == []
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-4)  # logged to four digits
    assert found["norms"] == pytest.approx(alone["norms"], rel=1e-6)


@pytest.mark.parametrize("kind", ["stack", "stock-release", "bf16"])
def test_the_optimizer_state_of_a_checkpoint_is_that_of_one_process(kind, runs):
    two, one = (state_of(run[kind_of]["output_dir"]) for run, kind_of in (
        (runs.two[0], f"trainer:{kind}"), (runs.alone, kind)
    ))  # fmt: skip

    assert two["param_groups"] == one["param_groups"]
    assert two["state"].keys() == one["state"].keys()
    for number, tensors in one["state"].items():
        assert different(two["state"][number], tensors) == []


@pytest.mark.parametrize("source", ["stack/stack-on-1", "stack/stack-on-2", "stock/stock-on-2"])
def test_a_resumed_run_ends_where_one_without_a_pause_does(source, runs):
    resumed, alone = runs.two[0][f"trainer:{source}"], runs.alone[source.split("/")[0]]

    assert different(resumed["weights"], alone["weights"]) == []


@pytest.mark.parametrize(("source", "n_saved"), [("stack/stack-on-2", 2), ("stack/stack-on-3", 3)])
def test_one_process_goes_on_from_several_as_two_do(source, n_saved, runs):
    one = trainers.run(source, runs.folder, n=1, n_parts=2)

    expected = runs.two[0][f"trainer:{source}"]["weights"]
    assert different(one["weights"], expected) == []
    if n_saved == 2:
        assert different(one["weights"], runs.alone["stack"]["weights"]) == []


@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_accelerate_saves_and_loads_the_state_of_all_rows(gradient, runs):
    """`save_state` asks for the state on every process, and only the first one had it."""
    for found in runs.two:
        straight, resumed = found[f"accelerated:{gradient}"]
        assert different(straight, resumed) == []


def test_all_processes_evaluate_with_the_buffers_of_the_first(runs):
    """Each kept the running means of its own examples, so a resumed run evaluated to others."""
    first, second = (found["evaluated:"] for found in runs.two)

    assert first["buffers"]["norm.running_mean"].abs().max() > 0
    assert different(first["buffers"], second["buffers"]) == []
    assert first["loss"] == second["loss"]


def test_buffers_that_are_not_saved_stay_with_their_process(runs):
    """Beginning to train and to evaluate shared all, also those that belong to a number.

    So the frequencies of a dynamic RoPE were those of another length than the module had noted.
    """
    first, second = (found["evaluated:"] for found in runs.two)

    assert first["largest_sum"] != second["largest_sum"]
    for found in (first, second):
        assert found["of_largest"].tolist() == [found["largest_sum"]] * 2


def state_of(output_dir):
    path = output_dir / f"checkpoint-{trainers.SAVED_AT}" / "optimizer.pt"
    return torch.load(path, weights_only=True)
