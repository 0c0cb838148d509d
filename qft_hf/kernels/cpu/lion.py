"""The Lion step on INT8 state in numba, row by row. Twin: `kernels/lion.py`."""

import numpy as np
from numba import njit

from .. import lion as operators
from ..philox import LANES, MOMENTUM
from ..values import Lion, Quantized, Rounding, Weight, read_live
from .nibbles import load_nibbles, nibble_uniforms, round_to_nibbles
from .philox import rounding_row
from .quantization import quantize_group
from .threads import for_each_row_range, run
from .weight import FASTMATH, draw_row, rounding_numbers, step_weight_row, weight_buffers

_f32 = np.float32
_ZERO, _HALF = _f32(0.0), _f32(0.5)
_MOMENTUM = np.uint64(MOMENTUM)


@njit(inline="always")
def _lion(m, g, beta1, one_minus_beta1, beta2, one_minus_beta2):
    """Direction and new momentum of one element."""
    c = m * beta1 + g * one_minus_beta1
    return _f32(c > _ZERO) - _f32(c < _ZERO), m * beta2 + g * one_minus_beta2


@njit(nogil=True, fastmath=FASTMATH, error_model="numpy", cache=True)
def _lion_rows(
    codes, scales, outlier_values, outlier_columns, momentum_codes, momentum_scales,
    gradient_codes, gradient_scales, group_size, state_group_size, is_packed,
    lr, shrink, beta1, one_minus_beta1, beta2, one_minus_beta2, gradient_sign,
    stochastic, seed, step, stream, first_row, start, stop,
):  # fmt: skip
    columns = codes.shape[1]
    row_direction = np.empty(columns, np.float32)
    row_momentum = np.zeros(columns + 1, np.float32)  # a packed row has an even number of columns
    buffers = weight_buffers(columns)
    packed_quads = (momentum_codes.shape[1] + LANES - 1) // LANES if is_packed else 0
    words = np.empty((LANES, packed_quads), np.uint32)
    uniforms = np.full(2 * LANES * packed_quads, _HALF, np.float32)
    for row in range(start, stop):
        if is_packed:
            load_nibbles(momentum_codes[row], momentum_scales[row], row_momentum)
        for group in range(gradient_scales.shape[1]):
            first = group * state_group_size
            last = min(first + state_group_size, columns)
            gradient_code = gradient_codes[row, first:last]
            direction = row_direction[first:last]
            momentum = row_momentum[first:last]
            gradient_scale = gradient_scales[row, group] * gradient_sign
            if is_packed:
                for j in range(last - first):
                    g = _f32(gradient_code[j]) * gradient_scale
                    direction[j], momentum[j] = _lion(
                        momentum[j], g, beta1, one_minus_beta1, beta2, one_minus_beta2
                    )
            else:
                momentum_code = momentum_codes[row, first:last]
                momentum_scale = momentum_scales[row, group]
                for j in range(last - first):
                    g = _f32(gradient_code[j]) * gradient_scale
                    m = _f32(momentum_code[j]) * momentum_scale
                    direction[j], momentum[j] = _lion(
                        m, g, beta1, one_minus_beta1, beta2, one_minus_beta2
                    )
                momentum_scales[row, group] = quantize_group(momentum, momentum_code)
        if is_packed:
            if stochastic:
                rounding_row(words, first_row + row, seed, step, stream, _MOMENTUM)
                nibble_uniforms(words, uniforms)
            row_momentum[columns] = _ZERO
            round_to_nibbles(row_momentum, uniforms, momentum_codes[row], momentum_scales[row])
        if stochastic:
            draw_row(row, buffers, seed, step, stream, first_row)
        step_weight_row(
            row, codes, scales, outlier_values, outlier_columns, row_direction, buffers,
            group_size, lr, shrink,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _lion_step(arguments, n_rows, n_ranges):
    for_each_row_range(_lion_rows, arguments, n_rows, n_ranges)


@operators.lion_step_.register("cpu")
def lion_step_(
    weight: Weight,
    momentum: Quantized,
    gradient: Quantized,
    *,
    rule: Lion,
    rounding: Rounding,
) -> None:
    rule, rounding = read_live(rule, rounding)
    rows, columns = weight.codes.shape
    tensors = (*weight.tensors, *momentum.tensors, *gradient.tensors)
    numbers = (
        weight.group_size or columns,
        gradient.group_size or columns,
        momentum.bits == 4,
        *map(_f32, rule.numbers),
        *rounding_numbers(rounding),
    )
    run(_lion_step, (*tensors, *numbers), rows, columns)
