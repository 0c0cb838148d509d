"""Rounding, scales and random words in kernels. Twins: `kernels/groups.py`, `kernels/philox.py`."""

import triton
import triton.language as tl

from ..groups import MAGIC as _MAGIC
from ..groups import QMAX as _QMAX
from ..groups import TINY as _TINY
from ..philox import ROUNDS as _ROUNDS
from ..philox import STEP as _STEP
from ..philox import WEIGHT as _WEIGHT

MAGIC: tl.constexpr = tl.constexpr(_MAGIC)
ROUNDS: tl.constexpr = tl.constexpr(_ROUNDS)
STEP: tl.constexpr = tl.constexpr(_STEP)
QMAX: tl.constexpr = tl.constexpr(float(_QMAX))
PER_QMAX: tl.constexpr = tl.constexpr(1.0 / _QMAX)
TINY: tl.constexpr = tl.constexpr(_TINY)
ULP16: tl.constexpr = tl.constexpr(2.0**-16)
ULP24: tl.constexpr = tl.constexpr(2.0**-24)
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # the bits of FP32 without the sign
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)  # the bits of infinity; those of NaN are above


@triton.jit
def signed(size, x):
    """`size * sign(x)`, without the product."""
    return tl.where(x > 0, size, tl.where(x < 0, -size, 0.0))


@triton.jit
def nearest_code(values):
    """The nearest integer, ties to even, as int8; values must round into [-127, 127].

    Adding 1.5 * 2**23 rounds a value to an integer; the low bits hold its two's complement.
    """
    return (values + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def nearest(values):
    """The nearest integer, ties to even, as fp32; values must be below 2**22."""
    return (values + MAGIC) - MAGIC


@triton.jit
def quantized(values, inverse):
    """Return the codes of `values`; `inverse` is one over the absmax scale of their group.

    The reference clamps them. With an absmax scale that is not needed: no product exceeds
    127 * (1 + 2**-21), which rounds to 127.
    """
    return nearest_code(values * inverse)


@triton.jit
def absmax_scale(absmax, PER_LARGEST: tl.constexpr = 1.0 / _QMAX):
    """Return the scales of groups with these largest magnitudes, as `groups.absmax_scale` does.

    `PER_LARGEST` is one over the largest value of a code. NaN stays: it is not below `TINY`.
    """
    scale = absmax * PER_LARGEST
    return tl.where(scale < TINY, TINY, scale)


@triton.jit
def inverse_scale(scale):
    """One over `scale`, correctly rounded."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def magnitude_bits(x):
    """Return the bits of `abs(x)`: integers in the order of magnitudes, with NaN the largest."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def read_live(live_ptr, lr, shrink, step):
    """Return the numbers of the step that `live_ptr` holds, or if it is None those passed."""
    if live_ptr is not None:
        rate = tl.load(live_ptr)
        lr, shrink = rate.to(tl.float32), (rate * tl.load(live_ptr + 1)).to(tl.float32)
        step = tl.load(live_ptr + 2).to(tl.int64)
    return lr, shrink, step


@triton.jit
def philox_words(counter, seed, step, stream, PURPOSE: tl.constexpr):
    """Return four random words for each counter of a block; twin: `philox` of the reference."""
    c0 = counter.to(tl.uint32)
    zero = c0 * 0
    c1, c2 = zero + step.to(tl.uint32), zero + stream.to(tl.uint32)
    return tl.philox(seed.to(tl.uint64), c0, c1, c2, zero + PURPOSE, ROUNDS)


@triton.jit
def random_words(
    first_counter, start, UNIT: tl.constexpr, seed, step, stream, PURPOSE: tl.constexpr = _WEIGHT
):
    """Return a 32-bit word per element of a tile: `[n_units, UNIT]`; four columns share a counter.

    Args:
        first_counter: Counter of the row's first four columns, int64.
        start: First column of each unit, `[n_units]`; a multiple of `UNIT`.
        UNIT: Columns of a unit.
        seed: Key.
        step: Word 1 of the counter.
        stream: Word 2 of the counter.
        PURPOSE: Word 3.
    """
    if UNIT % 4 == 0:
        # One call serves four neighboring columns; join stacks its arguments along a new last axis.
        quad = start[:, None] // 4 + tl.arange(0, UNIT // 4)[None, :]
        w0, w1, w2, w3 = philox_words(first_counter + quad, seed, step, stream, PURPOSE)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        return tl.reshape(words, (start.shape[0], UNIT))
    column = start[:, None] + tl.arange(0, UNIT)[None, :]
    w0, w1, w2, w3 = philox_words(first_counter + column // 4, seed, step, stream, PURPOSE)
    lane = column % 4
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def rounding_words(
    first_counter, start, UNIT: tl.constexpr, seed, step, stream, PURPOSE: tl.constexpr = _WEIGHT
):
    """Return the 32-bit words of a tile in step `step`; twin: `rounding_words` of the reference."""
    words = random_words(first_counter, start, UNIT, seed, tl.zeros((), tl.uint32), stream, PURPOSE)
    return words + step.to(tl.uint32) * STEP


@triton.jit
def weight_uniform(words):
    """FP32 uniform in [0, 1) from the high 24 bits of each word."""
    return (words >> 8).to(tl.float32) * ULP24
