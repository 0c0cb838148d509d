"""Sum and norm of INT8 gradients against float64."""

import numpy as np
import pytest
import torch

from qft_hf import kernels
from tests.kernels.states import guarded, guards_are_intact, ramp, random, spread, values64
from tests.tolerances import assert_same_bits, rounding_bound

SHAPES = [(1, 1), (3, 256), (2, 257), (7, 100), (4, 1100)]


def pair(shape, group_size, factor):
    first = kernels.quantize(random(shape, group_size), group_size=group_size)
    second = kernels.quantize(ramp(shape, group_size) * factor, group_size=group_size)
    return *first, *second


@pytest.mark.parametrize("factor", [1e-6, -0.01, 3.0])
@pytest.mark.parametrize("group_size", [256, 30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulate_is_the_sum_rounded_once(shape, group_size, factor):
    codes, scales, other_codes, other_scales = pair(shape, group_size, factor)
    first = values64(codes, scales, group_size)
    second = values64(other_codes, other_scales, group_size)
    kept = other_codes.clone(), other_scales.clone()
    (codes, codes_buffer), (scales, scales_buffer) = guarded(codes), guarded(scales)

    kernels.accumulate_(codes, scales, other_codes, other_scales, group_size=group_size)

    error = np.abs(values64(codes, scales, group_size) - (first + second))
    bound = rounding_bound(np.abs(first) + np.abs(second), spread(scales, shape[1], group_size))
    assert (error <= bound).all()
    assert_same_bits(other_codes, kept[0])
    assert_same_bits(other_scales, kept[1])
    assert guards_are_intact(codes_buffer)
    assert guards_are_intact(scales_buffer)


def test_a_gradient_and_its_negative_add_to_zero():
    codes, scales, *_ = pair((5, 300), 256, 1.0)

    kernels.accumulate_(codes, scales, -codes, scales.clone(), group_size=256)

    assert (codes == 0).all()
    assert (scales == np.float32(1e-30)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [1, 3])
def test_accumulate_keeps_what_is_not_finite_visible(bad, side):
    tensors = pair((3, 300), 256, 1.0)
    tensors[side][1, 1] = bad

    kernels.accumulate_(*tensors, group_size=256)

    finite = tensors[1].isfinite()
    assert not finite[1, 1]
    assert int(finite.sum()) == finite.numel() - 1


@pytest.mark.parametrize("group_size", [256, 30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_norm_is_that_of_the_stored_values(shape, group_size):
    codes, scales = kernels.quantize(ramp(shape, group_size) * 1e-4, group_size=group_size)

    norm = kernels.squared_norm(codes, scales, group_size=group_size)

    exact = (values64(codes, scales, group_size) ** 2).sum()
    assert norm.dtype == torch.float64
    # Sums of squared codes are integers below 2**24; the rest is float64.
    assert norm.item() == pytest.approx(exact, rel=1e-13)


def test_squared_norm_of_the_largest_codes():
    """256 codes of 127 and a huge scale: the square of the sum is beyond FP32."""
    codes = torch.full((2, 512), 127, dtype=torch.int8)
    scales = torch.full((2, 2), 1e25)

    norm = kernels.squared_norm(codes, scales, group_size=256).item()

    assert norm == pytest.approx(1024 * 127**2 * float(scales[0, 0].double()) ** 2, rel=1e-13)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_squared_norm_tells_what_is_not_finite(bad):
    codes, scales = kernels.quantize(torch.tensor([[bad, 1.0], [1.0, 2.0]]), group_size=256)

    assert not kernels.squared_norm(codes, scales, group_size=256).isfinite()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda c, s: (c.float(), s), TypeError, r"other gradient codes must be torch\.int8"),
        (lambda c, s: (c, s.half()), ValueError, "other gradient scales must be float32"),
        (lambda c, s: (c[:-1], s[:-1]), ValueError, r"must have shape \(4, 300\)"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(change, error, match):
    codes, scales, *other = pair((4, 300), 256, 1.0)
    before = codes.clone(), scales.clone()

    with pytest.raises(error, match=match):
        kernels.accumulate_(codes, scales, *change(*other), group_size=256)

    assert_same_bits(codes, before[0])
    assert_same_bits(scales, before[1])


def test_norm_of_codes_that_are_not_int8_is_refused():
    with pytest.raises(TypeError, match=r"gradient codes must be torch\.int8, got torch\.float32"):
        kernels.squared_norm(torch.ones(2, 3), torch.ones(2, 1), group_size=256)
