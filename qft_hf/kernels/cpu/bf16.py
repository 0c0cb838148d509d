"""BF16, which numpy lacks: its 16 bits, as int16, are the high half of those of an FP32 value."""

import numpy as np
import torch
from numba import njit
from torch import Tensor


def bits(x: Tensor) -> np.ndarray:
    """A BF16 tensor as an int16 array of the same memory."""
    return x.view(torch.int16).numpy()


@njit(nogil=True, cache=True)
def round_row(values, out):
    """Round FP32 `values` to the nearest BF16, ties to even; NaN stays NaN."""
    value_bits = values.view(np.int32)
    for j in range(out.shape[0]):
        high, low = value_bits[j] >> 16, value_bits[j] & 0xFFFF
        up = low + (high & 1) > 0x8000
        is_nan = (value_bits[j] & 0x7FFFFFFF) > 0x7F800000
        out[j] = np.int16(high | 0x40 if is_nan else high + up)
