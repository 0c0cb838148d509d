"""Group-wise INT8 quantization against numpy in float64."""

import numpy as np
import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import Quantized, Weight
from tests.kernels.backends import cpu, reference
from tests.kernels.states import coded, ramp, random, spread, stored64, ties, values64
from tests.tolerances import FP32_EPS, assert_same_bits, rounding_bound

SHAPES = [(1, 1), (1, 128), (3, 129), (7, 33), (5, 300)]  # short, exact, one over, odd, long
GROUP_SIZES = [None, 1, 32, 100, 128, 1000]  # 100: no power of two; 1000: longer than any row
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INPUTS = [random, ramp, ties]
LEAST_SCALE = float(np.float32(1e-30))


def quantize64(x: np.ndarray, group_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The definition of quantization, group by group, in float64."""
    rows, columns = x.shape
    size = group_size or columns
    codes = np.zeros(x.shape)
    scales = np.full((rows, -(-columns // size)), LEAST_SCALE)
    for row in range(rows):
        for group, start in enumerate(range(0, columns, size)):
            part = x[row, start : start + size]
            if np.abs(part).max() > 0:
                scales[row, group] = np.abs(part).max() / 127
                codes[row, start : start + size] = np.rint(part / scales[row, group])
    return codes, scales


@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_in_float64(make_input, shape, dtype, group_size):
    x = make_input(shape, group_size).to(dtype)
    before = x.clone()

    codes, scales = kernels.quantize(x, group_size=group_size)

    exact = x.double().numpy()
    expected_codes, expected_scales = quantize64(exact, group_size)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float32
    # Two roundings: the constant 1 / 127 and the product.
    np.testing.assert_allclose(scales.numpy(), expected_scales, rtol=2 * FP32_EPS * 1.01)
    error = np.abs(values64(codes, scales, group_size) - exact)
    assert (error <= rounding_bound(exact, spread(scales, shape[1], group_size))).all()
    # Codes agree exactly wherever FP32 noise cannot decide between two of them.
    steps = exact / spread(torch.from_numpy(expected_scales), shape[1], group_size)
    decided = np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 127 * 8 * FP32_EPS
    assert (codes.numpy() == expected_codes)[decided].all()
    assert codes.abs().max() <= 127
    assert_same_bits(x, before)


@pytest.mark.parametrize("group_size", [None, 5, 8])
def test_ties_go_to_the_even_code(group_size):
    """With a scale of exactly 1, in FP32 and in the definition, all codes must agree."""
    x = ties((6, 24), group_size)

    codes, scales = kernels.quantize(x, group_size=group_size)

    # 127 * fp32(1 / 127) rounds to 1, and so does its inverse.
    assert (scales == 1).all()
    np.testing.assert_array_equal(codes.numpy(), np.rint(x.numpy()))


@pytest.mark.parametrize("group_size", [None, 3, 4])
def test_a_group_of_zeros_has_the_least_scale_and_codes_zero(group_size):
    x = torch.zeros(3, 10)
    x[1] = 5.0  # neighbors of the zero rows must not leak into them

    codes, scales = kernels.quantize(x, group_size=group_size)

    assert (codes[[0, 2]] == 0).all()
    assert (scales[[0, 2]] == LEAST_SCALE).all()
    assert (codes[1] == 127).all()


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1.2e-28, 1.3e-28, 1e-20, 1e30, 3e38])
def test_tiny_and_huge_values_give_finite_results(magnitude):
    x = torch.tensor([[magnitude, -magnitude / 2, 0.0]])

    codes, scales = kernels.quantize(x, group_size=None)

    assert scales.isfinite().all()
    assert (scales > 0).all()
    error = np.abs(values64(codes, scales, None) - x.double().numpy())
    assert (error <= rounding_bound(x.numpy(), scales.numpy())).all()
    assert float(scales) == pytest.approx(max(magnitude / 127, LEAST_SCALE), rel=2 * FP32_EPS)
    assert bool(codes.any()) == (magnitude > LEAST_SCALE / 2)


@pytest.mark.parametrize("backend", [reference, cpu], ids=str)
def test_what_some_devices_take_for_zero_counts_as_zero(backend):
    """Subnormal values: codes must not depend on whether a device flushes their products to 0."""
    x = torch.tensor([[2.0**-127, -(2.0**-149), 0.0, -(2.0**-126)]])

    codes, scales = backend.quantize(x, group_size=None)

    assert (codes == 0).all()
    assert (scales == LEAST_SCALE).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 7, 9])  # a full group, its end, the short last group
def test_a_group_that_is_not_finite_keeps_a_scale_that_tells(bad, column):
    x = torch.ones(2, 10)
    x[1, column] = bad

    codes, scales = kernels.quantize(x, group_size=4)

    group = column // 4
    assert not scales[1, group].isfinite()
    assert (codes[1, 4 * group : 4 * group + 4] == 0).all()
    scales[1, group] = 1 / 127
    assert scales.isfinite().all()
    assert (codes[0] == 127).all()
    assert not kernels.dequantize(Weight.dense(Quantized(codes, scales, 4))).isnan().any()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_is_one_fp32_product(shape, group_size):
    """Codes far apart in one row and scales that differ from group to group."""
    weight = Weight.dense(coded(ramp(shape, group_size), group_size))
    before = weight.codes.clone(), weight.scales.clone()

    values = kernels.dequantize(weight)

    expected = stored64(weight).astype(np.float32)
    np.testing.assert_array_equal(values.numpy(), expected)
    assert_same_bits(weight.codes, before[0])
    assert_same_bits(weight.scales, before[1])


@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 10, 32])
def test_dequantize_puts_outliers_in_their_places(group_size, dtype, index_dtype):
    """Outlier columns differ by row and include the first and last; one rounding to `dtype`."""
    dense = coded(ramp((3, 33), group_size), group_size)
    columns = torch.tensor([[0, 7], [8, 32], [31, 32]])
    values = torch.tensor([[1.1, -2.2], [3e4, 1e-3], [0.0, -0.7]])

    weight = Weight(*dense.tensors, values, columns.to(index_dtype), group_size)
    actual = kernels.dequantize(weight, dtype=dtype)

    expected = stored64(dense).astype(np.float32)
    np.put_along_axis(expected, columns.numpy(), values.numpy(), axis=1)
    assert_same_bits(actual, torch.from_numpy(expected).to(dtype))


def test_dequantize_refuses_other_dtypes():
    weight = Weight.dense(coded(torch.ones(2, 4), None))

    with pytest.raises(TypeError, match=r"dequantize returns floats, got dtype=torch\.int32\."):
        kernels.dequantize(weight, dtype=torch.int32)


VALUES, COLUMNS = torch.ones(2, 1), torch.ones(2, 1).short()


@pytest.mark.parametrize(
    ("values", "columns", "error", "match"),
    [
        (VALUES, COLUMNS[:, :0], ValueError, r"same shape on cpu.*\(2, 1\).*\(2, 0\)"),
        (VALUES[:, :0], COLUMNS, ValueError, r"same shape on cpu.*\(2, 0\).*\(2, 1\)"),
        (VALUES[:1], COLUMNS[:1], ValueError, "one row for each of the 2 rows of the weight"),
        (VALUES[:, 0], COLUMNS[:, 0], ValueError, r"must be matrices.*got shapes \(2,\)"),
        (VALUES.to("meta"), COLUMNS, ValueError, r"same shape on cpu.*\(2, 1\) on meta"),
        (VALUES, COLUMNS.to("meta"), ValueError, r"same shape on cpu.*\(2, 1\) on meta"),
        (VALUES.double(), COLUMNS, TypeError, r"outlier values must be torch\.float32"),
        (VALUES, COLUMNS.long(), TypeError, r"outlier columns must be torch\.int16 or .*int32"),
    ],
)
def test_outliers_need_their_columns(values, columns, error, match):
    codes, scales = kernels.quantize(torch.ones(2, 4), group_size=None)

    with pytest.raises(error, match=match):
        Weight(codes, scales, values, columns, None)


@pytest.mark.parametrize("group_size", [0, -1])
def test_a_group_without_columns_is_refused(group_size):
    with pytest.raises(ValueError, match=rf"group_size={group_size}\. None makes one group"):
        kernels.quantize(torch.ones(2, 4), group_size=group_size)
    with pytest.raises(ValueError, match=rf"group_size={group_size}\. None makes one group"):
        Quantized(torch.ones(2, 4).char(), torch.ones(2, 1), group_size)
    none = torch.ones(2, 0)
    with pytest.raises(ValueError, match=rf"group_size={group_size}\. None makes one group"):
        Weight(torch.ones(2, 4).char(), torch.ones(2, 1), none, none.short(), group_size)


def test_quantizing_the_quantized_changes_nothing():
    first = coded(random((9, 70), None), 16)

    again, _ = kernels.quantize(kernels.dequantize(Weight.dense(first)), group_size=16)

    assert_same_bits(again, first.codes)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (
            torch.ones(2, 4, dtype=torch.int8),
            TypeError,
            r"x must be torch\.float32 or .*got .*int8",
        ),
        (torch.ones(2, 4, dtype=torch.float64), TypeError, r"got torch\.float64"),
        (torch.ones(4), ValueError, r"got shape \(4,\)\. Flatten .*\.view\(-1, columns\)"),
        (torch.ones(0, 4), ValueError, r"non-empty \[rows, columns\] matrix, got shape \(0, 4\)"),
        (torch.ones(4, 2).t(), ValueError, r"got strides \(1, 2\).*Call \.contiguous\(\) first"),
    ],
)
def test_what_cannot_be_quantized_is_refused(x, error, match):
    with pytest.raises(error, match=match):
        kernels.quantize(x, group_size=None)


@pytest.mark.parametrize(
    ("codes", "scales", "error", "match"),
    [
        (torch.ones(2, 4), torch.ones(2, 1), TypeError, r"codes must be torch\.int8"),
        (torch.ones(2, 4).byte(), torch.ones(2, 1), TypeError, r"codes must be torch\.int8"),
        (torch.ones(2, 4).char(), torch.ones(2, 2), ValueError, r"\(2, 1\), .*one per row and"),
        (torch.ones(2, 4).char(), torch.ones(2, 1).half(), ValueError, r"scales must be float32"),
        (torch.ones(2, 4).char(), torch.ones(1, 2).t(), None, ""),  # one column: contiguous
        (torch.ones(2, 4).char(), torch.ones(2, 1, device="meta"), ValueError, "on cpu, got"),
    ],
)
def test_codes_and_scales_must_fit_each_other(codes, scales, error, match):
    none = torch.ones(2, 0)
    if error is None:
        assert (kernels.dequantize(Weight.dense(Quantized(codes, scales, None))) == 1).all()
        assert (kernels.dequantize(Weight(codes, scales, none, none.short(), None)) == 1).all()
        return
    with pytest.raises(error, match=match):
        Quantized(codes, scales, None)
    with pytest.raises(error, match=match):
        Weight(codes, scales, none, none.short(), None)
