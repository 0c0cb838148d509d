"""The fused quantization of a gradient and Lion step has the bits of the two operators in turn."""

import pytest
import torch

from qft_hf import kernels
from tests.kernels.backends import cpu, reference
from tests.kernels.states import (
    LionState,
    arguments,
    assert_same_state,
    coded,
    guards_are_intact,
    make_state,
    random,
)
from tests.tolerances import assert_same_bits

BACKENDS = [reference, cpu]


def start(columns: int = 300, group_size: int | None = 32, momentum_bits: int = 8) -> LionState:
    return make_state(
        (6, columns), group_size=group_size, outlier_fraction=0.02, momentum_bits=momentum_bits
    )


def run(backend, state: LionState, gradient: torch.Tensor, **changes) -> torch.Tensor:
    """Run the fused step with a float gradient, not the state's own; return its squared norm."""
    given = {name: changes.pop(name) for name in ("factor", "group_size") if name in changes}
    squares = backend.quantize_and_lion_step_(
        state.weight,
        state.momentum,
        gradient,
        **{"group_size": 256, **given},
        **arguments(**changes),
    )
    assert squares.shape == gradient.shape[:1]
    return squares.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_quantize_then_norm_then_step(backend, dtype, group_size, momentum_bits):
    expected = start(group_size=group_size, momentum_bits=momentum_bits)
    actual, buffers = expected.guarded()
    for step in (1, 2):
        gradient = (random((6, 300), None).roll(step) * 1e-3).to(dtype)
        kept = gradient.clone()
        quantized = coded(gradient, 256)
        reference.lion_step_(expected.weight, expected.momentum, quantized, **arguments(step=step))

        norm = run(backend, actual, gradient, step=step)

        assert_same_bits(norm, reference.squared_norm(quantized))
        assert_same_state(actual, expected)
        assert_same_bits(gradient, kept)
    assert all(guards_are_intact(buffer) for buffer in buffers.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum_bits", [8, 4])
def test_a_step_in_parts_by_rows_has_the_bits_of_the_whole(backend, momentum_bits):
    whole = make_state((6, 300), group_size=None, momentum_bits=momentum_bits)
    parts = whole.clone()
    gradient = random((6, 300), None) * 1e-3
    norm = run(backend, whole, gradient, first_row=0)

    norms = []
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        part = LionState(*(value.rows(rows) for value in parts.arguments()))
        norms.append(run(backend, part, gradient[rows], first_row=rows.start))

    assert_same_state(parts, whole)
    assert abs(sum(norms) - norm) <= 1e-15 * norm  # sums of fp64 in two orders


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_factor_scales_the_quantized_gradient_and_not_its_norm(backend):
    expected, actual = start(), start()
    gradient = random((6, 300), None) * 1e-3
    factor = torch.tensor(0.37)
    quantized = coded(gradient, 256)
    norm = reference.squared_norm(quantized)
    quantized.scales *= factor
    reference.lion_step_(expected.weight, expected.momentum, quantized, **arguments())

    found = run(backend, actual, gradient, factor=factor)

    assert_same_bits(found, norm)
    assert_same_state(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_left_alone_and_the_norm_tells(backend, bad, momentum_bits):
    gradient = random((6, 300), None) * 1e-3
    actual, before, expected = (start(momentum_bits=momentum_bits) for _ in range(3))
    run(backend, expected, gradient)
    gradient[2, 299] = bad

    norm = run(backend, actual, gradient)

    assert not norm.isfinite()
    others = [0, 1, 3, 4, 5]
    for name, tensor in actual.tensors().items():
        assert_same_bits(tensor[2], before.tensors()[name][2])
        assert_same_bits(tensor[others], expected.tensors()[name][others])
    assert (actual.momentum.codes[others] != before.momentum.codes[others]).any()


@pytest.mark.parametrize("factor", [torch.ones(2), torch.ones((), dtype=torch.float64)], ids=str)
def test_a_factor_is_one_fp32_number(factor):
    state, before = start(), start()
    with pytest.raises(ValueError, match=r"factor must be one float32 number on cpu, got"):
        run(kernels, state, random((6, 300), None), factor=factor)
    assert_same_state(state, before)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: t.double(), TypeError, r"gradient must be torch\.float32 or .*float64"),
        (lambda t: t[:-1], ValueError, r"gradient must have shape \(6, 300\)"),
        (lambda t: t.t().contiguous().t(), ValueError, r"gradient must be contiguous"),
        (lambda t: t[0], ValueError, r"gradient must be a non-empty \[rows, columns\] matrix"),
    ],
)
@pytest.mark.parametrize("backend", [kernels, *BACKENDS])
def test_a_gradient_that_does_not_fit_is_refused_before_anything_is_written(
    backend, change, error, match
):
    state, before = start(), start()

    with pytest.raises(error, match=match):
        run(backend, state, change(random((6, 300), None)))

    assert_same_state(state, before)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("weight.scales", lambda t: t * float("nan"), "weight scales must be finite and positive"),
        ("weight.outlier_columns", lambda t: t + 300, r"outlier columns must be in \[0, 300\)"),
        ("momentum.scales", lambda t: t / 0, "momentum scales must be finite"),
    ],
)
@pytest.mark.parametrize("backend", [kernels, *BACKENDS])
def test_values_that_would_do_harm_are_refused_before_anything_is_written(
    backend, name, change, match
):
    state = start()
    state = state.of({**state.tensors(), name: change(state.tensors()[name])})
    before = state.clone()

    with pytest.raises(ValueError, match=match):
        run(backend, state, random((6, 300), None))

    assert_same_state(state, before)


@pytest.mark.parametrize(
    ("momentum_bits", "group_size", "match"),
    [
        (8, 128, "must have the gradient's groups, got 256 columns for groups of 128"),
        (4, 100, "multiples of its 64 columns, got 100"),
        (8, 0, "at least one column, got group_size=0"),
    ],
)
@pytest.mark.parametrize("backend", [kernels, *BACKENDS])
def test_groups_that_do_not_fit_the_momentum_are_refused(backend, momentum_bits, group_size, match):
    state, before = (start(momentum_bits=momentum_bits) for _ in range(2))

    with pytest.raises(ValueError, match=match):
        run(backend, state, random((6, 300), None), group_size=group_size)

    assert_same_state(state, before)
