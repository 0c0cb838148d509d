"""4-bit codes on unevenly spaced levels, two in a byte, in Triton. Twin: `kernels/nibbles.py`."""

import triton
import triton.language as tl

from ..nibbles import NIBBLE_MAX as _NIBBLE_MAX
from ..nibbles import SLOPE as _SLOPE
from ..nibbles import TOP as _TOP
from ..philox import MOMENTUM as _MOMENTUM
from .numerics import ULP16, rounding_words

NIBBLE_MAX: tl.constexpr = tl.constexpr(float(_NIBBLE_MAX))
SLOPE: tl.constexpr = tl.constexpr(_SLOPE)
HALF_SLOPE: tl.constexpr = tl.constexpr(_SLOPE / 2)
QUARTER_SQUARE: tl.constexpr = tl.constexpr(_SLOPE**2 / 4)
PER_TOP: tl.constexpr = tl.constexpr(1.0 / _TOP)
MOMENTUM: tl.constexpr = tl.constexpr(_MOMENTUM)


@triton.jit
def _units(half):
    """Return the value of a code before the scale; the code is given as its four bits."""
    code = (half ^ 8) - 8
    return (code * (tl.abs(code) + SLOPE)).to(tl.float32)


@triton.jit
def _bytes(start, exists, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """Index of each byte of a tile in its row, `[n_units, UNIT / 2]`, and whether it exists."""
    # The compiler does not infer that half of a unit's start is a multiple of half a unit.
    first = tl.multiple_of(start // 2, UNIT // 2)
    place = first[:, None] + tl.arange(0, UNIT // 2)[None, :]
    return place, exists[:, None] & (place < (COLUMNS + 1) // 2)


@triton.jit
def load_nibbles(
    packed_ptr, start, exists, column, mask, COLUMNS: tl.constexpr, UNIT: tl.constexpr
):
    """Load the values of one tile in fp32, before the scale.

    Args:
        packed_ptr: First byte of the row.
        start: First column of each unit; even if `UNIT` is.
        exists: Which units exist.
        column: Number of each column, `[n_units, UNIT]`.
        mask: Which columns exist.
        COLUMNS: Columns of the row.
        UNIT: Columns of a unit, a power of two.
    """
    if UNIT == 1:  # the two columns of a byte may be in different units: each loads the byte
        byte = tl.load(packed_ptr + column // 2, mask=mask, other=0).to(tl.int32)
        units = _units((byte >> (column % 2 * 4).to(tl.int32)) & 15)
    else:
        place, byte_mask = _bytes(start, exists, COLUMNS, UNIT)
        byte = tl.load(packed_ptr + place, mask=byte_mask, other=0).to(tl.int32)
        units = tl.reshape(tl.join(_units(byte & 15), _units(byte >> 4)), column.shape)
    return units


@triton.jit
def _code(value, inverse, uniform):
    """Return the four bits of the codes of `value` as int32."""
    units = tl.abs(value) * inverse
    # This root is not correctly rounded. If its error crosses a level, `uniform` still leads to the
    # same code: it is further away from 0 and 1 than this error.
    lower = tl.floor(tl.sqrt(units + QUARTER_SQUARE) - HALF_SLOPE)
    width = lower + lower + (1 + SLOPE)
    up = uniform * width < units - lower * (lower + SLOPE)
    code = tl.minimum(tl.where(up, lower + 1, lower), NIBBLE_MAX).to(tl.int32)
    return tl.where(value < 0, -code, code) & 15


@triton.jit
def _uniform(half):
    return (half.to(tl.int32).to(tl.float32) + 0.5) * ULP16


@triton.jit
def store_nibbles(
    packed_ptr, values, inverse, start, exists, row, seed, step, stream,
    STOCHASTIC: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Round a tile of fp32 `values` `[n_units, UNIT]` between neighboring levels and store it.

    Args:
        packed_ptr: First byte of the row.
        values: Values to round; 0 in columns that do not exist.
        inverse: One over the scale of each unit, `[n_units, 1]`.
        start: First column of each unit.
        exists: Which units exist.
        row: Number of the row, int64.
        seed: Key of the random words.
        step: Number of the step.
        stream: Number of the parameter.
        STOCHASTIC: False rounds to the nearest level.
        COLUMNS: Columns of the row.
        UNIT: Columns of a unit, a power of two of at least 2.
    """
    even, odd = tl.split(tl.reshape(values, (values.shape[0], UNIT // 2, 2)))
    if STOCHASTIC:
        first_counter = row * (((COLUMNS + 1) // 2 + 3) // 4)  # four bytes share a counter
        words = rounding_words(first_counter, start // 2, UNIT // 2, seed, step, stream, MOMENTUM)
        low, high = _uniform(words & 0xFFFF), _uniform(words >> 16)
    else:
        low = tl.full(even.shape, 0.5, tl.float32)
        high = low
    byte = _code(even, inverse, low) | (_code(odd, inverse, high) << 4)
    place, byte_mask = _bytes(start, exists, COLUMNS, UNIT)
    tl.store(packed_ptr + place, byte.to(tl.uint8), mask=byte_mask)
