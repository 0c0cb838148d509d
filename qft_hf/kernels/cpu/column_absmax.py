"""Largest magnitudes of columns in numba. Twin: `kernels/reference/column_absmax.py`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .bf16 import float_array, load_row
from .threads import for_each_row_range

_MAGNITUDE = np.int32(0x7FFFFFFF)  # FP32 without its sign: as an integer it orders magnitudes

BLOCK = 64  # rows; what a thread takes, and has maxima of


@njit(nogil=True, cache=True)
def _block_maxima(x, factors, maxima, start, stop):
    rows, columns = x.shape
    values = np.empty(columns, np.float32)
    bits = values.view(np.int32)
    for block in range(start, stop):
        largest = maxima[block]
        largest[:] = 0
        for row in range(block * BLOCK, min((block + 1) * BLOCK, rows)):
            load_row(x[row], values)
            if factors.shape[0] > 0:
                factor = factors[row]
                for j in range(columns):
                    values[j] *= factor
            for j in range(columns):
                largest[j] = max(largest[j], bits[j] & _MAGNITUDE)


def scaled_column_absmax(x: Tensor, factors: Tensor) -> Tensor:
    """`column_absmax` of `x` times a factor for each of its rows, or no factors."""
    n_blocks = -(-x.shape[0] // BLOCK)
    maxima = torch.empty(n_blocks, x.shape[1], dtype=torch.int32)
    arrays = (float_array(x), factors.numpy(), maxima.numpy())
    for_each_row_range(
        lambda start, stop: _block_maxima(*arrays, start, stop),
        n_rows=n_blocks,
        row_elements=BLOCK * x.shape[1],
    )
    # As integers NaN is above all others: it comes through.
    return maxima.amax(dim=0).view(torch.float32)


def column_absmax(x: Tensor) -> Tensor:
    return scaled_column_absmax(x, torch.empty(0))
