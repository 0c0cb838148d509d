"""Inputs as INT8 operands in numba. Twin: `kernels/layer_input.py`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import layer_input as operators
from .columns import column_maxima
from .quantization import quantize_without_columns


@njit(nogil=True, cache=True)
def _choose(maxima, least, columns, is_outlier):
    """Write the numbers of the columns with the largest maxima, ascending; the first of equals.

    `least` is the smallest of these maxima.
    """
    n_equal = columns.shape[0] - np.sum(maxima > least)
    place = 0
    for column in range(maxima.shape[0]):
        is_chosen = maxima[column] > least
        if maxima[column] == least and n_equal > 0:
            is_chosen = True
            n_equal -= 1
        is_outlier[column] = is_chosen
        if is_chosen:
            columns[place] = column
            place += 1


@operators.quantize_input.register("cpu")
def quantize_input(x: Tensor, *, n_outliers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = x.new_empty(n_outliers, dtype=torch.int64)
    is_outlier = x.new_empty(x.shape[1] if n_outliers else 0, dtype=torch.bool)
    if n_outliers:
        maxima = column_maxima(x, x.new_empty(0, dtype=torch.float32)).numpy()
        # Not in numba, which takes five seconds to compile a partition.
        least = np.partition(maxima, -n_outliers)[-n_outliers]
        _choose(maxima, least, columns.numpy(), is_outlier.numpy())
    codes, scales = quantize_without_columns(x, is_outlier, None)
    return codes, scales, columns, operators.take_columns(x, columns)
