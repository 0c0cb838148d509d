"""4-bit codes on uneven levels in numba, row by row. Twin: `kernels/nibbles.py`."""

import numpy as np
from numba import njit

from ...layout import NIBBLE_GROUP_SIZE
from ..groups import TINY
from ..nibbles import NIBBLE_MAX, SLOPE, TOP
from .quantization import absmax
from .weight import FASTMATH

_f32, _i32 = np.float32, np.int32
_ONE, _TINY, _PER_TOP = _f32(1.0), _f32(TINY), _f32(1.0 / TOP)
_MAX, _SLOPE, _WIDTH = _i32(NIBBLE_MAX), _f32(SLOPE), _f32(1 + SLOPE)
_HALF, _HALF_SLOPE, _SQUARE = _f32(0.5), _f32(SLOPE / 2), _f32(SLOPE**2 / 4)
_ULP16 = _f32(2.0**-16)


@njit(inline="always")
def _units(half):
    """Return the units that a code of four bits stands for."""
    code = _i32((half ^ 8) - 8)
    return _f32(code * (abs(code) + SLOPE))


@njit(fastmath=FASTMATH, error_model="numpy")
def load_nibbles(packed, scales, values):
    """Expand one row into fp32 `values`, which has room for an even number of columns."""
    for group in range(scales.shape[0]):
        first = group * (NIBBLE_GROUP_SIZE // 2)
        last = min(first + NIBBLE_GROUP_SIZE // 2, packed.shape[0])
        bits, out, scale = packed[first:last], values[2 * first : 2 * last], scales[group]
        for k in range(last - first):
            byte = _i32(bits[k])
            out[2 * k] = _units(byte & 15) * scale
            out[2 * k + 1] = _units(byte >> 4) * scale


@njit(inline="always")
def _code(value, inverse, uniform):
    units = abs(value) * inverse
    lower = np.floor(np.sqrt(units + _SQUARE) - _HALF_SLOPE)
    width = (lower + lower) + _WIDTH
    code = _i32(lower) + _i32(uniform * width < units - lower * (lower + _SLOPE))
    code = min(code, _MAX)
    return -code if value < _f32(0.0) else code


@njit(fastmath=FASTMATH, error_model="numpy")
def round_to_nibbles(values, uniforms, packed, scales):
    """Round one row of fp32 `values`, which has a zero after an odd number of columns."""
    for group in range(scales.shape[0]):
        first = group * (NIBBLE_GROUP_SIZE // 2)
        last = min(first + NIBBLE_GROUP_SIZE // 2, packed.shape[0])
        value, uniform = values[2 * first : 2 * last], uniforms[2 * first : 2 * last]
        bits = packed[first:last]
        scale = absmax(value) * _PER_TOP
        if scale < _TINY:
            scale = _TINY
        scales[group] = scale
        inverse = _ONE / scale
        for k in range(last - first):
            low = _code(value[2 * k], inverse, uniform[2 * k])
            high = _code(value[2 * k + 1], inverse, uniform[2 * k + 1])
            bits[k] = np.uint8((low & 15) | (high & 15) << 4)


@njit(fastmath=FASTMATH, error_model="numpy")
def nibble_uniforms(words, uniforms):
    """Uniforms in (0, 1): a word's low 16 bits for an even column, its high ones for the next.

    Args:
        words: uint32 `[LANES, quads]` as `random_row` fills it, with a word for each packed byte.
        uniforms: fp32 `[LANES * quads * 2]`, written.
    """
    lanes, quads = words.shape
    for quad in range(quads):
        for lane in range(lanes):
            word = words[lane, quad]
            k = 2 * (lanes * quad + lane)
            uniforms[k] = (_f32(_i32(word & np.uint32(0xFFFF))) + _HALF) * _ULP16
            uniforms[k + 1] = (_f32(_i32(word >> np.uint32(16))) + _HALF) * _ULP16
