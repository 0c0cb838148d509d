"""Largest magnitudes of columns in numba, to quantize along columns or to choose among them."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .bf16 import float_array, widen
from .quantization import magnitude
from .threads import for_each_row_range, run

_ONE = np.float32(1.0)

BLOCK = 64  # rows: the unit of work of a thread, with maxima of its own


# A separate function: LLVM does not vectorize this loop inside the loops over rows.
@njit(nogil=True, cache=True)
def _enlarge(maxima, block, x, row, factor):
    largest, elements = maxima[block], x[row]
    for j in range(x.shape[1]):
        largest[j] = max(largest[j], magnitude(widen(elements[j]) * factor))


@njit(nogil=True, cache=True)
def _block_maxima(x, factors, maxima, start, stop):
    for block in range(start, stop):
        maxima[block] = 0
        for row in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[0])):
            factor = factors[row] if factors.shape[0] > 0 else _ONE
            _enlarge(maxima, block, x, row, factor)


@njit(nogil=True, cache=True)
def _maxima(arguments, n_blocks, n_ranges):
    for_each_row_range(_block_maxima, arguments, n_blocks, n_ranges)


def column_maxima(x: Tensor, factors: Tensor) -> Tensor:
    """The largest `magnitude` of each column of `x` `[rows, columns]`: int32 `[columns]`.

    Args:
        x: fp32, bf16 or fp16.
        factors: fp32 `[rows]`, which the rows are multiplied by first; or empty.
    """
    n_blocks = -(-x.shape[0] // BLOCK)
    maxima = x.new_empty(n_blocks, x.shape[1], dtype=torch.int32)
    run(_maxima, (float_array(x), factors, maxima), n_blocks, BLOCK * x.shape[1])
    # As an integer NaN is larger than all numbers, so the maximum keeps it.
    return maxima.amax(dim=0)
