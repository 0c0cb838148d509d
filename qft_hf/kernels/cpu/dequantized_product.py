"""Products with an INT8 weight in numba. Twin: `kernels/dequantized_product.py`.

A row of the weight is expanded while it is multiplied: in registers if it has one scale, in a
buffer of one row if it has groups, since loops over short groups would mostly add up vectors.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import dequantized_product as operators
from ..values import Weight
from .quantization import expand_row
from .threads import for_each_row_range, run

_f32 = np.float32
_ZERO, _ONE = _f32(0.0), _f32(1.0)
# FP16 in FP32: its least normal value, the number whose addition rounds smaller values to FP16's
# spacing there, and its largest value.
_NORMAL, _SUBNORMAL, _LARGEST = _f32(2.0**-14), _f32(0.75), _f32(65504.0)

# Dtypes as integers in kernels: each loop is compiled once for each of them, in branches.
_FP32, _BF16, _FP16 = 0, 1, 2
KINDS = {torch.float32: _FP32, torch.bfloat16: _BF16, torch.float16: _FP16}

# Elements per thread, about 0.25 ms of work for one token. One thread is as fast on smaller layers,
# and another would have to be woken.
MIN_ELEMENTS = 2**20

# Sums may be in any order, so that LLVM vectorizes them; the values of the terms do not change.
FASTMATH = {"reassoc", "contract", "nsz"}


# Passed explicitly: if omitted, it would be inherited from the first caller that compiles this.
@njit(fastmath=False)
def round_to(kind, value):
    """Round FP32 to the nearest value of a dtype, ties to even; returns FP32. NaN stays NaN."""
    bits = np.float32(value).view(np.int32)
    if kind == _FP32 or value != value:
        return value
    if kind == _BF16:
        return np.int32((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF).view(np.float32)
    if abs(value) < _NORMAL:
        return np.copysign((value + _SUBNORMAL) - _SUBNORMAL, value)
    value = np.int32((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(np.float32)
    return value * _f32(np.inf) if abs(value) > _LARGEST else value


@njit(nogil=True, fastmath=FASTMATH)
def _dot(values, scale, kind, x):
    total = _ZERO
    for j in range(values.shape[0]):
        total += round_to(kind, _f32(values[j]) * scale) * x[j]
    return total


@njit(nogil=True, fastmath=FASTMATH)
def _four_dots(values, scale, kind, x0, x1, x2, x3):
    """Multiply four tokens at a time, so that a value is expanded once for all of them."""
    total0, total1, total2, total3 = _ZERO, _ZERO, _ZERO, _ZERO
    for j in range(values.shape[0]):
        value = round_to(kind, _f32(values[j]) * scale)
        total0 += value * x0[j]
        total1 += value * x1[j]
        total2 += value * x2[j]
        total3 += value * x3[j]
    return total0, total1, total2, total3


@njit(nogil=True)
def _multiply_row(values, scale, kind, x, y):
    """Add the products of one row, `values * scale`, and all tokens to `y` `[tokens]`."""
    n_tokens = x.shape[0]
    in_fours = n_tokens - n_tokens % 4
    for n in range(0, in_fours, 4):
        totals = _four_dots(values, scale, kind, x[n], x[n + 1], x[n + 2], x[n + 3])
        for i in range(4):
            y[n + i] += totals[i]
    for n in range(in_fours, n_tokens):
        y[n] += _dot(values, scale, kind, x[n])


@njit(nogil=True, cache=True)
def _multiply_rows(
    x, codes, scales, outlier_values, outlier_columns, y, group_size, kind, start, stop
):
    columns, n_groups = codes.shape[1], scales.shape[1]
    values = np.empty(columns if n_groups > 1 else 0, np.float32)
    for row in range(start, stop):
        if n_groups == 1:
            _multiply_row(codes[row], scales[row, 0], kind, x, y[row])
        else:
            expand_row(codes[row], scales[row], group_size, values)
            _multiply_row(values, _ONE, kind, x, y[row])
        for k in range(outlier_values.shape[1]):
            outlier = round_to(kind, outlier_values[row, k])
            column = outlier_columns[row, k]
            for n in range(x.shape[0]):
                y[row, n] += outlier * x[n, column]


@njit(nogil=True, cache=True)
def _multiply(arguments, n_rows, n_ranges):
    for_each_row_range(_multiply_rows, arguments, n_rows, n_ranges)


@operators.dequantized_matmul.register("cpu")
def dequantized_matmul(x: Tensor, weight: Weight, *, bias: Tensor | None) -> Tensor:
    rows, columns = weight.codes.shape
    y = x.new_zeros(rows, x.shape[0], dtype=torch.float32)
    if bias is not None:
        y += bias.to(x.dtype)[:, None]
    numbers = weight.group_size or columns, KINDS[x.dtype]
    arguments = (x.float(), *weight.tensors, y, *numbers)
    run(_multiply, arguments, rows, columns, min_elements=MIN_ELEMENTS)
    return y.to(x.dtype).t().contiguous()
