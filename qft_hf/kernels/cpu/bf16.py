"""BF16 in numpy, which has no such type: int16 with the high half of the bits of an FP32 value."""

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor


def float_array(x: Tensor) -> np.ndarray:
    """Return a view of FP32 values or of the bits of BF16; of FP16 an FP32 copy, for reading."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy()
    return x.float().numpy()


def widen(element):
    """The FP32 value of an element of a `float_array`; for use in kernels."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(element):
    def from_bits(element):
        return np.int32(np.int32(element) << 16).view(np.float32)

    def as_it_is(element):
        return element

    return from_bits if element == types.int16 else as_it_is


def store_row(values, row):
    """Write FP32 `values` to a row of a `float_array`, rounded to its type; for use in kernels."""
    raise NotImplementedError


@overload(store_row, inline="always")
def _store_row(values, row):
    def copy(values, row):
        for j in range(row.shape[0]):
            row[j] = values[j]

    return _round_row if row.dtype == types.int16 else copy


def _round_row(values, row):
    """Round to the nearest BF16, ties to even; NaN stays NaN."""
    bits = values.view(np.int32)
    for j in range(row.shape[0]):
        high, low = bits[j] >> 16, bits[j] & 0xFFFF
        up = low + (high & 1) > 0x8000
        is_nan = (bits[j] & 0x7FFFFFFF) > 0x7F800000
        row[j] = np.int16(high | 0x40 if is_nan else high + up)
