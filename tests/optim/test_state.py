"""Saving and restoring the optimizer: INT8 stays INT8, and a resumed run is the straight run."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from qft_hf.optim import QFTLion
from tests.optim.common import (
    backward,
    make_model,
    make_optimizer,
    snapshot,
    state_tensors,
    train,
)
from tests.tolerances import assert_same_bits, assert_same_tensors


def through_a_file(state: dict) -> dict:
    """Save and load as the Trainer does with `optimizer.pt`: plain tensors only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_is_int8_and_survives_a_file():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(2))

    other = make_optimizer(make_model(seed=5), lr=7.0, seed=99)
    other.load_state_dict(through_a_file(optimizer.state_dict()))

    assert_same_tensors(state_tensors(other), state_tensors(optimizer))
    dtypes = {name.split(".")[1]: t.dtype for name, t in state_tensors(other).items()}
    assert dtypes["momentum_codes"] == torch.int8
    assert dtypes["momentum_scales"] == dtypes["momentum"] == torch.float32
    # Learning rates, decays and the seed are loaded too.
    for group, saved in zip(other.param_groups, optimizer.param_groups, strict=True):
        for name in ("lr", "betas", "weight_decay", "seed", "stochastic_rounding", "maximize"):
            assert group[name] == saved[name]


def test_momentum_costs_one_byte_per_parameter_and_its_scales():
    model = make_model(tied=False)
    optimizer = make_optimizer(model)
    train(model, optimizer, [0])

    state = optimizer.state[model.blocks[0].down.weight]  # [21, 300]: two groups of 256

    assert {name: tensor.nbytes for name, tensor in state.items() if name != "step"} == {
        "momentum_codes": 21 * 300,
        "momentum_scales": 21 * 2 * 4,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_parts", [1, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_resuming_equals_the_straight_run_bit_for_bit(tied, n_parts, dtype):
    """Weights, scales, outliers, momentum and the losses, with a schedule."""

    def start():
        model = make_model(tied=tied, dtype=dtype)
        optimizer = make_optimizer(model)
        return model, optimizer, LinearLR(optimizer, total_iters=6, end_factor=0.1)

    def run(model, optimizer, scheduler, steps):
        losses = []
        for step in steps:
            losses += train(model, optimizer, [step], n_parts=n_parts)
            scheduler.step()
        return losses

    model, optimizer, scheduler = start()
    losses = run(model, optimizer, scheduler, range(6))

    stopped = start()
    first = run(*stopped, range(3))
    saved = through_a_file([part.state_dict() for part in stopped])
    resumed = start()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    second = run(*resumed, range(3, 6))

    assert_same_bits(torch.stack(first + second), torch.stack(losses))
    assert_same_tensors(snapshot(resumed[0], resumed[1]), snapshot(model, optimizer))


def test_loaded_state_is_a_copy_of_what_was_loaded():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, [0])
    state = optimizer.state_dict()
    other_model = make_model()
    other = make_optimizer(other_model)

    other.load_state_dict(state)
    before = state_tensors(optimizer)
    train(other_model, other, [1])

    assert_same_tensors(state_tensors(optimizer), before)


def test_a_parameter_that_had_no_gradient_yet_resumes_without_state():
    model = make_model(tied=False)
    model.head.requires_grad_(False)
    optimizer = make_optimizer(model)
    train(model, optimizer, [0])

    other_model = make_model(tied=False)
    other = make_optimizer(other_model)
    other.load_state_dict(through_a_file(optimizer.state_dict()))

    assert other_model.head.weight not in other.state
    train(other_model, other, [1])
    assert other.state[other_model.head.weight]["step"] == 1
    assert other.state[other_model.embed.weight]["step"] == 2


def set_tensor(index, name, change):
    """Return a function that changes one tensor of a state dict."""

    def apply(state):
        state["state"][index][name] = change(state["state"][index][name])

    return apply


def assert_refused(spoil, match, kind=QFTLion, **settings):
    """Assert that a valid state dict is refused after a change and the optimizer stays as it is."""
    model = make_model()
    optimizer = make_optimizer(model, kind, **settings)
    train(model, optimizer, range(2))
    state = through_a_file(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 77.0
    spoil(state)
    before = snapshot(model, optimizer)

    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)

    assert_same_tensors(snapshot(model, optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    train(model, optimizer, [2])


def spoiled_states():
    """Return changes of a valid state dict, each with the error message that it must cause."""

    def drop(index, name):
        return lambda state: state["state"][index].pop(name)

    def rename(state):
        state["state"][0] = {"step": 2, "exp_avg": torch.zeros(37, 21)}

    def remove_parameter(state):
        state["param_groups"][1]["params"].pop()

    inf = float("inf")
    another = "another model, another optimizer or another QFTConfig. Resume with the ones"
    return [
        (
            set_tensor(0, "momentum_codes", lambda t: t.float()),
            rf"parameter 0 .*float32.*{another}",
        ),
        (
            set_tensor(1, "momentum_codes", lambda t: t[:-1]),
            rf"parameter 1 .*\(299, 21\).*{another}",
        ),
        (
            set_tensor(1, "momentum_scales", lambda t: t.half()),
            rf"parameter 1 .*float16.*{another}",
        ),
        (set_tensor(6, "momentum", lambda t: t.bfloat16()), rf"parameter 6 .*bfloat16.*{another}"),
        (
            drop(0, "momentum_scales"),
            rf"parameter 0 must be a step and .*momentum_scales.*{another}",
        ),
        (rename, rf"parameter 0 .*exp_avg.*{another}"),
        (
            set_tensor(1, "momentum_scales", lambda t: t.index_fill(0, torch.tensor([5]), inf)),
            "momentum_scales of parameter 1 has values that are NaN.*Resume from an earlier",
        ),
        (
            set_tensor(6, "momentum", lambda t: t * float("nan")),
            "momentum of parameter 6 has values that are NaN, infinite.*Resume from an earlier",
        ),
        (
            set_tensor(1, "momentum_scales", lambda t: -t),
            "momentum_scales of parameter 1 has values that .* as a scale or .*, negative.*Resume",
        ),
        (
            set_tensor(1, "momentum_codes", lambda t: t.index_fill(0, torch.tensor([5]), -128)),
            "momentum_codes of parameter 1 has -128, which is not a code.*Resume from an earlier",
        ),
        (set_tensor(0, "momentum_codes", lambda t: t.tolist()), rf"parameter 0 .*{another}"),
        (set_tensor(6, "momentum", lambda t: t[:-1]), rf"parameter 6 .*{another}"),
        (
            lambda state: state["state"][6].update(extra=torch.zeros(3)),
            rf"parameter 6 .*extra.*{another}",
        ),
        (set_tensor(3, "step", lambda s: -1), "step of parameter 3 is -1.*Resume from an earlier"),
        (set_tensor(3, "step", lambda s: s + 0.5), r"step of parameter 3 is \d\.5.*Resume from an"),
        (set_tensor(3, "step", lambda s: s * inf), "step of parameter 3 is inf.*Resume from an"),
        *(
            (set_tensor(3, "step", lambda s, bad=bad: bad), "step of parameter 3 is .*Resume from")
            for bad in (None, "two", 2**63 - 1, torch.ones(2))
        ),
        (drop(2, "step"), "parameter 2 must be a step and .*Resume"),
        (
            lambda state: state["state"].update({77: state["state"].pop(1)}),
            "has parameter 77, which is in none of its groups.*Resume from an earlier",
        ),
        *(
            (lambda state, bad=bad: state.update(bad), "has 'state'.*state_dict.. of an optimizer")
            for bad in ({"state": [1]}, {"state": {0: 3}}, {"param_groups": None})
        ),
        (lambda state: state.clear(), "has 'state'.*state_dict.. of an optimizer returns"),
        (remove_parameter, "is for 10 parameters, this optimizer has 11.*Resume with the model"),
    ]


@pytest.mark.parametrize(("spoil", "match"), spoiled_states())
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(spoil, match):
    assert_refused(spoil, match)


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0, "2", [1.0, 2.0]])
def test_a_previous_norm_that_is_none_is_refused_and_nothing_changes(norm):
    """A negative norm once reversed every gradient."""
    norm = norm if isinstance(norm, str) else torch.tensor(norm)
    assert_refused(
        lambda state: state.update(previous_norm=norm),
        r"clips the next step is .*Resume from an earlier",
        gradient="release",
        clipping="previous",
        max_grad_norm=0.1,
    )


@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_steps_are_counted_on_the_host_in_a_tensor(gradient):
    model = make_model()
    optimizer = make_optimizer(model, gradient=gradient)
    train(model, optimizer, range(3))

    for state in [*optimizer.state.values(), *optimizer.state_dict()["state"].values()]:
        step = state["step"]
        assert isinstance(step, torch.Tensor)
        assert (step.dtype, step.shape, step.device.type) == (torch.int64, (), "cpu")
        assert step == 3
    # Each parameter has a counter of its own.
    assert len({state["step"].data_ptr() for state in optimizer.state.values()}) == 11


@pytest.mark.parametrize(
    "form", [int, float, lambda s: torch.tensor(float(s)), lambda s: s.to(torch.int32), torch.clone]
)
def test_steps_of_older_checkpoints_load(form):
    """They were integers; torch's own optimizers have float tensors."""
    straight = make_model()
    optimizer = make_optimizer(straight)
    train(straight, optimizer, range(4))
    model = make_model()
    stopped = make_optimizer(model)
    train(model, stopped, range(2))
    state = through_a_file(stopped.state_dict())
    for entry in state["state"].values():
        entry["step"] = form(entry["step"])

    resumed = make_optimizer(model)
    resumed.load_state_dict(state)
    assert all(s["step"].dtype == torch.int64 for s in resumed.state.values())
    train(model, resumed, range(2, 4))

    assert_same_tensors(snapshot(model, resumed), snapshot(straight, optimizer))


def test_options_that_an_older_checkpoint_did_not_save_have_their_defaults():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(2))
    state = through_a_file(optimizer.state_dict())
    for group in state["param_groups"]:
        for name in ("stochastic_rounding", "maximize", "seed"):
            del group[name]

    other_model = make_model()
    other = make_optimizer(other_model, stochastic_rounding=False, maximize=True, seed=8)
    other.load_state_dict(state)

    for group, saved in zip(other.param_groups, optimizer.param_groups, strict=True):
        found = group["stochastic_rounding"], group["maximize"], group["seed"]
        assert found == (False, True, 8)
        assert (group["lr"], group["weight_decay"]) == (saved["lr"], saved["weight_decay"])
    train(other_model, other, [2])


@pytest.mark.parametrize("copy_it", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_clips_by_the_previous_norm_bit_for_bit(copy_it):
    settings = {"gradient": "release", "clipping": "previous", "max_grad_norm": 0.02}
    model = make_model()
    optimizer = make_optimizer(model, **settings)
    train(model, optimizer, range(2))

    other, copied = copy_it((model, optimizer))
    copied.train()

    assert_same_bits(copied.flow.previous_norm, optimizer.flow.previous_norm)
    assert (copied.clipping, copied.max_grad_norm) == ("previous", 0.02)
    for step in (2, 3):
        train(model, optimizer, [step])
        backward(other, step)
        assert all(p.grad is None for p in other.parameters())  # released
        copied.step()
        assert_same_tensors(snapshot(other, copied), snapshot(model, optimizer))
    # The norm is the reason: without it, the next bits differ.
    copied.flow.previous_norm = None
    train(model, optimizer, [4])
    train(other, copied, [4])
    assert any(
        (a != b).any()
        for a, b in zip(
            snapshot(other, copied).values(), snapshot(model, optimizer).values(), strict=True
        )
    )


def test_groups_cut_differently_are_refused_and_nothing_changes():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, [0])
    before = snapshot(model, optimizer)
    parameters = list(make_model().parameters())
    other = QFTLion([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=3.0)

    with pytest.raises(
        ValueError, match=r"has groups of \[2, 9\] parameters, this optimizer of \[5, 6\]"
    ):
        optimizer.load_state_dict(other.state_dict())

    assert_same_tensors(snapshot(model, optimizer), before)


def test_adamw_state_of_a_float_model_is_refused():
    """A checkpoint of an ordinary run has as many parameters, but another state."""
    model = make_model()
    optimizer = make_optimizer(model)
    float_parameters = [nn.Parameter(torch.zeros(p.shape)) for p in model.parameters()]
    adamw = torch.optim.AdamW([{"params": float_parameters[:5]}, {"params": float_parameters[5:]}])
    for parameter in float_parameters:
        parameter.grad = torch.ones_like(parameter)
    adamw.step()

    with pytest.raises(ValueError, match=r"exp_avg.*was saved by another model, another optimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    backward(model, 0)
    optimizer.step()
