"""Which random numbers round a step, for every optimizer, INT8 weights and BF16 parameters."""

import pytest
import torch
from torch import Tensor, nn

from qft_hf.optim import QFTSGD, QFTAdamW, QFTLion
from qft_hf.quant import QFTWeight
from tests.optim.common import SPEC, zero_gradient
from tests.tolerances import assert_same_bits

RULES = [QFTLion, QFTAdamW, QFTSGD]
KINDS = ["int8", "bf16"]
LR = 1e-4  # far below a quantum of a weight and half a unit of BF16


def make_parameter(kind: str) -> nn.Parameter:
    if kind == "bf16":
        return nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    parameter = nn.Parameter(QFTWeight.from_float(torch.linspace(-1, 1, 900).view(9, 100), SPEC))
    parameter.codes.clamp_(-120, 120)  # so that no scale has to grow
    return parameter


def stored(parameter: nn.Parameter) -> Tensor:
    """Return a copy of the tensor that is rounded."""
    return (parameter.codes if isinstance(parameter, QFTWeight) else parameter.detach()).clone()


def step(optimizer, n_steps: int = 1, without: nn.Parameter | None = None) -> list[Tensor]:
    """Step with gradients of 1 for all but one parameter; return the stored tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(n_steps):
        for parameter in parameters:
            if parameter is without:
                continue
            if isinstance(parameter, QFTWeight):
                parameter.grad = zero_gradient(parameter)
                parameter.grad.codes.fill_(1)
            else:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return [stored(parameter) for parameter in parameters]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_to_nearest_small_steps_are_lost_and_at_random_they_are_not(rule, kind):
    for stochastic in (False, True):
        parameter = make_parameter(kind)
        before = stored(parameter)

        (after,) = step(rule([parameter], lr=LR, stochastic_rounding=stochastic), n_steps=3)

        if stochastic:
            assert (after != before).any()
        else:
            assert_same_bits(after, before)


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_equal_parameters_are_rounded_differently(rule, kind, n_groups):
    """The stream is the position among all parameters; equal streams would correlate the noise."""
    parameters = [make_parameter(kind) for _ in range(2)]
    groups = [parameters] if n_groups == 1 else [[parameter] for parameter in parameters]

    first, second = step(rule([{"params": group} for group in groups], lr=LR), n_steps=3)

    assert (first != second).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_is_rounded_by_its_number_whatever_is_stepped_beside_it(rule, kind):
    results = []
    for is_alone in (True, False):
        other, parameter = make_parameter(kind), make_parameter(kind)
        optimizer = rule([other, parameter], lr=LR)
        results.append(step(optimizer, without=other if is_alone else None)[1])

    assert_same_bits(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_steps_of_a_parameter_are_rounded_differently(rule, kind):
    """Repeated numbers would move the same elements at each step, and no others."""
    parameter = make_parameter(kind)
    optimizer = rule([parameter], lr=LR)
    before = stored(parameter)

    (first,) = step(optimizer)
    (second,) = step(optimizer)

    assert ((first == before) & (second != first)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_group_may_have_a_seed_of_its_own(rule, kind):
    results = []
    for seed in (5, 6):
        parameters = [make_parameter(kind) for _ in range(2)]
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "seed": seed}]
        results.append(step(rule(groups, lr=LR, seed=5), n_steps=3))

    assert_same_bits(results[0][0], results[1][0])
    assert (results[0][1] != results[1][1]).any()
