"""Sum and norm of INT8 gradients in numba. Twin: `kernels/gradients.py`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import gradients as operators
from ..values import Quantized
from .quantization import quantize_group
from .threads import for_each_row_range, run

_f32 = np.float32


@njit(nogil=True, error_model="numpy", cache=True)
def _accumulate_rows(codes, scales, other_codes, other_scales, group_size, start, stop):
    columns = codes.shape[1]
    total = np.empty(group_size, np.float32)
    for row in range(start, stop):
        for group in range(scales.shape[1]):
            first = group * group_size
            last = min(first + group_size, columns)
            code, other = codes[row, first:last], other_codes[row, first:last]
            scale, other_scale = scales[row, group], other_scales[row, group]
            for j in range(last - first):
                total[j] = _f32(code[j]) * scale + _f32(other[j]) * other_scale
            scales[row, group] = quantize_group(total[: last - first], code)


@njit(nogil=True, cache=True)
def _accumulate(arguments, n_rows, n_ranges):
    for_each_row_range(_accumulate_rows, arguments, n_rows, n_ranges)


@njit(nogil=True, cache=True)
def _squared_norms_rows(codes, scales, norms, group_size, start, stop):
    columns = codes.shape[1]
    for row in range(start, stop):
        norms[row] = 0.0
        for group in range(scales.shape[1]):
            first = group * group_size
            last = min(first + group_size, columns)
            code = codes[row, first:last]
            squares = np.int32(0)
            for j in range(last - first):
                squares += np.int32(code[j]) * np.int32(code[j])
            scale = np.float64(scales[row, group])
            norms[row] += np.float64(squares) * (scale * scale)


@njit(nogil=True, cache=True)
def _squared_norms(arguments, n_rows, n_ranges):
    for_each_row_range(_squared_norms_rows, arguments, n_rows, n_ranges)


@operators.accumulate_.register("cpu")
def accumulate_(gradient: Quantized, other: Quantized) -> None:
    rows, columns = gradient.codes.shape
    group_size = gradient.group_size or columns
    run(_accumulate, (*gradient.tensors, *other.tensors, group_size), rows, columns)


@operators.squared_norms.register("cpu")
def squared_norms(gradient: Quantized) -> Tensor:
    rows, columns = gradient.codes.shape
    norms = gradient.scales.new_empty(rows, dtype=torch.float64)
    run(_squared_norms, (*gradient.tensors, norms, gradient.group_size or columns), rows, columns)
    return norms
