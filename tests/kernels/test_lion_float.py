"""Lion on float parameters: FP32 exactly, BF16 stochastically."""

import numpy as np
import pytest
import torch

from qft_hf import kernels
from tests.kernels.states import ARGUMENTS
from tests.tolerances import (
    FP32_EPS,
    assert_same_bits,
    float_update_bound,
    mean_error,
    sign_is_decided,
    sum_bound,
)

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 11)]


def make(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return (
        (torch.randn(shape, generator=generator) + 1).to(dtype),
        torch.randn(shape, generator=generator) * 1e-3,
        (torch.randn(shape, generator=generator) * 3e-3).to(dtype),
    )


@pytest.mark.parametrize("changes", [{}, {"maximize": True}, {"beta1": 0.3, "beta2": 0.6}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_equals_float64_lion(shape, changes):
    """Weight decay is never left at zero: zero hides decay bugs."""
    parameter, momentum, gradient = make(shape)
    arguments = {**ARGUMENTS, "lr": 0.01, **changes}
    lr, weight_decay = arguments["lr"], arguments["weight_decay"]
    for step in (1, 2, 3):
        w, m, g = (t.double().numpy().copy() for t in (parameter, momentum, gradient))
        g = -g if arguments["maximize"] else g

        kernels.lion_step_float_(parameter, momentum, gradient, **{**arguments, "step": step})

        old, new = arguments["beta1"] * m, (1 - arguments["beta1"]) * g
        decided = sign_is_decided(old, new)
        assert decided.all()
        exact = w - lr * (np.sign(old + new) + weight_decay * w)
        assert (np.abs(parameter.numpy() - exact) <= float_update_bound(w, lr, weight_decay)).all()
        old, new = arguments["beta2"] * m, (1 - arguments["beta2"]) * g
        assert (np.abs(momentum.numpy() - (old + new)) <= sum_bound(old, new)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_may_have_another_float_dtype(dtype):
    parameter, momentum, gradient = make((40,))
    gradient = gradient.to(dtype)
    expected = parameter.clone(), momentum.clone()
    kernels.lion_step_float_(*expected, gradient.float(), **ARGUMENTS)

    kernels.lion_step_float_(parameter, momentum, gradient, **ARGUMENTS)

    assert_same_bits(parameter, expected[0])
    assert_same_bits(momentum, expected[1])


@pytest.mark.parametrize("value", [1.0, -1.0, 0.7, -300.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_bf16_is_unbiased_and_moves_by_one_unit_at_most(value, weight_decay):
    """A norm weight near 1 with lr 1e-5: 780 times less than a BF16 unit, and yet it moves."""
    n = 400_000
    lr = 1e-5 * abs(value)
    start = torch.full((n,), value, dtype=torch.bfloat16)
    parameter = start.clone()
    gradient = torch.full((n,), 1e-3)

    kernels.lion_step_float_(
        parameter,
        torch.zeros(n),
        gradient,
        **{**ARGUMENTS, "lr": lr, "weight_decay": weight_decay},
    )

    before = start[0].double().item()
    exact = before - (lr + lr * weight_decay * before)
    neighbours = parameter.double().unique()
    assert len(neighbours) == 2
    unit = (neighbours[1] - neighbours[0]).item()
    assert neighbours[0] < exact < neighbours[1]
    share = (exact - neighbours[0].item()) / unit
    error = abs(parameter.double().mean().item() - exact)
    # On top of five standard errors: FP32 rounding of the update and 16 random bits.
    noise = 2 * FP32_EPS * abs(value) + unit * 2.0**-16
    assert error <= 5 * unit * mean_error(share, n) + noise
    assert (parameter != start).any()


def test_bf16_to_nearest_does_not_move():
    """The control of the test above."""
    parameter = torch.ones(1000, dtype=torch.bfloat16)

    kernels.lion_step_float_(
        parameter,
        torch.zeros(1000),
        torch.ones(1000),
        **{**ARGUMENTS, "lr": 1e-5, "stochastic": False},
    )

    assert (parameter == 1).all()


def test_bf16_neighbours_round_independently():
    parameter = torch.ones(100_000, dtype=torch.bfloat16)
    lr = 2.0**-9  # half a unit below 1: a coin toss

    kernels.lion_step_float_(
        parameter,
        torch.zeros(100_000),
        torch.ones(100_000),
        **{**ARGUMENTS, "lr": lr, "weight_decay": 0.0},
    )

    sides = (parameter < 1).double() - 0.5
    assert abs(sides.mean().item()) <= 5 * mean_error(0.5, 100_000)
    for lag in (1, 2, 3, 4):
        assert abs((sides * sides.roll(lag)).mean().item()) <= 5 * 0.5 * mean_error(0.5, 100_000)


def test_bf16_elements_without_update_keep_their_bits():
    parameter = torch.randn(2000, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = parameter.clone()
    gradient = torch.zeros(2000)
    gradient[::2] = 1e-3

    for step in range(1, 50):
        kernels.lion_step_float_(
            parameter,
            torch.zeros(2000),
            gradient,
            **{**ARGUMENTS, "weight_decay": 0.0, "step": step},
        )

    assert_same_bits(parameter[1::2], before[1::2])
    assert (parameter[::2] != before[::2]).any()


def test_fp16_parameters_are_refused():
    parameter = torch.ones(3, dtype=torch.float16)

    with pytest.raises(TypeError, match=r"got torch\.float16 .*dtype=torch\.bfloat16"):
        kernels.lion_step_float_(parameter, torch.zeros(3), torch.zeros(3), **ARGUMENTS)


def test_momentum_must_be_fp32():
    with pytest.raises(
        TypeError, match=r"momentum of a float parameter is float32, got .*bfloat16"
    ):
        kernels.lion_step_float_(
            torch.ones(3), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3), **ARGUMENTS
        )


@pytest.mark.parametrize(("name", "shapes"), [("momentum", (4, 3)), ("gradient", (3, 4))])
def test_shapes_must_agree(name, shapes):
    with pytest.raises(
        ValueError, match=rf"{name} must have shape \(3,\) on cpu, got shape \(4,\)"
    ):
        kernels.lion_step_float_(torch.ones(3), *map(torch.zeros, shapes), **ARGUMENTS)
