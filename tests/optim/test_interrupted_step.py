"""After a step was interrupted half-way, steps are refused until the caller chooses a way back."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qft_hf import kernels
from qft_hf.optim import QFTSGD, QFTLion, release
from tests.optim.test_release import (
    batches,
    everything,
    loss_of,
    make_optimizer,
    network,
)
from tests.tolerances import assert_same_tensors

MODES = ["stack", "release"]
BETWEEN = r"interrupted after .* gradients of \d+ parameters: the model is between two steps\. " + (
    r"Reload a checkpoint, or call optimizer\.zero_grad\(\)"
)


class Interruption(BaseException):
    """An exception that no `except Exception` catches by accident."""


def interrupt(monkeypatch, method: str, at: int) -> None:
    """Make call number `at` of an update method raise, once."""
    calls = [0]
    update = getattr(QFTLion, method)

    def interrupted(optimizer, *arguments):
        calls[0] += 1
        if calls[0] == at:
            raise Interruption
        return update(optimizer, *arguments)

    monkeypatch.setattr(QFTLion, method, interrupted)


def begin(model: nn.Module, optimizer, number: int = 0) -> None:
    with pytest.raises(Interruption):  # in backward, or in the step
        run(model, optimizer, number)


def run(model: nn.Module, optimizer, number: int) -> None:
    loss_of(model, batches(4)[number]).backward()
    optimizer.step()


WHERE = [("step_weight", 1), ("step_weight", 2), ("step_floats", 1)]


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize(("method", "at"), [*WHERE, ("update", 2)])
def test_the_next_step_is_refused_until_zero_grad(monkeypatch, gradient, method, at):
    if gradient == "release" and method == "step_weight" and at > 1:
        method = "step_tiles"
    model = network()
    optimizer = make_optimizer(model, gradient)
    interrupt(monkeypatch, method, at)
    begin(model, optimizer)
    after = everything(model, optimizer)
    before = copy.deepcopy(after)

    for _ in range(2):  # a second attempt is refused too
        with pytest.raises(RuntimeError, match=BETWEEN):
            optimizer.step()
    assert_same_tensors(before, everything(model, optimizer))

    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    run(model, optimizer, 1)
    run(model, optimizer, 2)
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize(("method", "at"), [("update", 2), ("step_floats", 1)])
def test_more_gradients_do_not_hide_it(monkeypatch, gradient, method, at):
    """A loop that catches all exceptions continues with the next batch."""
    model = network()
    optimizer = make_optimizer(model, gradient)
    interrupt(monkeypatch, method, at)
    begin(model, optimizer)

    with pytest.raises(RuntimeError, match=r"between two steps"):
        run(model, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"between two steps"):
        optimizer.step()


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize(("method", "at"), [("update", 2), ("step_floats", 1)])
def test_copies_and_states_do_not_hide_it(monkeypatch, gradient, copied, method, at, caplog):
    model = network()
    optimizer = make_optimizer(model, gradient)
    interrupt(monkeypatch, method, at)
    begin(model, optimizer)

    with pytest.raises(RuntimeError, match=r"\d+ parameters and has not ended.*or .*zero_grad\(\)"):
        copied((model, optimizer))
    optimizer.state_dict()  # an interrupted program may want to save its state
    assert "a run that resumes from it starts between two steps" in caplog.text

    caplog.clear()
    optimizer.zero_grad()
    copied((model, optimizer))
    optimizer.state_dict()
    assert caplog.text == ""


def test_a_released_step_cannot_be_copied_before_it_ends():
    """Gradients of norms and biases are still pending; the step of a copy once left them out."""
    model = network()
    optimizer = make_optimizer(model, "release")
    loss_of(model, batches(1)[0]).backward()

    with pytest.raises(RuntimeError, match="has not ended"):
        copy.deepcopy((model, optimizer))

    optimizer.step()
    copy.deepcopy((model, optimizer))


def test_skipping_does_not_hide_it(monkeypatch):
    model = network()
    optimizer = make_optimizer(model, "stack", nonfinite="skip")
    interrupt(monkeypatch, "update", 2)
    begin(model, optimizer)
    (loss_of(model, batches(1)[0]) * float("nan")).backward()

    for _ in range(2):
        with pytest.raises(RuntimeError, match=BETWEEN):
            optimizer.step()
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize(("method", "at"), [("update", 2), ("step_floats", 1)])
def test_a_checkpoint_leads_back_to_the_straight_run(monkeypatch, gradient, method, at):
    straight = network()
    steady = make_optimizer(straight, gradient)
    model = network()
    optimizer = make_optimizer(model, gradient)
    for number in range(2):
        run(straight, steady, number)
    run(model, optimizer, 0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    interrupt(monkeypatch, method, at)
    begin(model, optimizer, 1)

    model.load_state_dict(saved[0])
    model.zero_grad()
    optimizer.load_state_dict(saved[1])
    run(model, optimizer, 1)

    assert_same_tensors(everything(straight, steady), everything(model, optimizer))


def test_an_interrupted_kernel_is_noticed_for_sgd_too(monkeypatch):
    model = network()
    optimizer = make_optimizer(model, "stack", QFTSGD)
    loss_of(model, batches(1)[0]).backward()
    step, calls = kernels.step_weight_, []

    def interrupted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise Interruption
        return step(*arguments, **keywords)

    monkeypatch.setattr(kernels, "step_weight_", interrupted)
    with pytest.raises(Interruption):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"gradients of \d parameters"):
        optimizer.step()


@pytest.mark.parametrize("gradient", MODES)
def test_a_step_that_ended_is_no_half_step(gradient):
    model = network()
    optimizer = make_optimizer(model, gradient)
    for number in range(3):
        run(model, optimizer, number)
        optimizer.step()  # without gradients


@pytest.mark.parametrize("limit", [0, 2**16])
def test_large_float_parameters_do_not_wait_for_the_step(monkeypatch, limit):
    """Small ones are updated in one call per group; the bits are the same."""
    monkeypatch.setattr(release, "SMALL", limit)
    calls: list[int] = []
    step_floats = QFTLion.step_floats

    def recording(optimizer, parameters, *others):
        calls.append(len(parameters))
        step_floats(optimizer, parameters, *others)

    monkeypatch.setattr(QFTLion, "step_floats", recording)
    model, other = network(), network()
    optimizer = make_optimizer(model, "release")
    loss_of(model, batches(1)[0]).backward()
    n_floats = 4  # two biases, and weight and bias of the norm
    assert calls == ([] if limit else [1] * n_floats)
    assert (model.norm.weight == torch.ones(22)).all() == bool(limit)
    optimizer.step()
    assert calls == ([n_floats] if limit else [1] * n_floats)

    stack = make_optimizer(other, "stack")
    run(other, stack, 0)
    loss_of(model, batches(4)[1]).backward()
    optimizer.step()
    run(other, stack, 1)
    assert_same_tensors(everything(model, optimizer), everything(other, stack))


@pytest.mark.parametrize("kind", [QFTLion, QFTSGD])
@pytest.mark.parametrize("clipping", [None, "previous", "tensor"])
def test_a_step_after_a_backward_pass_that_failed_is_refused(clipping, kind):
    """Weights that backward had passed were updated, others not, and the step raised no error."""
    model = network(is_tied=False)
    limit = None if clipping is None else 0.5
    optimizer = make_optimizer(model, "release", kind, clipping=clipping, max_grad_norm=limit)
    handle = model.up.weight.register_hook(raising)
    begin(model, optimizer)
    handle.remove()
    after = copy.deepcopy(everything(model, optimizer))

    for _ in range(2):
        with pytest.raises(RuntimeError, match=BETWEEN):
            optimizer.step()
    with pytest.raises(RuntimeError, match=r"between two steps"):
        run(model, optimizer, 1)
    assert_same_tensors(after, everything(model, optimizer))
    optimizer.zero_grad()
    run(model, optimizer, 1)


def raising(gradient):
    raise Interruption


def test_a_float_gradient_that_was_clipped_but_not_used_is_noticed(monkeypatch):
    """The first gradient of a step was then used later, clipped twice."""
    monkeypatch.setattr(release, "SMALL", 0)
    model = network(is_tied=False)
    model.head = nn.Linear(22, 50, bias=False)  # its gradient comes first
    optimizer = make_optimizer(model, "release", clipping="previous", max_grad_norm=0.5)
    run(model, optimizer, 0)
    clip = release.Release._clip_

    def interrupted(flow, *arguments):
        clip(flow, *arguments)
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(release.Release, "_clip_", interrupted)
        begin(model, optimizer, 1)
    with pytest.raises(RuntimeError, match=BETWEEN):
        optimizer.step()


def test_a_backward_pass_that_fails_before_the_first_update_leaves_all_as_it_was():
    model, other = network(is_tied=False), network(is_tied=False)
    optimizer, steady = make_optimizer(model, "release"), make_optimizer(other, "release")
    handle = model.head.weight.register_hook(raising)
    begin(model, optimizer)
    handle.remove()
    for number in (1, 2):
        run(model, optimizer, number)
        run(other, steady, number)
    assert_same_tensors(everything(model, optimizer), everything(other, steady))


def test_several_backward_passes_of_one_step_end_it_together():
    """Each backward pass updates the weights that it reaches."""
    model, other = network(is_tied=False), network(is_tied=False)
    optimizer, stack = make_optimizer(model, "release"), make_optimizer(other, "stack")
    for number in range(2):
        for one, its in ((model, optimizer), (other, stack)):
            hidden = one.embed(batches(2)[number])
            one.up(hidden.detach()).square().sum().backward()
            one.head(hidden.detach()).square().sum().backward()
            its.step()
    assert_same_tensors(everything(model, optimizer), everything(other, stack))


def test_a_second_backward_pass_of_a_step_that_fails_is_noticed_too():
    model = network(is_tied=False)
    optimizer = make_optimizer(model, "release")
    hidden = model.embed(batches(1)[0]).detach()
    model.head(hidden).square().sum().backward()
    model.up.weight.register_hook(raising)
    with pytest.raises(Interruption):
        model.down(model.up(hidden)).square().sum().backward()
    with pytest.raises(RuntimeError, match=BETWEEN):
        optimizer.step()
