"""The AdamW step on 8-bit state in numba, row by row. Twin: `kernels/adamw.py`."""

import numpy as np
from numba import njit

from .. import adamw as operators
from ..adamw import GRADIENT_SCALE_MAX, RATIO_TINY, ROOT_QMAX, ROOT_TINY, UNIT
from ..groups import QMAX
from ..philox import LANES
from ..values import AdamW, Moments, Quantized, Rounding, Weight, read_live
from .quantization import absmax
from .threads import for_each_row_range, run
from .weight import FASTMATH, draw_row, rounding_numbers, step_weight_row, weight_buffers

_f32, _u32 = np.float32, np.uint32
_UNIT, _GRADIENT_SCALE_MAX = _f32(UNIT), _f32(GRADIENT_SCALE_MAX)
_ROOT_TINY, _RATIO_TINY = _f32(ROOT_TINY), _f32(RATIO_TINY)
_ROOT_QMAX, _PER_ROOT_QMAX = _f32(ROOT_QMAX), _f32(1.0 / (ROOT_QMAX + 0.5))
_QMAX, _PER_QMAX = _f32(QMAX), _f32(1.0 / QMAX)
_ZERO, _HALF, _ONE = _f32(0.0), _f32(0.5), _f32(1.0)
_ULP24, _ULP16 = _f32(2.0**-24), _f32(2.0**-16)
_LOW24, _LOW16 = _u32(0xFFFFFF), _u32(0xFFFF)


@njit(fastmath=FASTMATH, error_model="numpy")
def _moment_uniforms(words, root_uniform, ratio_uniform):
    for lane in range(LANES):
        lane_words = words[lane]
        for quad in range(words.shape[1]):
            word = lane_words[quad]
            root_uniform[LANES * quad + lane] = _f32(np.int32(word & _LOW24)) * _ULP24
            ratio_uniform[LANES * quad + lane] = _f32(np.int32(word & _LOW16)) * _ULP16


@njit(inline="always")
def _rounded(value, uniform, low, high):
    whole = np.floor(value)
    up = _f32((value - whole) + uniform >= _ONE)
    return min(max(whole + up, low), high)


@njit(inline="always")  # a fourth faster than a call
def _step_group(
    ratio_code, ratio_scale, root_code, root_scale, gradient_code, gradient_scale,
    beta1, one_minus_beta1, beta2, one_minus_beta2, of_momentum, of_root, eps,
    root_uniform, ratio_uniform, ratio, root, direction,
):  # fmt: skip
    """Write the codes and the direction of one group, and return its new scales."""
    for j in range(direction.shape[0]):
        g = _f32(gradient_code[j]) * gradient_scale
        eighth = (_f32(root_code[j]) + _HALF) * root_scale
        fourth = eighth * eighth
        root_v = fourth * fourth
        m = ((_f32(ratio_code[j]) * ratio_scale) * root_v) * beta1 + g * one_minus_beta1
        v = (root_v * root_v) * beta2 + (g * g) * one_minus_beta2
        root_v = np.sqrt(v)
        direction[j] = (m * of_momentum) / (root_v * of_root + eps)
        ratio[j] = m / root_v
        root[j] = np.sqrt(np.sqrt(root_v))

    new_root_scale = max(absmax(root) * _PER_ROOT_QMAX, _ROOT_TINY)
    inverse = _ONE / new_root_scale
    for j in range(direction.shape[0]):
        code = _rounded(root[j] * inverse - _HALF, root_uniform[j], _ZERO, _ROOT_QMAX)
        root_code[j] = np.uint8(np.int32(code))

    new_ratio_scale = max(absmax(ratio) * _PER_QMAX, _RATIO_TINY)
    inverse = _ONE / new_ratio_scale
    for j in range(direction.shape[0]):
        code = _rounded(ratio[j] * inverse, ratio_uniform[j], -_QMAX, _QMAX)
        ratio_code[j] = np.int8(code)
    return new_ratio_scale, new_root_scale


@njit(nogil=True, fastmath=FASTMATH, error_model="numpy", cache=True)
def _adamw_rows(
    codes, scales, outlier_values, outlier_columns, ratio_codes, ratio_scales, root_codes,
    root_scales, gradient_codes, gradient_scales, group_size, state_group_size, lr, shrink, beta1,
    one_minus_beta1, beta2, one_minus_beta2, of_momentum, of_root, eps, gradient_sign,
    stochastic, seed, step, stream, first_row, start, stop,
):  # fmt: skip
    columns = codes.shape[1]
    row_direction = np.empty(columns, np.float32)
    row_ratio = np.empty(columns, np.float32)
    row_root = np.empty(columns, np.float32)
    buffers = weight_buffers(columns)
    words = buffers[3]
    root_uniform = np.full(LANES * words.shape[1], _HALF, np.float32)
    ratio_uniform = np.full(LANES * words.shape[1], _HALF, np.float32)
    for row in range(start, stop):
        if stochastic:
            draw_row(row, buffers, seed, step, stream, first_row)
            _moment_uniforms(words, root_uniform, ratio_uniform)
        for group in range(gradient_scales.shape[1]):
            first = group * state_group_size
            last = min(first + state_group_size, columns)
            unit_scale = min(gradient_scales[row, group] * _UNIT, _GRADIENT_SCALE_MAX)
            ratio_scales[row, group], root_scales[row, group] = _step_group(
                ratio_codes[row, first:last], ratio_scales[row, group],
                root_codes[row, first:last], root_scales[row, group],
                gradient_codes[row, first:last], unit_scale * gradient_sign,
                beta1, one_minus_beta1, beta2, one_minus_beta2, of_momentum, of_root, eps,
                root_uniform[first:last], ratio_uniform[first:last], row_ratio[first:last],
                row_root[first:last], row_direction[first:last],
            )  # fmt: skip
        step_weight_row(
            row, codes, scales, outlier_values, outlier_columns, row_direction, buffers,
            group_size, lr, shrink,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _adamw_step(arguments, n_rows, n_ranges):
    for_each_row_range(_adamw_rows, arguments, n_rows, n_ranges)


@operators.adamw_step_.register("cpu")
def adamw_step_(
    weight: Weight,
    moments: Moments,
    gradient: Quantized,
    *,
    rule: AdamW,
    rounding: Rounding,
) -> None:
    rule, rounding = read_live(rule, rounding)
    rows, columns = weight.codes.shape
    tensors = (*weight.tensors, *moments.tensors, *gradient.tensors)
    numbers = (
        weight.group_size or columns,
        moments.group_size,
        _f32(rule.lr),
        _f32(rule.lr * rule.weight_decay),
        *map(_f32, operators.moment_numbers(rule, rounding.step)),
        *rounding_numbers(rounding),
    )
    run(_adamw_step, (*tensors, *numbers), rows, columns)
