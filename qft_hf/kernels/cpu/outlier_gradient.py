"""Float columns of both gradients in numba. Twin: `kernels/outlier_gradient.py`.

BLAS splits FP32 sums among threads if a result has few columns, so that their order, and the last
bits, depend on the number of threads. Here a thread computes whole tokens, or whole blocks of
outputs, and each sum in the order of a single thread.

PyTorch's products in BF16 and FP16 are faster than these loops, and showed no such dependence.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import outlier_gradient as operators
from .threads import for_each_row_range, run

_ZERO = np.float32(0.0)

# Multiply and add may be fused. In a dot product LLVM may also reorder the terms, once, when it
# compiles.
FUSED, FUSED_IN_LANES = {"contract"}, {"contract", "reassoc", "nsz"}

BLOCK = 256  # outputs: the unit of work of a thread
TOKENS = 32  # at a time: with a block, 32 KB of the gradient stay in the cache for all outliers


@njit(nogil=True, fastmath=FUSED_IN_LANES)
def _dot(gradient, token, outliers, k):
    row, outlier = gradient[token], outliers[k]
    total = _ZERO
    for j in range(row.shape[0]):
        total += row[j] * outlier[j]
    return total


@njit(nogil=True, fastmath=FUSED_IN_LANES)
def _four_dots(gradient, token, outliers, k):
    """Multiply four outliers at a time, so that the gradient is read once for all of them."""
    row = gradient[token]
    outlier0, outlier1 = outliers[k], outliers[k + 1]
    outlier2, outlier3 = outliers[k + 2], outliers[k + 3]
    total0, total1, total2, total3 = _ZERO, _ZERO, _ZERO, _ZERO
    for j in range(row.shape[0]):
        total0 += row[j] * outlier0[j]
        total1 += row[j] * outlier1[j]
        total2 += row[j] * outlier2[j]
        total3 += row[j] * outlier3[j]
    return total0, total1, total2, total3


@njit(nogil=True, cache=True)
def _token_rows(gradient, outliers, out, start, stop):
    n_outliers = outliers.shape[0]
    in_fours = n_outliers - n_outliers % 4
    for token in range(start, stop):
        for k in range(0, in_fours, 4):
            totals = _four_dots(gradient, token, outliers, k)
            for i in range(4):
                out[token, k + i] = totals[i]
        for k in range(in_fours, n_outliers):
            out[token, k] = _dot(gradient, token, outliers, k)


@njit(nogil=True, fastmath=FUSED)
def _add_token(totals, gradient, token, first, factor):
    row = gradient[token, first : first + totals.shape[0]]
    for j in range(totals.shape[0]):
        totals[j] += factor * row[j]


@njit(nogil=True, fastmath=FUSED)
def _add_eight_tokens(totals, gradient, token, first, outlier):
    """Add eight tokens in order, so that the totals are loaded and stored once for all of them."""
    last = first + totals.shape[0]
    row0, row1 = gradient[token, first:last], gradient[token + 1, first:last]
    row2, row3 = gradient[token + 2, first:last], gradient[token + 3, first:last]
    row4, row5 = gradient[token + 4, first:last], gradient[token + 5, first:last]
    row6, row7 = gradient[token + 6, first:last], gradient[token + 7, first:last]
    factor0, factor1, factor2, factor3 = outlier[0], outlier[1], outlier[2], outlier[3]
    factor4, factor5, factor6, factor7 = outlier[4], outlier[5], outlier[6], outlier[7]
    for j in range(totals.shape[0]):
        total = totals[j]
        total += factor0 * row0[j]
        total += factor1 * row1[j]
        total += factor2 * row2[j]
        total += factor3 * row3[j]
        total += factor4 * row4[j]
        total += factor5 * row5[j]
        total += factor6 * row6[j]
        total += factor7 * row7[j]
        totals[j] = total


@njit(nogil=True, cache=True)
def _output_blocks(gradient, outliers, out, start, stop):
    tokens, outputs = gradient.shape
    for block in range(start, stop):
        first = block * BLOCK
        last = min(first + BLOCK, outputs)
        out[:, first:last] = _ZERO
        for first_token in range(0, tokens, TOKENS):
            last_token = min(first_token + TOKENS, tokens)
            in_eights = last_token - (last_token - first_token) % 8
            for k in range(outliers.shape[0]):
                totals, outlier = out[k, first:last], outliers[k]
                for token in range(first_token, in_eights, 8):
                    _add_eight_tokens(totals, gradient, token, first, outlier[token : token + 8])
                for token in range(in_eights, last_token):
                    _add_token(totals, gradient, token, first, outlier[token])


@njit(nogil=True, cache=True)
def _of_x(arguments, n_tokens, n_ranges):
    for_each_row_range(_token_rows, arguments, n_tokens, n_ranges)


@njit(nogil=True, cache=True)
def _of_weight(arguments, n_blocks, n_ranges):
    for_each_row_range(_output_blocks, arguments, n_blocks, n_ranges)


@operators.outlier_products.register("cpu")
def outlier_products(
    gradient: Tensor, weight_outliers: Tensor | None, input_outliers: Tensor | None
) -> tuple[Tensor, Tensor]:
    if gradient.dtype != torch.float32:
        return operators.outlier_products.reference(gradient, weight_outliers, input_outliers)
    tokens, outputs = gradient.shape
    of_x = of_weight = gradient.new_empty(0, 0)
    if weight_outliers is not None:
        of_x = gradient.new_empty(tokens, weight_outliers.shape[1])
        run(_of_x, (gradient, _by_column(weight_outliers), of_x), tokens, outputs)
    if input_outliers is not None:
        of_weight = gradient.new_empty(input_outliers.shape[1], outputs)
        arguments = (gradient, _by_column(input_outliers), of_weight)
        run(_of_weight, arguments, -(-outputs // BLOCK), BLOCK * tokens)
    return of_x, of_weight.t()


def _by_column(outliers: Tensor) -> Tensor:
    """Return the columns as the rows of a contiguous FP32 `[k, rows]`."""
    return outliers.float().t().contiguous()
