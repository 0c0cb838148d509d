"""Philox 4x32-10 in numba. Twin: `kernels/reference/philox.py`."""

import numpy as np
from numba import njit

from ..reference.philox import KEY_INCREMENTS, MASK, MULTIPLIERS, ROUNDS

_MASK = np.uint64(MASK)
_SHIFT = np.uint64(32)
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint64(KEY_INCREMENTS[0]), np.uint64(KEY_INCREMENTS[1])


@njit(inline="always")
def philox(counter, seed, step, stream):
    """Four 32-bit words (as uint64) for one counter; all arguments uint64."""
    c0, c1, c2, c3 = counter & _MASK, step & _MASK, stream & _MASK, np.uint64(0)
    k0, k1 = seed & _MASK, seed >> _SHIFT
    for _ in range(ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3
