"""INT8 quantization in numba, group by group. Twin: `kernels/quantization.py`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import quantization as operators
from ..groups import MAGIC, QMAX, TINY, empty_quantized
from ..values import Weight
from .bf16 import float_array, store_row, widen
from .threads import for_each_row_range, run

_f32 = np.float32
_MAGIC, _QMAX, _TINY, _PER_QMAX = _f32(MAGIC), _f32(QMAX), _f32(TINY), _f32(1.0 / QMAX)
_ONE = _f32(1.0)
_MAGNITUDE = np.int32(0x7FFFFFFF)  # FP32 without its sign: as an integer it orders magnitudes
_INFINITY = np.int32(0x7F800000)  # as an integer; every NaN is larger


@njit(inline="always")
def magnitude(value):
    """The bits of an FP32 magnitude: int32 in the same order, with NaN above all others.

    LLVM vectorizes a maximum of int32 five times better than one of floats, and twice as well as
    one of int64, to which numba's `&` promotes two int32.
    """
    return np.int32(_f32(value).view(np.int32) & _MAGNITUDE)


@njit(inline="always")
def largest_magnitude(values):
    """The largest `magnitude` of FP32 values."""
    largest = np.int32(0)
    for j in range(values.shape[0]):
        largest = max(largest, magnitude(values[j]))
    return largest


@njit(inline="always")
def absmax(values):
    """Largest magnitude, in FP32."""
    return np.int32(largest_magnitude(values)).view(np.float32)


@njit(inline="always", error_model="numpy")
def quantize_group(values, codes):
    """Write the codes of one group of FP32 `values` and return its scale."""
    bits_of_absmax = largest_magnitude(values)
    scale = np.int32(bits_of_absmax).view(np.float32) * _PER_QMAX
    if bits_of_absmax >= _INFINITY:
        codes[:] = 0
        return scale
    if scale < _TINY:
        scale = _TINY
    inverse = _ONE / scale
    for j in range(values.shape[0]):
        value = (values[j] * inverse + _MAGIC) - _MAGIC
        codes[j] = np.int8(min(max(value, -_QMAX), _QMAX))
    return scale


@njit(inline="always", error_model="numpy")
def quantize_row(values, codes, scales, group_size):
    """Write the codes and scales of one row of FP32 `values`."""
    for group in range(scales.shape[0]):
        first = group * group_size
        last = min(first + group_size, values.shape[0])
        scales[group] = quantize_group(values[first:last], codes[first:last])


@njit(inline="always")
def expand_row(codes, scales, group_size, values):
    """Write `codes * scale` of one row to FP32 `values`."""
    for group in range(scales.shape[0]):
        first = group * group_size
        last = min(first + group_size, values.shape[0])
        code, value, scale = codes[first:last], values[first:last], scales[group]
        for j in range(last - first):
            value[j] = _f32(code[j]) * scale


@njit(nogil=True, error_model="numpy", cache=True)
def _quantize_rows(x, is_zero, codes, scales, group_size, start, stop):
    columns = x.shape[1]
    row_values = np.empty(columns, np.float32)
    row_bits = row_values.view(np.int32)
    for row in range(start, stop):
        elements = x[row]
        if is_zero.shape[0] > 0:
            # No branch: only AVX-512 has conditional loads of 16 bits.
            for j in range(columns):
                bits = _f32(widen(elements[j])).view(np.int32)
                row_bits[j] = bits & (np.int32(is_zero[j]) - np.int32(1))
        else:
            for j in range(columns):
                row_values[j] = widen(elements[j])
        quantize_row(row_values, codes[row], scales[row], group_size)


@njit(nogil=True, cache=True)
def _quantize(arguments, n_rows, n_ranges):
    for_each_row_range(_quantize_rows, arguments, n_rows, n_ranges)


@njit(nogil=True, cache=True)
def _dequantize_rows(
    codes, scales, rows, outlier_values, outlier_columns, x, group_size, start, stop
):
    row_values = np.empty(codes.shape[1], np.float32)
    for i in range(start, stop):
        row = rows[i]
        expand_row(codes[row], scales[row], group_size, row_values)
        for k in range(outlier_values.shape[1]):
            row_values[outlier_columns[row, k]] = outlier_values[row, k]
        store_row(row_values, x[i])


@njit(nogil=True, cache=True)
def _dequantize(arguments, n_rows, n_ranges):
    for_each_row_range(_dequantize_rows, arguments, n_rows, n_ranges)


@operators.quantize.register("cpu")
def quantize(x: Tensor, *, group_size: int | None) -> tuple[Tensor, Tensor]:
    return quantize_without_columns(x, x.new_empty(0, dtype=torch.bool), group_size)


def quantize_without_columns(
    x: Tensor, is_zero: Tensor, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """`quantize`, in which columns marked by `is_zero`, bool `[columns]` or empty, count as 0."""
    rows, columns = x.shape
    codes, scales = empty_quantized(rows, columns, group_size)
    arguments = (float_array(x), is_zero, codes, scales, group_size or columns)
    run(_quantize, arguments, rows, columns)
    return codes, scales


@operators.dequantize.register("cpu")
def dequantize(weight: Weight, *, rows: Tensor | None, n_each: int, dtype: torch.dtype) -> Tensor:
    n_rows, columns = weight.codes.shape
    codes, scales, *outliers = weight.tensors
    if rows is None:
        index = torch.arange(n_rows, device=codes.device)
    else:
        index = operators.each_row(rows, n_each)
    # FP16 is rounded at the end.
    x_dtype = dtype if dtype == torch.bfloat16 else torch.float32
    x = codes.new_empty(len(index), columns, dtype=x_dtype)
    group_size = weight.group_size or columns
    arguments = (codes, scales, index, *outliers, float_array(x), group_size)
    run(_dequantize, arguments, len(index), columns)
    return x.to(dtype)
