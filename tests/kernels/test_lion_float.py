"""Lion on float parameters: FP32 exactly, BF16 stochastically."""

import numpy as np
import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import Roundings
from qft_hf.kernels.values import N_LIVE
from tests.kernels.backends import cpu, reference
from tests.kernels.states import arguments, float_arguments, guarded, guards_are_intact, of_one
from tests.tolerances import (
    FP32_EPS,
    assert_same_bits,
    float_update_bound,
    mean_error,
    sign_is_decided,
    sum_bound,
)

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 11)]


def step_(parameter, momentum, gradient, **changes):
    """Step one parameter."""
    kernels.lion_step_floats_([parameter], [momentum], [gradient], **float_arguments(**changes))


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
    changes = {"lr": 0.01, **changes}
    lr, beta1, beta2, weight_decay, maximize = arguments(**changes)["rule"]
    for step in (1, 2, 3):
        w, m, g = (t.double().numpy().copy() for t in (parameter, momentum, gradient))
        g = -g if maximize else g

        step_(parameter, momentum, gradient, **changes, step=step)

        old, new = beta1 * m, (1 - beta1) * g
        decided = sign_is_decided(old, new)
        assert decided.all()
        exact = w - lr * (np.sign(old + new) + weight_decay * w)
        assert (np.abs(parameter.numpy() - exact) <= float_update_bound(w, lr, weight_decay)).all()
        old, new = beta2 * m, (1 - beta2) * g
        assert (np.abs(momentum.numpy() - (old + new)) <= sum_bound(old, new)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_may_have_another_float_dtype(dtype):
    parameter, momentum, gradient = make((40,))
    gradient = gradient.to(dtype)
    expected = parameter.clone(), momentum.clone()
    step_(*expected, gradient.float())

    step_(parameter, momentum, gradient)

    assert_same_bits(parameter, expected[0])
    assert_same_bits(momentum, expected[1])


@pytest.mark.parametrize("value", [1.0, -1.0, 0.7, -300.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_bf16_is_unbiased_and_moves_by_one_unit_at_most(value, weight_decay):
    """A norm weight near 1 moves on average, although lr 1e-5 is 1/780 of a BF16 unit."""
    n = 400_000
    lr = 1e-5 * abs(value)
    start = torch.full((n,), value, dtype=torch.bfloat16)
    parameter = start.clone()
    gradient = torch.full((n,), 1e-3)

    step_(parameter, torch.zeros(n), gradient, lr=lr, weight_decay=weight_decay)

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
    """Control for the test above."""
    parameter = torch.ones(1000, dtype=torch.bfloat16)

    step_(parameter, torch.zeros(1000), torch.ones(1000), lr=1e-5, stochastic=False)

    assert (parameter == 1).all()


def test_bf16_neighbours_round_independently():
    parameter = torch.ones(100_000, dtype=torch.bfloat16)
    lr = 2.0**-9  # half a unit below 1: a coin toss

    step_(parameter, torch.zeros(100_000), torch.ones(100_000), lr=lr, weight_decay=0.0)

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
        step_(parameter, torch.zeros(2000), gradient, weight_decay=0.0, step=step)

    assert_same_bits(parameter[1::2], before[1::2])
    assert (parameter[::2] != before[::2]).any()


def test_fp16_parameters_are_refused():
    parameter = torch.ones(3, dtype=torch.float16)

    with pytest.raises(TypeError, match=r"got torch\.float16 .*dtype=torch\.bfloat16"):
        step_(parameter, torch.zeros(3), torch.zeros(3))


def test_momentum_must_be_fp32():
    with pytest.raises(
        TypeError, match=r"float parameter's momentum must be float32, got .*bfloat16"
    ):
        step_(torch.ones(3), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3))


@pytest.mark.parametrize(("name", "shapes"), [("momentum", (4, 3)), ("gradient", (3, 4))])
def test_shapes_must_agree(name, shapes):
    with pytest.raises(
        ValueError, match=rf"{name} must have shape \(3,\) on cpu, got shape \(4,\)"
    ):
        step_(torch.ones(3), *map(torch.zeros, shapes))


# --- many at once ---------------------------------------------------------------------------------


def many():
    """Return norms and biases of both dtypes and every shape, an empty and a large one included."""
    members = [make(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    members += [make((0,)), make((2500,), torch.bfloat16)]
    members += [(*make((9,))[:2], torch.linspace(-1, 1, 9, dtype=torch.bfloat16))]
    return [list(tensors) for tensors in zip(*members, strict=True)]


@pytest.mark.parametrize("changes", [{}, {"maximize": True}, {"stochastic": False}], ids=str)
def test_many_are_stepped_as_each_alone_by_the_reference(changes):
    parameters, momenta, gradients = many()
    given = float_arguments(len(parameters), lr=0.01, **changes)
    expected = many()
    for i, tensors in enumerate(zip(*expected, strict=True)):
        reference.lion_step_floats_(*([tensor] for tensor in tensors), **of_one(given, i))
    kept = [gradient.clone() for gradient in gradients]
    pairs = [[guarded(tensor) for tensor in tensors] for tensors in (parameters, momenta)]
    inside = [[inner for inner, _ in tensors] for tensors in pairs]

    kernels.lion_step_floats_(*inside, gradients, **given)

    for actual, wanted in zip([*inside, gradients], [*expected[:2], kept], strict=True):
        for tensor, other in zip(actual, wanted, strict=True):
            assert_same_bits(tensor, other)
    assert all(guards_are_intact(buffer) for tensors in pairs for _, buffer in tensors)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_in_a_given_direction_has_the_bits_of_the_reference(dtype, stochastic):
    """Signs of zeros, infinities and NaN included, in parameters and in directions."""
    odd = torch.tensor([0.0, -0.0, 1.0, -3e38, float("inf"), float("nan"), 1e-40])
    values, directions = odd.repeat(7), odd.repeat_interleave(7)
    roundings = Roundings(1, [2], [3], stochastic=stochastic)
    results = []
    for backend in (reference, cpu):
        parameter = values.to(dtype)
        backend.step_floats_(
            [parameter], [directions], lr=0.01, weight_decay=0.1, roundings=roundings
        )
        results.append(parameter)
    assert_same_bits(*results)


@pytest.mark.parametrize("n", range(1, 10))
def test_the_last_elements_are_rounded_at_random_too(n):
    """Four elements share a counter. With fewer than 40 parameters, nearest may agree by chance."""
    results = []
    for backend in (cpu, reference):
        members = [make((n,), torch.bfloat16) for _ in range(40)]
        tensors = [list(part) for part in zip(*members, strict=True)]
        backend.lion_step_floats_(*tensors, **float_arguments(40, lr=1e-3))
        results.append(torch.stack(tensors[0]))
    assert_same_bits(*results)


def test_parameters_in_another_memory_order_are_stepped_too():
    expected = make((5, 7), torch.bfloat16)
    actual = [tensor.t().contiguous().t() for tensor in expected]
    version = actual[0]._version

    step_(*actual)

    reference.lion_step_floats_(*([tensor] for tensor in expected), **float_arguments())
    for tensor, wanted in zip(actual, expected, strict=True):
        assert_same_bits(tensor, wanted)
    assert actual[0]._version > version


def test_step_and_stream_choose_the_random_numbers_of_each_parameter():
    results = []
    for steps, streams in [([7, 7], [3, 3]), ([7, 8], [3, 3]), ([7, 7], [3, 4])]:
        parameters = [torch.ones(500, dtype=torch.bfloat16) for _ in range(2)]
        momenta = [torch.zeros(500) for _ in range(2)]
        gradients = [torch.ones(500) for _ in range(2)]
        given = float_arguments(lr=1e-3)
        given["roundings"] = given["roundings"]._replace(steps=steps, streams=streams)
        kernels.lion_step_floats_(parameters, momenta, gradients, **given)
        results.append(torch.equal(*parameters))

    assert results == [True, False, False]


def test_no_parameters_are_no_work():
    kernels.lion_step_floats_([], [], [], **float_arguments(0))
    roundings = Roundings(1, [], [], live=torch.zeros(1, N_LIVE, dtype=torch.float64))
    kernels.step_floats_([], [], lr=0.1, weight_decay=0.1, roundings=roundings)


def test_each_parameter_needs_one_of_each():
    parameters, momenta, gradients = many()
    before = [parameter.clone() for parameter in parameters]

    with pytest.raises(ValueError, match=r"for each float parameter, got \[13, 12, 13, 13\]"):
        kernels.lion_step_floats_(parameters, momenta, gradients[1:], **float_arguments(13))
    with pytest.raises(ValueError, match="got 13 parameters and 12 momenta"):
        kernels.lion_step_floats_(parameters, momenta[1:], gradients, **float_arguments(13))
    for parameter, wanted in zip(parameters, before, strict=True):
        assert_same_bits(parameter, wanted)


def test_a_parameter_that_comes_twice_is_refused():
    """On a GPU both copies would be read before either is written."""
    parameter, momentum, gradient = make((5,))

    with pytest.raises(ValueError, match=r"was passed twice.*pass it once"):
        kernels.lion_step_floats_(
            [parameter, parameter],
            [momentum, momentum.clone()],
            [gradient, gradient],
            **float_arguments(2),
        )


def test_parameters_on_two_devices_are_refused():
    members = [make((5,)), [tensor.to("meta") for tensor in make((5,))]]

    with pytest.raises(ValueError, match=r"got cpu and meta\. Make one call for each device"):
        kernels.lion_step_floats_(*zip(*members, strict=True), **float_arguments(2))


def test_one_that_does_not_fit_stops_all_before_anything_is_written():
    parameters, momenta, gradients = many()
    before = [parameter.clone() for parameter in parameters]
    momenta[-1] = momenta[-1][1:]

    with pytest.raises(ValueError, match=r"momentum must have shape \(9,\)"):
        kernels.lion_step_floats_(parameters, momenta, gradients, **float_arguments(13))

    for parameter, wanted in zip(parameters, before, strict=True):
        assert_same_bits(parameter, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [cpu, reference])
def test_an_element_whose_gradient_is_not_finite_stays(backend, dtype, bad):
    expected = torch.linspace(-2, 2, 50).to(dtype), torch.linspace(-1, 1, 50)
    actual, before = ([tensor.clone() for tensor in expected] for _ in range(2))
    gradient = torch.linspace(-1, 1.1, 50)
    given = float_arguments(lr=0.1, weight_decay=0.3)
    backend.lion_step_floats_(*([tensor] for tensor in expected), [gradient], **given)
    gradient[[3, 49]] = bad

    backend.lion_step_floats_(*([tensor] for tensor in actual), [gradient], **given)

    others = [i for i in range(50) if i not in (3, 49)]
    for tensor, wanted, old in zip(actual, expected, before, strict=True):
        assert_same_bits(tensor[[3, 49]], old[[3, 49]])
        assert_same_bits(tensor[others], wanted[others])
        assert (wanted[[3, 49]] != old[[3, 49]]).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_momentum_that_is_not_finite_stops_all_before_anything_is_written(bad):
    parameters, momenta, gradients = many()
    momenta[-2][3] = bad
    before = [parameter.clone() for parameter in parameters]

    with pytest.raises(ValueError, match=rf"momentum must be finite, got 1 of 2500 .* {bad}\."):
        kernels.lion_step_floats_(parameters, momenta, gradients, **float_arguments(13))

    for parameter, wanted in zip(parameters, before, strict=True):
        assert_same_bits(parameter, wanted)


def test_a_gradient_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"got torch\.float64\. Call \.float\(\) first"):
        step_(torch.ones(3), torch.zeros(3), torch.zeros(3, dtype=torch.float64))
