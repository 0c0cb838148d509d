"""Which optimizer a finished gradient reaches: the last one attached, while it lives."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import Tensor, nn

from qft_hf import QFTLion
from tests.optim.test_release import (
    batches,
    everything,
    loss_of,
    make_optimizer,
    network,
)
from tests.tolerances import assert_same_tensors


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def take_steps(model: nn.Module, optimizer: QFTLion, n: int = 2) -> list[Tensor]:
    for ids in batches(n):
        loss_of(model, ids).backward()
        optimizer.step()
    return everything(model, optimizer)


@pytest.mark.parametrize("second", ["stack", "release"])
@pytest.mark.parametrize("first", ["stack", "release"])
def test_a_second_optimizer_has_the_parameters_for_itself(first, second):
    model, alone = network(), network()
    old = make_optimizer(model, first)
    loss_of(model, batches(1)[0]).backward()
    old.zero_grad()
    model.load_state_dict(alone.state_dict())
    old.state.clear()

    new = make_optimizer(model, second)
    expected = take_steps(alone, make_optimizer(alone, second))
    assert_same_tensors(take_steps(model, new), expected)
    assert not old.state


def test_an_optimizer_takes_its_parameters_back_by_train():
    model = network()
    old = make_optimizer(model, "release")
    new = make_optimizer(model, "release")
    old.train()
    loss_of(model, batches(1)[0]).backward()
    assert old.state
    assert not new.state


@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_a_deleted_optimizer_frees_its_state_and_leaves_gradients_alone(gradient):
    model = network()
    optimizer = make_optimizer(model, gradient)
    take_steps(model, optimizer, 1)
    gone = weakref.ref(optimizer)
    gc.disable()  # it must be freed at once, not when a cycle is collected
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    before = weights(model)
    loss_of(model, batches(1)[0]).backward()
    assert_same_tensors(before, weights(model))
    assert all(p.grad is not None for p in model.parameters())


def test_between_eval_and_train_a_backward_pass_changes_nothing():
    model = network()
    optimizer = make_optimizer(model, "release")
    before = weights(model)
    optimizer.eval()
    loss_of(model, batches(1)[0]).backward()
    assert_same_tensors(before, weights(model))
    optimizer.zero_grad()

    optimizer.train()
    other = network()
    expected = take_steps(other, make_optimizer(other, "stack"))
    assert_same_tensors(take_steps(model, optimizer), expected)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_hooks_of_others_stay_also_when_the_model_is_moved(first):
    model = network()
    seen: list[int] = []
    if first == "ours":
        optimizer = make_optimizer(model, "release")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(id(p)))
    if first == "theirs":
        optimizer = make_optimizer(model, "release")
    model.to(torch.float64).to(torch.float32)
    optimizer.train()
    loss_of(model, batches(1)[0]).backward()
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_may_be_moved_behind_its_optimizer(caplog):
    model, other = network(), network()
    optimizer = make_optimizer(model, "release")
    model.to(torch.float64).to(torch.float32)
    loss_of(model, batches(1)[0]).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert not caplog.text
    loss_of(model, batches(2)[1]).backward()
    optimizer.step()
    expected = take_steps(other, make_optimizer(other, "stack"))
    assert_same_tensors(everything(model, optimizer), expected)


def test_hooks_that_were_lost_are_noticed_and_cost_one_step_only(caplog):
    model, other = network(), network()
    optimizer = make_optimizer(model, "release")
    for parameter in model.parameters():
        parameter._post_accumulate_grad_hooks.clear()
    loss_of(model, batches(1)[0]).backward()
    assert model.up.weight.grad is not None  # autograd does not call the hooks
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert "waited for the step instead of being released" in caplog.text

    caplog.clear()
    loss_of(model, batches(2)[1]).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert not caplog.text
    expected = take_steps(other, make_optimizer(other, "stack"))
    assert_same_tensors(everything(model, optimizer), expected)


def test_a_copied_model_obeys_no_optimizer():
    model = network()
    optimizer = make_optimizer(model, "release")
    other = copy.deepcopy(model)
    before = weights(other)
    loss_of(other, batches(1)[0]).backward()
    assert_same_tensors(before, weights(other))
    assert not optimizer.state
