"""INT8 products on a CPU. Twin: `kernels/int8_product.py`."""

from collections.abc import Iterator

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import int8_product as operators
from ..groups import empty_quantized
from .bf16 import float_array, store_row, widen
from .quantization import quantize_row
from .threads import for_each_row_range, run

_f32 = np.float32
_ZERO = _f32(0.0)

# A sum of 1024 products of codes stays below 2**24, where FP32 holds every integer: it is exact,
# whatever the order and however multiply and add are fused.
EXACT = 1024
TILE = 2048  # rows and columns of the result at a time: 16 MB of sums


@njit(nogil=True, cache=True)
def _accumulate(totals, sums):
    for i in range(totals.shape[0]):
        totals[i] += np.int32(sums[i])


@torch.autocast("cpu", enabled=False)  # autocast would compute the products in BF16
def exact_sums(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` of codes in FP32, rounded once, from FP32 products over at most 1024 codes."""
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
        # A sum of zeros may be -0 in FP32; adding 0 makes it the 0 of an integer.
        value = ((_f32(sums[j]) + _ZERO) * a_scale) * b_scales[j]
        # Adding 0 instead of nothing would lose the sign of -0.
        values[j] = value + bias[j] if bias.shape[0] > 0 else value


@njit(nogil=True, cache=True)
def _place(values, columns, given, row, first_column):
    """Write the given values of a row into `values`, its part from `first_column` on."""
    for k in range(columns.shape[0]):
        j = columns[k] - first_column
        if 0 <= j < values.shape[0]:
            values[j] = widen(given[row, k])


@njit(nogil=True, cache=True)
def _scale_rows(sums, a_scales, b_scales, bias, columns, given, out, first_column, start, stop):
    last_column = first_column + sums.shape[1]
    values = np.empty(sums.shape[1], np.float32)
    for row in range(start, stop):
        _scale_row(sums[row], a_scales[row], b_scales, bias, values)
        _place(values, columns, given, row, first_column)
        # For whole rows, but not for a tile, numba knows that columns are contiguous.
        store_row(values, out[row, first_column:last_column])


@njit(nogil=True, cache=True)
def _scale(arguments, n_rows, n_ranges):
    for_each_row_range(_scale_rows, arguments, n_rows, n_ranges)


@njit(nogil=True, error_model="numpy", cache=True)
def _quantize_rows(
    sums, a_scales, columns, given, codes, scales, first_column, group_size, start, stop
):
    n_columns, first_group = sums.shape[1], first_column // group_size
    last_group = first_group + (n_columns + group_size - 1) // group_size
    ones, none = np.ones(n_columns, np.float32), np.empty(0, np.float32)
    values = np.empty(n_columns, np.float32)
    for row in range(start, stop):
        _scale_row(sums[row], a_scales[row], ones, none, values)
        _place(values, columns, given, row, first_column)
        code = codes[row, first_column : first_column + n_columns]
        quantize_row(values, code, scales[row, first_group:last_group], group_size)


@njit(nogil=True, cache=True)
def _quantize(arguments, n_rows, n_ranges):
    for_each_row_range(_quantize_rows, arguments, n_rows, n_ranges)


@operators.int8_matmul.register("cpu")
def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    *,
    bias: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    rows, n_columns = a.shape[0], b.shape[1]
    # FP16 is rounded at the end.
    out_dtype = dtype if dtype == torch.bfloat16 else torch.float32
    out = a.new_empty(rows, n_columns, dtype=out_dtype)
    out_array = float_array(out)
    a_factors, b_factors = _factors(a_scales, rows), _factors(b_scales, n_columns)
    terms = np.empty(0, np.float32) if bias is None else bias.float().numpy()
    numbers, given = _given(columns, values)
    for i, j, sums in _tiles_of_sums(a, b, TILE):
        operands = sums, a_factors[i], b_factors[j], terms[j]
        run(_scale, (*operands, numbers, given[i], out_array[i], j.start), *sums.shape)
    return out.to(dtype)


@operators.requantized_matmul.register("cpu")
def requantized_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    *,
    columns: Tensor | None,
    values: Tensor | None,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    rows, n_columns = a.shape[0], b.shape[1]
    codes, scales = empty_quantized(rows, n_columns, group_size)
    factors = _factors(a_scales, rows)
    numbers, given = _given(columns, values)
    # Each tile consists of whole groups.
    for i, j, sums in _tiles_of_sums(a, b, -(-TILE // group_size) * group_size):
        operands = sums, factors[i], numbers, given[i]
        run(_quantize, (*operands, codes[i], scales[i], j.start, group_size), *sums.shape)
    return codes, scales


def _tiles_of_sums(a: Tensor, b: Tensor, width: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield rows, columns and sums of tiles of `a @ b`, `width` columns at a time."""
    # Without AVX512-VNNI, PyTorch's own integer product is fifty times slower than an FP32 one.
    product = torch._int_mm if torch.cpu._is_vnni_supported() else exact_sums
    for first_row in range(0, a.shape[0], TILE):
        rows = slice(first_row, first_row + TILE)
        for first_column in range(0, b.shape[1], width):
            columns = slice(first_column, first_column + width)
            yield rows, columns, product(a[rows], b[:, columns]).numpy()


def _factors(scales: Tensor | None, size: int) -> np.ndarray:
    """One factor for each row; None becomes factors of 1, which change nothing."""
    return np.ones(size, np.float32) if scales is None else scales.view(-1).numpy()


def _given(columns: Tensor | None, values: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and values of the given columns, empty if there are none."""
    if columns is None or values is None:
        return np.empty(0, np.int64), np.empty((0, 0), np.float32)
    return columns.numpy(), float_array(values)
