"""Options of groups are checked wherever they come from, before any parameter changes."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from qft_hf.optim import QFTSGD, QFTAdamW, QFTLion
from tests.optim.test_release import (
    batches,
    everything,
    loss_of,
    make_optimizer,
    network,
)
from tests.tolerances import assert_same_tensors

KINDS = [QFTLion, QFTSGD]
MODES = ["stack", "release"]

NOT_FINITE = "must be finite and not negative"
BAD = [
    ("lr", math.nan, f"lr {NOT_FINITE}, got nan"),
    ("lr", math.inf, f"lr {NOT_FINITE}, got inf"),
    ("lr", 1e39, f"lr {NOT_FINITE}, got 1e\\+39"),  # infinite in FP32
    ("lr", -1e-3, f"lr {NOT_FINITE}, got -0.001.*maximize=True"),
    ("lr", "fast", "lr must be a number, got 'fast'"),
    ("lr", None, "lr must be a number, got None"),
    ("lr", torch.tensor(math.nan), f"lr {NOT_FINITE}, got nan"),
    ("lr", torch.ones(2), "lr must be a number, got tensor"),
    ("weight_decay", math.nan, f"weight_decay {NOT_FINITE}, got nan"),
    ("weight_decay", math.inf, f"weight_decay {NOT_FINITE}, got inf"),
    ("weight_decay", -0.1, f"weight_decay {NOT_FINITE}, got -0.1"),
    ("weight_decay", [0.1], r"weight_decay must be a number, got \[0\.1\]"),
    ("seed", -1, r"seed must be in \[0, 2\*\*63\), got -1"),
    ("seed", 2**63, r"seed must be in \[0, 2\*\*63\)"),
    ("seed", 0.5, r"seed must be in \[0, 2\*\*63\), got 0.5"),
    ("seed", None, r"seed must be in \[0, 2\*\*63\), got None"),
    ("lr", True, "lr must be a number, got True"),
    ("lr", "1e-3", "lr must be a number, got '1e-3'"),
    ("weight_decay", False, "weight_decay must be a number, got False"),
    ("seed", True, r"seed must be in \[0, 2\*\*63\), got True"),
    ("maximize", "no", "maximize must be True or False, got 'no'"),
    ("maximize", None, "maximize must be True or False, got None"),
    ("stochastic_rounding", 0, "stochastic_rounding must be True or False, got 0"),
]
BAD_BETAS = [
    ("betas", betas, r"betas must be two numbers in \[0, 1\)")
    for betas in (
        (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), (0.9, math.inf), (0.9,), (0.9, 0.9, 0.9),
        0.9, None, ("a", "b"),
    )
]  # fmt: skip
BAD_EPS = [
    ("eps", eps, "eps must be positive and finite, got")
    for eps in (0.0, -1e-8, math.nan, math.inf, None, "small", (1e-8,), True)
]
CASES = [(kind, *case) for kind in (*KINDS, QFTAdamW) for case in BAD]
CASES += [(kind, *case) for kind in (QFTLion, QFTAdamW) for case in BAD_BETAS]
CASES += [(QFTAdamW, *case) for case in BAD_EPS]
every_bad_value = pytest.mark.parametrize(
    ("kind", "name", "value", "match"), CASES, ids=lambda v: getattr(v, "__name__", None)
)


@every_bad_value
def test_the_constructor_refuses(kind, name, value, match):
    parameters = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=match):
        kind(parameters, **{name: value})
    with pytest.raises(ValueError, match=match):
        kind([{"params": parameters, name: value}])


@every_bad_value
def test_a_group_that_is_added_is_refused_and_the_optimizer_unchanged(kind, name, value, match):
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = kind([one], lr=0.5)

    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [other], name: value})

    assert len(optimizer.param_groups) == 1
    one.grad = torch.ones(2)
    optimizer.step()
    assert (one == 0.5).all()
    optimizer.add_param_group({"params": [other]})  # nor is the parameter taken for one it has
    other.grad = torch.ones(3)
    optimizer.step()
    assert (other == 0.5).all()


@pytest.mark.parametrize("gradient", MODES)
@every_bad_value
def test_what_is_written_into_a_group_is_refused_before_anything_moves(
    kind, name, value, match, gradient
):
    """In the last group, so that others would have moved already; release raises in backward."""
    model = network()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3]}, {"params": parameters[3:]}]
    optimizer = kind(groups, lr=0.01, gradient=gradient)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    before = copy.deepcopy(everything(model, optimizer))
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value

    if gradient == "release":
        with pytest.raises(ValueError, match=match):
            loss_of(model, batches(2)[1]).backward()
    else:
        loss_of(model, batches(2)[1]).backward()
    with pytest.raises(ValueError, match=match):
        optimizer.step()

    assert_same_tensors(before, everything(model, optimizer))
    optimizer.param_groups[1][name] = good
    optimizer.zero_grad()
    loss_of(model, batches(2)[1]).backward()
    optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())


@every_bad_value
def test_a_checkpoint_is_refused_and_nothing_changes(kind, name, value, match):
    model = network()
    optimizer = make_optimizer(model, "stack", kind)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= {"lr": 7.0, "weight_decay": 0.7, "seed": 3} | {name: value}
    saved["state"][0]["step"] += 5
    before = copy.deepcopy(everything(model, optimizer))

    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)

    assert_same_tensors(before, everything(model, optimizer))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["seed"]) == (3e-3, 0.1, 5)


@pytest.mark.parametrize("gradient", MODES)
def test_a_scheduler_that_runs_off_is_stopped(gradient):
    model = network()
    optimizer = make_optimizer(model, gradient)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 if step < 2 else math.nan)

    def step(number: int) -> None:
        loss_of(model, batches(3)[number]).backward()
        optimizer.step()

    for number in range(2):
        step(number)
        scheduler.step()
    before = copy.deepcopy(everything(model, optimizer))

    with pytest.raises(ValueError, match="lr must be finite"):
        step(2)

    assert_same_tensors(before, everything(model, optimizer))


@pytest.mark.parametrize("value", [0, 1, 0.0, torch.tensor(0.25), torch.tensor([0.25])], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_in_other_forms_are_numbers(kind, value):
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = kind([parameter], lr=value)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert (parameter == -float(value)).all()


def test_betas_may_be_a_list():
    parameter = nn.Parameter(torch.zeros(3))
    assert QFTLion([parameter], betas=[0.5, 0.75]).param_groups[0]["betas"] == (0.5, 0.75)


def test_sgd_has_no_betas_and_no_momentum():
    parameter = nn.Parameter(torch.zeros(3))
    for name in ("betas", "momentum", "momentum_bits"):
        with pytest.raises(TypeError, match=name):
            QFTSGD([parameter], **{name: 0})
    with pytest.raises(ValueError, match=r"use QFTSGD.*optim='qft_sgd'"):
        QFTLion([parameter], momentum_bits=0)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf, "1"])
def test_a_norm_to_clip_to_is_positive(norm):
    with pytest.raises(ValueError, match="max_grad_norm must be positive or None"):
        make_optimizer(network(), "release", clipping="tensor", max_grad_norm=norm)
