"""SGD without state: backends against each other, and against SGD in float64."""

import numpy as np
import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import cpu, reference
from tests.kernels.states import (
    ARGUMENTS,
    LionState,
    float_arguments,
    guarded,
    guards_are_intact,
    make_state,
    spread,
    values64,
)
from tests.tolerances import FP32_EPS, assert_same_bits, mean_error, stochastic_bound

BACKENDS = [reference, cpu]
SGD = {name: value for name, value in ARGUMENTS.items() if not name.startswith("beta")}
WEIGHT = ("codes", "scales", "outlier_values", "outlier_columns")


def run(backend, state: LionState, group_size: int | None, **changes) -> None:
    tensors = [t for name, t in state.tensors().items() if not name.startswith("momentum")]
    arguments = {"state_group_size": 256, **SGD, **changes}
    backend.sgd_step_(*tensors, group_size=group_size, **arguments)


@pytest.mark.parametrize("changes", [{}, {"maximize": True}, {"stochastic": False}], ids=str)
@pytest.mark.parametrize("outlier_fraction", [0.0, 0.03])
@pytest.mark.parametrize("group_size", [None, 3, 100])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (13, 257), (40, 600)], ids=str)
def test_cpu_equals_reference_bit_for_bit(shape, group_size, outlier_fraction, changes):
    """Steps of 0.1 to 300 quanta, in guard regions: scales stick, grow and shrink on the way."""
    expected = make_state(shape, group_size=group_size, outlier_fraction=outlier_fraction)
    pairs = {name: guarded(tensor) for name, tensor in expected.tensors().items()}
    actual = LionState(**{name: inner for name, (inner, _) in pairs.items()})

    for step, lr in enumerate([0.1, 3.0, 100.0, 0.1, 0.0], start=1):
        for state, backend in ((expected, reference), (actual, cpu)):
            run(backend, state, group_size, **{"step": step, "lr": lr, **changes})
        for name, tensor in actual.tensors().items():
            assert_same_bits(tensor, getattr(expected, name))
    assert all(guards_are_intact(buffer) for _, buffer in pairs.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 0.3, 20.0])
@pytest.mark.parametrize(
    ("shape", "group_size", "outlier_fraction"),
    [((7, 33), None, 0.0), ((13, 257), 100, 0.03), ((40, 600), 32, 0.01)],
    ids=str,
)
def test_equals_float64_sgd_within_one_quantum(
    backend, shape, group_size, outlier_fraction, lr, maximize
):
    state = make_state(shape, group_size=group_size, outlier_fraction=outlier_fraction)
    before = state.clone()
    weight = values64(before.codes, before.scales, group_size)
    gradient = values64(before.gradient_codes, before.gradient_scales, 256)
    index = before.outlier_columns.long().numpy()
    np.put_along_axis(weight, index, before.outlier_values.double().numpy(), axis=1)
    exact = weight - lr * ((-gradient if maximize else gradient) + 0.1 * weight)

    run(backend, state, group_size, lr=lr, maximize=maximize)

    scale = spread(state.scales, shape[1], group_size)
    outliers = before.outlier_mask()
    error = np.abs(values64(state.codes, state.scales, group_size) - exact)
    assert (error <= stochastic_bound(scale))[~outliers].all()
    assert (state.codes.numpy()[outliers] == 0).all()
    error = np.abs(state.outlier_values.numpy() - np.take_along_axis(exact, index, axis=1))
    terms = np.abs(weight) * (1 + 0.1 * lr) + lr * np.abs(gradient)
    assert (error <= 6 * FP32_EPS * np.take_along_axis(terms, index, axis=1)).all()
    for name, tensor in state.tensors().items():
        if name not in WEIGHT:
            assert_same_bits(tensor, getattr(before, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_in_proportion_to_the_gradient_and_unbiased(backend):
    """A tenth and a third of a quantum: the mean of 100,000 weights moves by exactly that."""
    state = make_state((100, 2000), group_size=None)
    state.codes.fill_(40)
    state.codes[:, 0] = 127
    state.scales.fill_(3.1e-3)
    state.gradient_codes[:, ::2], state.gradient_codes[:, 1::2] = 30, 100
    state.gradient_scales.fill_(1e-3)

    run(backend, state, None, lr=3.1e-3 / 0.3, weight_decay=0.0)

    for first, quanta in ((2, 0.1), (1, 1 / 3)):
        moved = 40 - state.codes[:, first::2].double().mean().item()
        assert abs(moved - quanta) <= 5 * mean_error(quanta, 99_900)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_zeros_starts_to_train(backend):
    """From the least scale to that of the first step, at once."""
    state = make_state((4, 40), group_size=None)
    codes, scales = backend.quantize(torch.zeros(1, 40), None)
    state.codes[1], state.scales[1] = codes[0], scales[0]
    state.gradient_codes[1] = torch.linspace(-127, 127, 40).char()
    step = 1e-5 * values64(state.gradient_codes, state.gradient_scales, 256)[1]

    run(backend, state, None, lr=1e-5)

    error = np.abs(values64(state.codes, state.scales, None)[1] + step)
    assert (error <= stochastic_bound(state.scales[1].double().numpy())).all()
    assert state.codes[1].abs().max() == 120


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_element_without_gradient_and_decay_keeps_its_code(backend):
    state = make_state((9, 300), group_size=40, outlier_fraction=0.02)
    state.gradient_codes[:, ::2] = 0
    before = state.clone()

    run(backend, state, 40, lr=0.05, weight_decay=0.0)  # within the range of each scale

    same = (state.scales == before.scales).numpy()
    kept = np.repeat(same, 40, axis=1)[:, :300][:, ::2]
    assert kept.mean() > 0.5
    assert (state.codes[:, ::2] == before.codes[:, ::2]).numpy()[kept].all()
    assert (state.codes[:, 1::2] != before.codes[:, 1::2]).any()


def step_floats(parameter: torch.Tensor, gradient: torch.Tensor, **changes) -> None:
    arguments = float_arguments(1, **changes)
    del arguments["beta1"], arguments["beta2"]
    kernels.sgd_step_floats_([parameter], [gradient], **arguments)


def test_float_parameters_equal_float64_sgd():
    generator = torch.Generator().manual_seed(3)
    parameter = torch.randn(7, 11, generator=generator)
    gradient = torch.randn(7, 11, generator=generator).bfloat16()
    before = parameter.clone()

    step_floats(parameter, gradient, lr=0.3)

    w, g = before.double(), gradient.double()
    error = (parameter.double() - (w - 0.3 * (g + 0.1 * w))).abs()
    assert (error <= 5 * FP32_EPS * (1.03 * w.abs() + 0.3 * g.abs())).all()
    step_floats(parameter, gradient, lr=0.3, maximize=True)
    assert ((parameter.double() - w * 0.97**2).abs() <= 0.3 * 0.03 * g.abs() + 1e-5).all()


def test_bf16_parameters_are_rounded_without_bias():
    parameter = torch.ones(400_000, dtype=torch.bfloat16)

    step_floats(parameter, torch.full((400_000,), 1e-3), lr=0.1, weight_decay=0.0)

    assert parameter.unique().numel() == 2
    share = 1e-4 / 2**-8  # of the gap below 1
    noise = 2**-8 * mean_error(share, 400_000) * 5 + 2**-8 * 2**-16 + FP32_EPS
    assert abs(parameter.double().mean().item() - (1 - 1e-4)) <= noise


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        ("codes", lambda t: t.int(), TypeError, r"weight codes must be torch\.int8"),
        ("gradient_codes", lambda t: t[:-1], ValueError, "gradient scales must be float32"),
        ("gradient_scales", lambda t: t.double(), ValueError, "gradient scales must be float32"),
        ("outlier_values", lambda t: t.half(), TypeError, "outlier values must be torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(name, change, error, match):
    state = make_state((6, 50), group_size=16, outlier_fraction=0.03)
    setattr(state, name, change(getattr(state, name)))
    before = state.clone()

    with pytest.raises(error, match=match):
        run(kernels, state, 16)

    for kept in WEIGHT:
        assert_same_bits(getattr(state, kept), getattr(before, kept))


def test_float_refusals():
    with pytest.raises(TypeError, match=r"got torch\.float16 .*dtype=torch\.bfloat16"):
        step_floats(torch.ones(3).half(), torch.ones(3))
    with pytest.raises(ValueError, match=r"gradient must have shape \(3,\) on cpu"):
        step_floats(torch.ones(3), torch.ones(4))


def test_a_float_element_whose_gradient_is_not_finite_stays():
    parameter = torch.ones(3)
    step_floats(
        parameter, torch.tensor([1.0, float("nan"), float("inf")]), lr=0.25, weight_decay=0.5
    )
    assert parameter.tolist() == [0.625, 1.0, 1.0]
