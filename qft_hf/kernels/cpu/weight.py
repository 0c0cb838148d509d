"""A step of one row of an INT8 weight in numba. Twin: `kernels/weight.py`."""

import numpy as np
from numba import njit
from torch import Tensor

from .. import weight as operators
from ..groups import QMAX, TINY
from ..philox import LANES, WEIGHT
from ..values import Lion, Rounding, Weight, read_live
from ..weight import RANGE_LOW, RANGE_TARGET
from .philox import rounding_row, weight_uniform
from .quantization import absmax
from .threads import for_each_row_range, run

_f32 = np.float32
_QMAX, _TINY = _f32(QMAX), _f32(TINY)
_LOW, _PER_TARGET = _f32(RANGE_LOW), _f32(1.0 / RANGE_TARGET)
_ZERO, _HALF = _f32(0.0), _f32(0.5)
_WEIGHT = np.uint64(WEIGHT)

# Values are finite here, so a minimum need not handle NaN. Nothing else is relaxed: fused
# multiply-add and division by reciprocals would change bits.
FASTMATH = {"nnan", "ninf", "nsz"}


@njit(fastmath=FASTMATH, error_model="numpy")
def weight_buffers(columns):
    """Buffers of `step_weight_row`: two fp32 rows, uniforms that round to nearest, random words."""
    quads = (columns + LANES - 1) // LANES
    return (
        np.empty(columns, np.float32),
        np.empty(columns, np.float32),
        np.full(quads * LANES, _HALF, np.float32),
        np.empty((LANES, quads), np.uint32),
    )


@njit(fastmath=FASTMATH, error_model="numpy")
def draw_row(row, buffers, seed, step, stream, first_row):
    """Draw a row's random words and set its uniforms; without this call it rounds to nearest."""
    _, _, row_uniform, words = buffers
    rounding_row(words, first_row + row, seed, step, stream, _WEIGHT)
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    for quad in range(words.shape[1]):
        row_uniform[LANES * quad] = weight_uniform(words0[quad])
        row_uniform[LANES * quad + 1] = weight_uniform(words1[quad])
        row_uniform[LANES * quad + 2] = weight_uniform(words2[quad])
        row_uniform[LANES * quad + 3] = weight_uniform(words3[quad])


@njit(fastmath=FASTMATH, error_model="numpy")
def step_weight_row(
    row, codes, scales, outlier_values, outlier_columns, row_direction, buffers,
    group_size, lr, shrink,
):  # fmt: skip
    # Loops run from 0 over slices, so that LLVM sees no negative index and vectorizes them.
    row_decrease, row_target, row_uniform, _ = buffers
    columns = codes.shape[1]
    for k in range(outlier_values.shape[1]):
        value = outlier_values[row, k]
        change = value * shrink + row_direction[outlier_columns[row, k]] * lr
        outlier_values[row, k] = value - change

    for group in range(scales.shape[1]):
        first = group * group_size
        last = min(first + group_size, columns)
        code = codes[row, first:last]
        direction = row_direction[first:last]
        decrease = row_decrease[first:last]
        uniform = row_uniform[first:last]
        target = row_target[first:last]
        scale = scales[row, group]
        quanta = lr / scale  # lr in units of one code
        for j in range(last - first):
            down = _f32(code[j]) * shrink + direction[j] * quanta
            decrease[j] = down
            target[j] = _f32(code[j]) - down
        largest = absmax(target)
        if largest <= _QMAX and (largest >= _LOW or largest == _ZERO):
            for j in range(last - first):
                value = _f32(code[j]) + np.floor(uniform[j] - decrease[j])
                code[j] = np.int8(min(max(value, -_QMAX), _QMAX))
        else:
            new_scale = max(scale * (largest * _PER_TARGET), _TINY)
            ratio = scale / new_scale
            scales[row, group] = new_scale
            for j in range(last - first):
                value = np.floor(target[j] * ratio + uniform[j])
                code[j] = np.int8(min(max(value, -_QMAX), _QMAX))
    for k in range(outlier_values.shape[1]):
        codes[row, outlier_columns[row, k]] = 0


@njit(nogil=True, fastmath=FASTMATH, error_model="numpy", cache=True)
def _step_rows(
    codes, scales, outlier_values, outlier_columns, direction, group_size, lr, shrink, stochastic,
    seed, step, stream, first_row, start, stop,
):  # fmt: skip
    buffers = weight_buffers(codes.shape[1])
    for row in range(start, stop):
        if stochastic:
            draw_row(row, buffers, seed, step, stream, first_row)
        step_weight_row(
            row, codes, scales, outlier_values, outlier_columns, direction[row], buffers,
            group_size, lr, shrink,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _step(arguments, n_rows, n_ranges):
    for_each_row_range(_step_rows, arguments, n_rows, n_ranges)


def rounding_numbers(rounding: Rounding) -> tuple[bool, np.uint64, np.uint64, np.uint64, int]:
    """The fields of a rounding in the order of the kernels' arguments."""
    counter = (np.uint64(rounding.seed), np.uint64(rounding.step), np.uint64(rounding.stream))
    return rounding.stochastic, *counter, rounding.first_row


@operators.step_weight_.register("cpu")
def step_weight_(
    weight: Weight,
    direction: Tensor,
    *,
    lr: float,
    weight_decay: float,
    rounding: Rounding,
) -> None:
    rule, rounding = read_live(Lion.without_momentum(lr, weight_decay), rounding)
    rows, columns = weight.codes.shape
    numbers = (
        weight.group_size or columns,
        *map(_f32, rule.numbers[:2]),
        *rounding_numbers(rounding),
    )
    run(_step, (*weight.tensors, direction, *numbers), rows, columns)
