"""INT8 products on a CPU. Twin: `kernels/reference/int8_matmul.py`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .bf16 import float_array, store_row
from .threads import for_each_row_range, n_ranges

_f32 = np.float32

# A sum of 1024 products of codes stays below 2**24, where FP32 holds every integer: it is exact,
# whatever the order and however multiply and add are fused.
EXACT = 1024
TILE = 2048  # rows and columns of the result at a time: 16 MB of sums


@njit(nogil=True, cache=True)
def _accumulate(totals, sums):
    for i in range(totals.shape[0]):
        totals[i] += np.int32(sums[i])


def exact_sums(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of codes as FP32, rounded once, by FP32 products of at most 1024 codes."""
    summed = a.shape[1]
    sums = a[:, :EXACT].float() @ b[:EXACT].float()
    if summed <= EXACT:
        return sums
    totals = sums.int()
    for start in range(EXACT, summed, EXACT):
        part = slice(start, start + EXACT)
        torch.mm(a[:, part].float(), b[part].float(), out=sums)
        _accumulate(totals.view(-1).numpy(), sums.view(-1).numpy())
    return sums.copy_(totals)


@njit(nogil=True, cache=True)
def _scale_row(sums, a_scale, b_scales, bias, values):
    for j in range(sums.shape[0]):
        value = (_f32(sums[j]) * a_scale) * b_scales[j]
        # Adding 0 instead of nothing would lose the sign of -0.
        values[j] = value + bias[j] if bias.shape[0] > 0 else value


@njit(nogil=True, cache=True)
def _scale_rows(sums, a_scales, b_scales, bias, out, first_column, start, stop):
    last_column = first_column + sums.shape[1]
    values = np.empty(sums.shape[1], np.float32)
    for row in range(start, stop):
        _scale_row(sums[row], a_scales[row], b_scales, bias, values)
        # Of whole rows, and not of a tile, numba knows that the columns are side by side.
        store_row(values, out[row, first_column:last_column])


@njit(nogil=True, cache=True)
def _scale(sums, a_scales, b_scales, bias, out, first_column, n_ranges):
    arguments = (sums, a_scales, b_scales, bias, out, first_column)
    for_each_row_range(_scale_rows, arguments, sums.shape[0], n_ranges)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    *,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    rows, columns = a.shape[0], b.shape[1]
    # Where AVX512-VNNI lacks, PyTorch's own product is fifty times slower than one in FP32.
    product = torch._int_mm if torch.cpu._is_vnni_supported() else exact_sums
    # FP16 is rounded at the end.
    out = torch.empty(rows, columns, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    out_array = float_array(out)
    # A factor of 1 changes nothing.
    a_factors = (torch.ones(rows) if a_scales is None else a_scales.view(-1)).numpy()
    b_factors = (torch.ones(columns) if b_scales is None else b_scales.view(-1)).numpy()
    terms = (torch.empty(0) if bias is None else bias.float()).numpy()
    for first_row in range(0, rows, TILE):
        tile_rows = slice(first_row, first_row + TILE)
        for first_column in range(0, columns, TILE):
            tile_columns = slice(first_column, first_column + TILE)
            arrays = (
                product(a[tile_rows], b[:, tile_columns]).numpy(),
                a_factors[tile_rows],
                b_factors[tile_columns],
                terms[tile_columns],
                out_array[tile_rows],
            )
            _scale(*arrays, first_column, n_ranges(*arrays[0].shape))
    return out.to(dtype)
