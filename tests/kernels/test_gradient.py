"""Sum and norm of INT8 gradients against float64."""

import numpy as np
import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import Quantized
from tests.kernels.backends import cpu, reference
from tests.kernels.states import (
    coded,
    guarded,
    guards_are_intact,
    ramp,
    random,
    spread,
    stored64,
)
from tests.tolerances import assert_same_bits, rounding_bound

SHAPES = [(1, 1), (3, 256), (2, 257), (7, 100), (4, 1100)]


def pair(shape, group_size, factor):
    first = coded(random(shape, group_size), group_size)
    return first, coded(ramp(shape, group_size) * factor, group_size)


@pytest.mark.parametrize("factor", [1e-6, -0.01, 3.0])
@pytest.mark.parametrize("group_size", [256, 30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulate_is_the_sum_rounded_once(shape, group_size, factor):
    gradient, other = pair(shape, group_size, factor)
    first, second = stored64(gradient), stored64(other)
    kept = other.codes.clone(), other.scales.clone()
    codes, codes_buffer = guarded(gradient.codes)
    scales, scales_buffer = guarded(gradient.scales)
    gradient = Quantized(codes, scales, group_size)

    kernels.accumulate_(gradient, other)

    error = np.abs(stored64(gradient) - (first + second))
    bound = rounding_bound(np.abs(first) + np.abs(second), spread(scales, shape[1], group_size))
    assert (error <= bound).all()
    assert_same_bits(other.codes, kept[0])
    assert_same_bits(other.scales, kept[1])
    assert guards_are_intact(codes_buffer)
    assert guards_are_intact(scales_buffer)


def test_a_gradient_and_its_negative_add_to_zero():
    gradient, _ = pair((5, 300), 256, 1.0)

    kernels.accumulate_(gradient, Quantized(-gradient.codes, gradient.scales.clone(), 256))

    assert (gradient.codes == 0).all()
    assert (gradient.scales == np.float32(1e-30)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_accumulate_keeps_what_is_not_finite_visible(bad, side):
    gradients = pair((3, 300), 256, 1.0)
    gradients[side].scales[1, 1] = bad

    kernels.accumulate_(*gradients)

    finite = gradients[0].scales.isfinite()
    assert not finite[1, 1]
    assert int(finite.sum()) == finite.numel() - 1


@pytest.mark.parametrize("group_size", [256, 30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_norm_is_that_of_the_stored_values(shape, group_size):
    gradient = coded(ramp(shape, group_size) * 1e-4, group_size)

    norm = kernels.squared_norm(gradient)

    exact = (stored64(gradient) ** 2).sum()
    assert norm.dtype == torch.float64
    # Sums of squared codes are integers below 2**24; the rest is float64.
    assert norm.item() == pytest.approx(exact, rel=1e-13)


def test_squared_norm_of_the_largest_codes():
    """256 codes of 127 and a huge scale: the square of the sum is beyond FP32."""
    codes = torch.full((2, 512), 127, dtype=torch.int8)
    scales = torch.full((2, 2), 1e25)

    norm = kernels.squared_norm(Quantized(codes, scales, 256)).item()

    assert norm == pytest.approx(1024 * 127**2 * float(scales[0, 0].double()) ** 2, rel=1e-13)


@pytest.mark.parametrize("backend", [cpu, reference], ids=str)
def test_squared_norm_of_a_long_group_is_an_exact_sum(backend):
    """140,000 codes of 127 and one of 1: the sum is above 2**31 and odd, so that FP32 rounds it."""
    codes = torch.full((1, 140_001), 127, dtype=torch.int8)
    codes[0, 70_000] = 1

    norms = backend.squared_norms(Quantized(codes, torch.ones(1, 1), None))

    assert norms.item() == 140_000 * 127**2 + 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_squared_norm_tells_what_is_not_finite(bad):
    gradient = coded(torch.tensor([[bad, 1.0], [1.0, 2.0]]), 256)

    assert not kernels.squared_norm(gradient).isfinite()


def packed(rows, columns):
    """Return 4-bit codes, which only a momentum may have."""
    return Quantized(torch.zeros(rows, columns // 2).byte(), torch.ones(rows, 1), 64, bits=4)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda c, s: Quantized(c.float(), s, 256), TypeError, r"codes must be torch\.int8"),
        (lambda c, s: Quantized(c, s.half(), 256), ValueError, "scales must be float32"),
        (lambda c, s: Quantized(c[:-1], s[:-1], 256), ValueError, r"must have shape \(4, 300\)"),
        # The same number of groups, of another size.
        (lambda c, s: Quantized(c, s, 200), ValueError, "groups of 256 columns, got 200"),
        (lambda c, s: Quantized(c, s[:, :1].contiguous(), None), ValueError, "columns, got None"),
        (lambda c, s: packed(4, 64), TypeError, "other gradient must have codes of 8 bits, got 4"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(change, error, match):
    gradient, other = pair((4, 300), 256, 1.0)
    before = gradient.codes.clone(), gradient.scales.clone()

    with pytest.raises(error, match=match):
        kernels.accumulate_(gradient, change(*other.tensors))

    assert_same_bits(gradient.codes, before[0])
    assert_same_bits(gradient.scales, before[1])


def test_codes_of_four_bits_are_no_gradient():
    with pytest.raises(TypeError, match="gradient must have codes of 8 bits, got 4"):
        kernels.accumulate_(packed(2, 64), packed(2, 64))
    with pytest.raises(TypeError, match="gradient must have codes of 8 bits, got 4"):
        kernels.squared_norm(packed(2, 64))


def test_norm_of_codes_that_are_not_int8_is_refused():
    with pytest.raises(TypeError, match=r"codes must be torch\.int8, got torch\.float32"):
        kernels.squared_norm(Quantized(torch.ones(2, 3), torch.ones(2, 1), 256))
