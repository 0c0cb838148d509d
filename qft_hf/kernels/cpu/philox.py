"""Philox 4x32-7 in numba. Twin: `kernels/philox.py`."""

import numpy as np
from numba import njit

from ..philox import KEY_INCREMENTS, MASK, MULTIPLIERS, ROUNDS, STEP

_u32, _u64 = np.uint32, np.uint64
_MASK, _SHIFT = _u64(MASK), _u64(32)
_M0, _M1 = _u64(MULTIPLIERS[0]), _u64(MULTIPLIERS[1])
_NO_STEP, _STEP = _u64(0), _u64(STEP)
_ULP24 = np.float32(2.0**-24)
_W0, _W1 = _u32(KEY_INCREMENTS[0]), _u32(KEY_INCREMENTS[1])


@njit(inline="always")
def philox(counter, seed, step, stream, purpose):
    """Return four uint32 words for one counter; all arguments are uint64."""
    # LLVM vectorizes 32-bit words with 64-bit products, but not 64-bit words.
    c0, c1, c2, c3 = _u32(counter & _MASK), _u32(step & _MASK), _u32(stream & _MASK), _u32(purpose)
    k0, k1 = _u32(seed & _MASK), _u32(seed >> _SHIFT)
    for _ in range(ROUNDS):
        p0, p1 = _M0 * _u64(c0), _M1 * _u64(c2)
        c0, c1 = _u32(p1 >> _SHIFT) ^ c1 ^ k0, _u32(p1)
        c2, c3 = _u32(p0 >> _SHIFT) ^ c3 ^ k1, _u32(p0)
        k0, k1 = _u32(k0 + _W0), _u32(k1 + _W1)
    return _u32(c0), _u32(c1), _u32(c2), _u32(c3)


@njit(inline="always")
def rounding_words(counter, seed, step, stream, purpose):
    """Return the uint32 words of four neighboring elements in step `step`."""
    w0, w1, w2, w3 = philox(counter, seed, _NO_STEP, stream, purpose)
    shift = _u32(step * _STEP & _MASK)
    return _u32(w0 + shift), _u32(w1 + shift), _u32(w2 + shift), _u32(w3 + shift)


@njit(error_model="numpy")
def rounding_row(words, row, seed, step, stream, purpose):
    """Fill uint32 `words` [LANES, quads]: column `LANES * quad + lane` of a row has `[lane, quad]`.

    With an array for each lane, LLVM vectorizes the loop.
    """
    quads = words.shape[1]
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    base = _u64(row) * _u64(quads)
    for quad in range(quads):
        w0, w1, w2, w3 = rounding_words(base + _u64(quad), seed, step, stream, purpose)
        words0[quad], words1[quad], words2[quad], words3[quad] = w0, w1, w2, w3


@njit(inline="always")
def weight_uniform(word):
    """FP32 uniform in [0, 1) from the high 24 bits of a word."""
    return np.float32(np.int32(word >> _u32(8))) * _ULP24
