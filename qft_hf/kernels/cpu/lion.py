"""The Lion step on INT8 state in numba, row by row. Twin: `kernels/reference/lion.py`."""

import numpy as np
from numba import njit
from torch import Tensor

from ..reference.lion import RANGE_LOW, RANGE_TARGET
from ..reference.philox import LANES
from ..reference.quantize import MAGIC, QMAX, TINY
from .philox import philox
from .quantize import largest_magnitude
from .threads import for_each_row_range

_f32 = np.float32
_MAGIC, _QMAX, _TINY = _f32(MAGIC), _f32(QMAX), _f32(TINY)
_LOW, _PER_TARGET, _PER_QMAX = _f32(RANGE_LOW), _f32(1.0 / RANGE_TARGET), _f32(1.0 / QMAX)
_ULP24 = _f32(2.0**-24)
_ZERO, _HALF, _ONE = _f32(0.0), _f32(0.5), _f32(1.0)

# Values are finite here, so a minimum need not look for NaN. Nothing else is relaxed: no fused
# multiply-add and no reciprocal division, either of which would change bits.
_FASTMATH = {"nnan", "ninf", "nsz"}


@njit(inline="always")
def absmax(values):
    """Largest magnitude: as integers, which LLVM vectorizes five times better than as floats."""
    bits = np.array([largest_magnitude(values.view(np.int32))], np.int32)
    return bits.view(np.float32)[0]


@njit(inline="always")
def weight_uniform(word):
    """FP32 uniform in [0, 1) from the high 24 bits of a word."""
    return _f32(np.int32(word >> np.uint32(8))) * _ULP24


@njit(nogil=True, fastmath=_FASTMATH, error_model="numpy", cache=True)
def _lion_rows(
    codes, scales, outlier_values, outlier_columns, momentum_codes, momentum_scales,
    gradient_codes, gradient_scales, start, stop, group_size, state_group_size,
    lr, shrink, beta1, one_minus_beta1, beta2, one_minus_beta2, gradient_sign,
    stochastic, seed, step, stream,
):  # fmt: skip
    # Loops run from zero over slices: LLVM then sees no negative index and vectorizes them.
    columns = codes.shape[1]
    quads = (columns + LANES - 1) // LANES
    row_direction = np.empty(columns, np.float32)
    row_decrease = np.empty(columns, np.float32)
    row_momentum = np.empty(columns, np.float32)
    row_target = np.empty(columns, np.float32)
    words = np.empty((LANES, quads), np.uint32)
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    row_uniform = np.full(quads * LANES, _HALF, np.float32)
    for row in range(start, stop):
        for group in range(momentum_scales.shape[1]):
            first = group * state_group_size
            last = min(first + state_group_size, columns)
            momentum_code = momentum_codes[row, first:last]
            gradient_code = gradient_codes[row, first:last]
            direction = row_direction[first:last]
            momentum = row_momentum[first:last]
            momentum_scale = momentum_scales[row, group]
            gradient_scale = gradient_scales[row, group] * gradient_sign
            for j in range(last - first):
                g = _f32(gradient_code[j]) * gradient_scale
                m = _f32(momentum_code[j]) * momentum_scale
                c = m * beta1 + g * one_minus_beta1
                direction[j] = _f32(c > _ZERO) - _f32(c < _ZERO)
                momentum[j] = m * beta2 + g * one_minus_beta2
            scale = absmax(momentum) * _PER_QMAX
            if scale < _TINY:
                scale = _ONE
            momentum_scales[row, group] = scale
            inverse = _ONE / scale
            for j in range(last - first):
                value = (momentum[j] * inverse + _MAGIC) - _MAGIC
                momentum_code[j] = np.int8(min(max(value, -_QMAX), _QMAX))

        for k in range(outlier_values.shape[1]):
            value = outlier_values[row, k]
            change = value * shrink + row_direction[outlier_columns[row, k]] * lr
            outlier_values[row, k] = value - change

        if stochastic:
            base = np.uint64(row) * np.uint64(quads)
            for quad in range(quads):
                w0, w1, w2, w3 = philox(base + np.uint64(quad), seed, step, stream)
                words0[quad], words1[quad], words2[quad], words3[quad] = w0, w1, w2, w3
            for quad in range(quads):
                row_uniform[LANES * quad] = weight_uniform(words0[quad])
                row_uniform[LANES * quad + 1] = weight_uniform(words1[quad])
                row_uniform[LANES * quad + 2] = weight_uniform(words2[quad])
                row_uniform[LANES * quad + 3] = weight_uniform(words3[quad])

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


def lion_step_(
    codes: Tensor,
    scales: Tensor,
    *state: Tensor,
    group_size: int | None,
    state_group_size: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
    stochastic: bool,
    seed: int,
    step: int,
    stream: int,
) -> None:
    arrays = [tensor.numpy() for tensor in (codes, scales, *state)]
    numbers = (
        group_size or codes.shape[1],
        state_group_size,
        _f32(lr),
        _f32(lr * weight_decay),
        _f32(beta1),
        _f32(1 - beta1),
        _f32(beta2),
        _f32(1 - beta2),
        _f32(-1.0 if maximize else 1.0),
        stochastic,
        np.uint64(seed),
        np.uint64(step),
        np.uint64(stream),
    )
    for_each_row_range(
        lambda start, stop: _lion_rows(*arrays, start, stop, *numbers),
        n_rows=codes.shape[0],
        row_elements=codes.shape[1],
    )
