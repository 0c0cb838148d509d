"""Quantization of a gradient and the step with it at once: the bits of the two in turn."""

import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import cpu, reference
from tests.kernels.states import ARGUMENTS, guarded, guards_are_intact, make_state, random
from tests.tolerances import assert_same_bits

BACKENDS = [reference, cpu]


def start(columns=300, group_size=32):
    state = make_state((6, columns), group_size=group_size, outlier_fraction=0.02)
    return list(state.arguments()[:-2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_quantize_then_norm_then_step(backend, dtype, group_size):
    expected = start(group_size=group_size)
    pairs = [guarded(tensor) for tensor in expected]
    actual = [inner for inner, _ in pairs]
    for step in (1, 2):
        gradient = (random((6, 300), None).roll(step) * 1e-3).to(dtype)
        kept = gradient.clone()
        codes, scales = reference.quantize(gradient, 256)
        sizes = {"group_size": group_size, "state_group_size": 256}
        reference.lion_step_(*expected, codes, scales, **sizes, **{**ARGUMENTS, "step": step})

        norm = backend.quantize_and_lion_step_(
            *actual, gradient, **sizes, **{**ARGUMENTS, "step": step}
        )

        assert_same_bits(norm, reference.squared_norm(codes, scales, 256))
        for tensor, wanted in zip(actual, expected, strict=True):
            assert_same_bits(tensor, wanted)
        assert_same_bits(gradient, kept)
    assert all(guards_are_intact(buffer) for _, buffer in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum_bits", [8, 4])
def test_a_step_in_parts_by_rows_has_the_bits_of_the_whole(backend, momentum_bits):
    whole = list(
        make_state((6, 300), group_size=None, momentum_bits=momentum_bits).arguments()[:-2]
    )
    parts = [tensor.clone() for tensor in whole]
    gradient = random((6, 300), None) * 1e-3
    sizes = {"group_size": None, "state_group_size": 256}
    norm = backend.quantize_and_lion_step_(*whole, gradient, **sizes, **ARGUMENTS)

    norms = [
        backend.quantize_and_lion_step_(
            *[tensor[rows] for tensor in parts],
            gradient[rows],
            first_row=rows.start,
            **sizes,
            **ARGUMENTS,
        )
        for rows in (slice(0, 1), slice(1, 5), slice(5, 6))
    ]

    for tensor, wanted in zip(parts, whole, strict=True):
        assert_same_bits(tensor, wanted)
    assert abs(sum(norms) - norm) <= 1e-15 * norm  # sums of fp64 in two orders


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_factor_scales_the_quantized_gradient_and_not_its_norm(backend):
    expected, actual = start(), start()
    gradient = random((6, 300), None) * 1e-3
    factor = torch.tensor(0.37)
    sizes = {"group_size": 32, "state_group_size": 256}
    codes, scales = reference.quantize(gradient, 256)
    norm = reference.squared_norm(codes, scales, 256)
    reference.lion_step_(*expected, codes, scales * factor, **sizes, **ARGUMENTS)

    found = backend.quantize_and_lion_step_(*actual, gradient, factor=factor, **sizes, **ARGUMENTS)

    assert_same_bits(found, norm)
    for tensor, wanted in zip(actual, expected, strict=True):
        assert_same_bits(tensor, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_left_alone_and_the_norm_tells(backend, bad):
    gradient = random((6, 300), None) * 1e-3
    actual, before = start(), start()
    expected = start()
    sizes = {"group_size": 32, "state_group_size": 256}
    backend.quantize_and_lion_step_(*expected, gradient, **sizes, **ARGUMENTS)
    gradient[2, 299] = bad

    norm = backend.quantize_and_lion_step_(*actual, gradient, **sizes, **ARGUMENTS)

    assert not norm.isfinite()
    others = [0, 1, 3, 4, 5]
    for tensor, wanted, old in zip(actual, expected, before, strict=True):
        assert_same_bits(tensor[2], old[2])
        assert_same_bits(tensor[others], wanted[others])
    assert (actual[4][others] != before[4][others]).any()


@pytest.mark.parametrize("factor", [torch.ones(2), torch.ones((), dtype=torch.float64)], ids=str)
def test_a_factor_is_one_fp32_number(factor):
    tensors = [*start(), random((6, 300), None)]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=r"factor must be one float32 number on cpu, got"):
        kernels.quantize_and_lion_step_(
            *tensors, factor=factor, group_size=32, state_group_size=256, **ARGUMENTS
        )
    for tensor, wanted in zip(tensors, before, strict=True):
        assert_same_bits(tensor, wanted)


@pytest.mark.parametrize(
    ("index", "change", "error", "match"),
    [
        (6, lambda t: t.double(), TypeError, r"gradient must be torch\.float32 or .*float64"),
        (6, lambda t: t[:-1], ValueError, r"gradient must have shape \(6, 300\)"),
        (6, lambda t: t.t().contiguous().t(), ValueError, r"gradient must be contiguous"),
        (0, lambda t: t.float(), TypeError, r"weight codes must be torch\.int8"),
        (1, lambda t: t * float("nan"), ValueError, "weight scales must be finite and positive"),
        (3, lambda t: t + 300, ValueError, r"outlier columns must be in \[0, 300\)"),
        (5, lambda t: t / 0, ValueError, "momentum scales must be finite"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(index, change, error, match):
    tensors = [*start(), random((6, 300), None)]
    tensors[index] = change(tensors[index])
    before = [tensor.clone() for tensor in tensors]

    with pytest.raises(error, match=match):
        kernels.quantize_and_lion_step_(*tensors, group_size=32, state_group_size=256, **ARGUMENTS)

    for tensor, wanted in zip(tensors, before, strict=True):
        assert_same_bits(tensor, wanted)
