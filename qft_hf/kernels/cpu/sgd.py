"""The SGD step on INT8 weights in numba, row by row. Twin: `kernels/reference/sgd.py`."""

import numpy as np
from numba import njit
from torch import Tensor

from .threads import for_each_row_range, n_ranges
from .weight import FASTMATH, step_weight_row, weight_buffers

_f32 = np.float32


@njit(nogil=True, fastmath=FASTMATH, error_model="numpy", cache=True)
def _sgd_rows(
    codes, scales, outlier_values, outlier_columns, gradient_codes, gradient_scales,
    group_size, state_group_size, lr, shrink, gradient_sign, stochastic, seed, step, stream,
    start, stop,
):  # fmt: skip
    columns = codes.shape[1]
    row_gradient = np.empty(columns, np.float32)
    buffers = weight_buffers(columns)
    for row in range(start, stop):
        for group in range(gradient_scales.shape[1]):
            first = group * state_group_size
            last = min(first + state_group_size, columns)
            code, gradient = gradient_codes[row, first:last], row_gradient[first:last]
            scale = gradient_scales[row, group] * gradient_sign
            for j in range(last - first):
                gradient[j] = _f32(code[j]) * scale
        step_weight_row(
            row, codes, scales, outlier_values, outlier_columns, row_gradient, buffers,
            group_size, lr, shrink, stochastic, seed, step, stream, 0,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _sgd(arrays, numbers, n_ranges):
    for_each_row_range(_sgd_rows, (*arrays, *numbers), arrays[0].shape[0], n_ranges)


def sgd_step_(
    codes: Tensor,
    *state: Tensor,
    group_size: int | None,
    state_group_size: int,
    lr: float,
    weight_decay: float,
    maximize: bool,
    stochastic: bool,
    seed: int,
    step: int,
    stream: int,
) -> None:
    arrays = tuple(tensor.numpy() for tensor in (codes, *state))
    numbers = (
        group_size or codes.shape[1],
        state_group_size,
        _f32(lr),
        _f32(lr * weight_decay),
        _f32(-1.0 if maximize else 1.0),
        stochastic,
        np.uint64(seed),
        np.uint64(step),
        np.uint64(stream),
    )
    _sgd(arrays, numbers, n_ranges(*codes.shape))
