"""Steps in a direction chosen by an optimizer: backends against each other and against float64.

With the gradient as the direction, a step is SGD; a caller that maximizes passes `-direction`.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels import Weight
from tests.kernels.backends import cpu, reference
from tests.kernels.states import (
    LionState,
    assert_same_state,
    guarded,
    guards_are_intact,
    make_state,
    of_one,
    random,
    spread,
    step_arguments,
    step_float_arguments,
    stored64,
)
from tests.tolerances import FP32_EPS, assert_same_bits, mean_error, stochastic_bound

BACKENDS = [reference, cpu]


def direction_of(state: LionState) -> Tensor:
    """Return the gradient in FP32."""
    return reference.dequantize(Weight.dense(state.gradient))


def run(backend, state: LionState, direction: Tensor | None = None, **changes) -> None:
    """Run one step in `direction`, which defaults to the gradient."""
    direction = direction_of(state) if direction is None else direction
    backend.step_weight_(state.weight, direction, **step_arguments(**changes))


@pytest.mark.parametrize(
    ("sign", "changes"), [(1, {}), (-1, {}), (1, {"stochastic": False})], ids=str
)
@pytest.mark.parametrize("outlier_fraction", [0.0, 0.03])
@pytest.mark.parametrize("group_size", [None, 3, 100])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (13, 257), (40, 600)], ids=str)
def test_cpu_equals_reference_bit_for_bit(shape, group_size, outlier_fraction, sign, changes):
    """Steps of 0.1 to 300 quanta in guard regions, during which scales stay, grow and shrink."""
    expected = make_state(shape, group_size=group_size, outlier_fraction=outlier_fraction)
    actual, buffers = expected.guarded()
    direction, buffer = guarded(sign * direction_of(expected))
    kept = buffer.clone()

    for step, lr in enumerate([0.1, 3.0, 100.0, 0.1, 0.0], start=1):
        for state, backend in ((expected, reference), (actual, cpu)):
            run(backend, state, direction, **{"step": step, "lr": lr, **changes})
        assert_same_state(actual, expected)
    assert all(guards_are_intact(buffer) for buffer in buffers.values())
    assert_same_bits(buffer, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("lr", [1e-3, 0.3, 20.0])
@pytest.mark.parametrize(
    ("shape", "group_size", "outlier_fraction"),
    [((7, 33), None, 0.0), ((13, 257), 100, 0.03), ((40, 600), 32, 0.01)],
    ids=str,
)
def test_equals_a_float64_step_within_one_quantum(
    backend, shape, group_size, outlier_fraction, lr, sign
):
    """The direction is the gradient, of any magnitude, or its negative, which maximizes."""
    state = make_state(shape, group_size=group_size, outlier_fraction=outlier_fraction)
    before = state.clone()
    weight = stored64(before.weight)
    direction = sign * direction_of(state)
    gradient = direction.double().numpy()
    index = before.weight.outlier_columns.long().numpy()
    np.put_along_axis(weight, index, before.weight.outlier_values.double().numpy(), axis=1)
    exact = weight - lr * (gradient + 0.1 * weight)
    kept = direction.clone()

    run(backend, state, direction, lr=lr)

    scale = spread(state.weight.scales, shape[1], group_size)
    outliers = before.outlier_mask()
    error = np.abs(stored64(state.weight) - exact)
    assert (error <= stochastic_bound(scale))[~outliers].all()
    assert (state.weight.codes.numpy()[outliers] == 0).all()
    error = np.abs(state.weight.outlier_values.numpy() - np.take_along_axis(exact, index, axis=1))
    terms = np.abs(weight) * (1 + 0.1 * lr) + lr * np.abs(gradient)
    assert (error <= 6 * FP32_EPS * np.take_along_axis(terms, index, axis=1)).all()
    assert_same_bits(direction, kept)
    assert_same_bits(state.weight.outlier_columns, before.weight.outlier_columns)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
def test_with_the_sign_for_the_direction_it_is_the_weight_s_half_of_a_lion_step(
    backend, group_size, maximize, momentum_bits
):
    """Arithmetic and random numbers agree; with zero momentum, Lion's direction is the sign."""
    whole = make_state(
        (13, 257), group_size=group_size, outlier_fraction=0.03, momentum_bits=momentum_bits
    )
    whole.momentum.codes.zero_()
    half = whole.clone()
    direction = direction_of(half).sign() * (-1 if maximize else 1)
    given = step_arguments(lr=2e-3)

    rule = kernels.Lion(2e-3, 0.9, 0.99, given["weight_decay"], maximize=maximize)
    backend.lion_step_(*whole.arguments(), rule=rule, rounding=given["rounding"])
    backend.step_weight_(half.weight, direction, **given)

    for tensor, wanted in zip(half.weight.tensors, whole.weight.tensors, strict=True):
        assert_same_bits(tensor, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_in_parts_by_rows_has_the_bits_of_the_whole(backend):
    whole = make_state((6, 150), group_size=40, outlier_fraction=0.02)
    parts, direction = whole.clone(), direction_of(whole)
    run(backend, whole, direction, lr=0.3, first_row=5)

    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        given = step_arguments(lr=0.3, first_row=5 + rows.start)
        backend.step_weight_(parts.weight.rows(rows), direction[rows], **given)

    assert_same_state(parts, whole)


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_result_does_not_depend_on_the_number_of_threads(n_threads):
    """Large enough to be split; 101 rows do not divide evenly into 8 ranges."""
    expected = make_state((101, 2600), group_size=100, outlier_fraction=0.01)
    actual, direction = expected.clone(), direction_of(expected)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run(cpu, expected, direction, lr=0.3)
        torch.set_num_threads(n_threads)
        run(cpu, actual, direction, lr=0.3)
    finally:
        torch.set_num_threads(before)

    assert_same_state(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_in_proportion_to_the_gradient_and_unbiased(backend):
    """A tenth and a third of a quantum: the mean of 100,000 weights moves by exactly that."""
    state = make_state((100, 2000), group_size=None)
    state.weight.codes.fill_(40)
    state.weight.codes[:, 0] = 127
    state.weight.scales.fill_(3.1e-3)
    state.gradient.codes[:, ::2], state.gradient.codes[:, 1::2] = 30, 100
    state.gradient.scales.fill_(1e-3)

    run(backend, state, lr=3.1e-3 / 0.3, weight_decay=0.0)

    for first, quanta in ((2, 0.1), (1, 1 / 3)):
        moved = 40 - state.weight.codes[:, first::2].double().mean().item()
        assert abs(moved - quanta) <= 5 * mean_error(quanta, 99_900)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_zeros_starts_to_train(backend):
    """The first step replaces the smallest scale by the right one at once."""
    state = make_state((4, 40), group_size=None)
    codes, scales = backend.quantize(torch.zeros(1, 40), group_size=None)
    state.weight.codes[1], state.weight.scales[1] = codes[0], scales[0]
    state.gradient.codes[1] = torch.linspace(-127, 127, 40).char()
    step = 1e-5 * stored64(state.gradient)[1]

    run(backend, state, lr=1e-5)

    error = np.abs(stored64(state.weight)[1] + step)
    assert (error <= stochastic_bound(state.weight.scales[1].double().numpy())).all()
    assert state.weight.codes[1].abs().max() == 120


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_element_without_gradient_and_decay_keeps_its_code(backend):
    state = make_state((9, 300), group_size=40, outlier_fraction=0.02)
    state.gradient.codes[:, ::2] = 0
    before = state.clone()

    run(backend, state, lr=0.05, weight_decay=0.0)  # within the range of each scale

    same = (state.weight.scales == before.weight.scales).numpy()
    kept = np.repeat(same, 40, axis=1)[:, :300][:, ::2]
    assert kept.mean() > 0.5
    assert (state.weight.codes[:, ::2] == before.weight.codes[:, ::2]).numpy()[kept].all()
    assert (state.weight.codes[:, 1::2] != before.weight.codes[:, 1::2]).any()


@pytest.mark.parametrize(
    ("direction", "error", "match"),
    [
        (random((6, 50), None).double(), TypeError, r"direction must be torch\.float32.*float64"),
        (random((6, 50), None).bfloat16(), TypeError, r"direction must be torch\.float32"),
        (random((5, 50), None), ValueError, r"direction must have shape \(6, 50\) on cpu"),
        (random((6, 49), None), ValueError, r"direction must have shape \(6, 50\) on cpu"),
        (random((50, 6), None).t(), ValueError, "direction must be contiguous"),
        (random((6, 50), None).flatten(), ValueError, r"non-empty \[rows, columns\] matrix"),
        (random((6, 50), None).to("meta"), ValueError, "on cpu, got .* on meta"),
    ],
)
@pytest.mark.parametrize("backend", [kernels, *BACKENDS])
def test_a_direction_that_does_not_fit_is_refused_before_anything_is_written(
    backend, direction, error, match
):
    state = make_state((6, 50), group_size=16, outlier_fraction=0.03)
    before = state.clone()

    with pytest.raises(error, match=match):
        run(backend, state, direction)

    assert_same_state(state, before)


@pytest.mark.parametrize(
    ("name", "bad", "match"),
    [
        ("weight.scales", float("nan"), "weight scales must be finite and positive"),
        ("weight.scales", 0.0, "weight scales must be finite and positive"),
        ("weight.outlier_columns", 50, r"outlier columns must be in \[0, 50\), got 50"),
        ("direction", float("nan"), "direction must be finite, got 1 of 300 .* nan"),
        ("direction", -float("inf"), "direction must be finite, got 1 of 300 .* -inf"),
    ],
)
@pytest.mark.parametrize("backend", [kernels, *BACKENDS])
def test_values_that_would_do_harm_are_refused_before_anything_is_written(
    backend, name, bad, match
):
    state = make_state((6, 50), group_size=16, outlier_fraction=0.03)
    direction = direction_of(state)
    {**state.tensors(), "direction": direction}[name][4, -1] = bad
    before = state.clone()

    with pytest.raises(ValueError, match=match):
        run(backend, state, direction)

    assert_same_state(state, before)


# --- float parameters -----------------------------------------------------------------------------


def step_floats(backend, parameter: Tensor, direction: Tensor, **changes) -> None:
    backend.step_floats_([parameter], [direction], **step_float_arguments(**changes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float_parameters_take_a_float64_step(backend):
    generator = torch.Generator().manual_seed(3)
    parameter = torch.randn(7, 11, generator=generator)
    gradient = torch.randn(7, 11, generator=generator).bfloat16()
    before = parameter.clone()

    step_floats(backend, parameter, gradient, lr=0.3)

    w, g = before.double(), gradient.double()
    error = (parameter.double() - (w - 0.3 * (g + 0.1 * w))).abs()
    assert (error <= 5 * FP32_EPS * (1.03 * w.abs() + 0.3 * g.abs())).all()
    step_floats(backend, parameter, -gradient, lr=0.3)
    assert ((parameter.double() - w * 0.97**2).abs() <= 0.3 * 0.03 * g.abs() + 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_parameters_are_rounded_without_bias(backend):
    parameter = torch.ones(400_000, dtype=torch.bfloat16)

    step_floats(backend, parameter, torch.full((400_000,), 1e-3), lr=0.1, weight_decay=0.0)

    assert parameter.unique().numel() == 2
    share = 1e-4 / 2**-8  # of the gap below 1
    noise = 2**-8 * mean_error(share, 400_000) * 5 + 2**-8 * 2**-16 + FP32_EPS
    assert abs(parameter.double().mean().item() - (1 - 1e-4)) <= noise


@pytest.mark.parametrize("changes", [{}, {"stochastic": False}], ids=str)
def test_many_are_stepped_as_each_alone_by_the_reference(changes):
    """Parameters of both dtypes and every shape, also empty and large ones, in guard regions."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(), (1,), (7,), (3, 5), (2, 3, 11), (0,), (2500,)]
    cases = [(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    parameters = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in cases]
    directions = [
        torch.randn(shape, generator=generator).to(dtype)
        for (shape, _), dtype in zip(
            cases, 5 * [torch.float32, torch.float16, torch.bfloat16], strict=False
        )
    ]
    given = step_float_arguments(len(cases), lr=0.01, **changes)
    expected = [parameter.clone() for parameter in parameters]
    for i, (parameter, direction) in enumerate(zip(expected, directions, strict=True)):
        reference.step_floats_([parameter], [direction], **of_one(given, i))
    pairs = [guarded(parameter) for parameter in parameters]
    kept = [direction.clone() for direction in directions]

    cpu.step_floats_([inner for inner, _ in pairs], directions, **given)

    for (inner, buffer), wanted in zip(pairs, expected, strict=True):
        assert_same_bits(inner, wanted)
        assert guards_are_intact(buffer)
    for direction, wanted in zip(directions, kept, strict=True):
        assert_same_bits(direction, wanted)


@pytest.mark.parametrize("backend", [kernels, *BACKENDS])
def test_float_refusals(backend):
    one = torch.ones(3)
    with pytest.raises(TypeError, match=r"got torch\.float16 .*dtype=torch\.bfloat16"):
        step_floats(backend, one.half(), one)
    with pytest.raises(TypeError, match=r"got torch\.float64\. Call \.float\(\) first"):
        step_floats(backend, one, one.double())
    with pytest.raises(ValueError, match=r"gradient must have shape \(3,\) on cpu"):
        step_floats(backend, one, torch.ones(4))
    with pytest.raises(ValueError, match=r"was passed twice.*pass it once"):
        backend.step_floats_([one, one], [one, one], **step_float_arguments(2))
    with pytest.raises(ValueError, match=r"for each float parameter, got \[1, 2, 1, 1\]"):
        backend.step_floats_([one], [one, one], **step_float_arguments())
    assert one.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float_element_whose_direction_is_not_finite_stays(backend):
    parameter = torch.ones(3)
    direction = torch.tensor([1.0, float("nan"), float("inf")])
    step_floats(backend, parameter, direction, lr=0.25, weight_decay=0.5)
    assert parameter.tolist() == [0.625, 1.0, 1.0]
