"""INT8 quantization in Triton. Twin: `kernels/quantization.py`."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import quantization as operators
from ..values import Weight
from .launch import Constants, Launcher, Plan
from .numerics import INFINITY, absmax_scale, inverse_scale, magnitude_bits, quantized
from .tiling import group_max, over_units, row_constants, tile_columns, tiling


@triton.jit
def scale_of_bits(largest):
    """Return scale and inverse of groups whose largest magnitude has these bits.

    If it is not finite, the inverse is 0: codes become 0, and the non-finite scale shows the fault.
    """
    scale = absmax_scale(largest.to(tl.float32, bitcast=True))
    return scale, tl.where(largest < INFINITY, inverse_scale(scale), 0.0)


@triton.jit
def load_tile(x_ptr, first_group, first_unit, TILING: tl.constexpr):
    _, _, column, mask = tile_columns(first_group, first_unit, TILING)
    return tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32), column, mask


@triton.jit
def _load_kept(source, first_group, first_unit, TILING: tl.constexpr):
    """Load a tile with 0 in the columns that count as 0."""
    x_ptr, zero_columns_ptr = source
    x, column, mask = load_tile(x_ptr, first_group, first_unit, TILING)
    if zero_columns_ptr is not None:
        is_zero = tl.load(zero_columns_ptr + column, mask=mask, other=0)
        x = tl.where(is_zero != 0, 0.0, x)
    return x, column, mask


@triton.jit
def finite_codes(x, inverse):
    """Return the codes of `x`; 0 in groups that are not finite, whose inverse is 0."""
    return quantized(tl.where(inverse > 0, x, 0.0), inverse)


@triton.jit
def store_quantized(
    LOAD: tl.constexpr, source, codes_ptr, scales_ptr, first_group,
    TILING: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Quantize the groups of a tile of a row, whose values `LOAD` returns.

    The first tile of a group stays in registers; other tiles of a long group are loaded twice.

    Args:
        LOAD: `LOAD(source, first_group, first_unit, TILING)` returns FP32 values, their columns,
            and which of them exist.
        source: What `LOAD` reads.
        codes_ptr: Codes of the row.
        scales_ptr: Scales of the row.
        first_group: First group of the tile.
        TILING: The tiling of the row.
        IN_PLACE: Whether `LOAD` reads these codes and scales.
    """
    x, column, mask = LOAD(source, first_group, 0, TILING)
    largest = group_max(magnitude_bits(x), TILING)
    for unit_tile in range(1, TILING.UNIT_TILES):
        more, _, _ = LOAD(source, first_group, unit_tile * TILING.UNITS, TILING)
        largest = tl.maximum(largest, group_max(magnitude_bits(more), TILING))
    scale, inverse = scale_of_bits(largest)
    inverse = over_units(inverse, TILING)
    if IN_PLACE:
        tl.debug_barrier()  # every thread has read this tile before any thread overwrites it
    tl.store(codes_ptr + column, finite_codes(x, inverse), mask=mask)
    for unit_tile in range(1, TILING.UNIT_TILES):
        more, column, mask = LOAD(source, first_group, unit_tile * TILING.UNITS, TILING)
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(codes_ptr + column, finite_codes(more, inverse), mask=mask)
    group = first_group + tl.arange(0, TILING.GROUPS)
    tl.store(scales_ptr + group, scale, mask=group < TILING.N_GROUPS)


@triton.jit(do_not_specialize=["n_rows"])
def _quantize_kernel(
    x_ptr,  # [n_rows, COLUMNS] fp32, bf16 or fp16
    zero_columns_ptr,  # [COLUMNS] int8: 1 for columns that count as 0; or None
    columns_ptr,  # [N_TAKEN] int64: columns that are copied as they are
    codes_ptr,  # [n_rows, COLUMNS] int8, written
    scales_ptr,  # [n_rows, N_GROUPS] fp32, written
    taken_ptr,  # [N_TAKEN, n_rows] of the dtype of x, written
    n_rows,
    N_TAKEN: tl.constexpr,
    TAKEN_TILE: tl.constexpr,
    TILING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: row * COLUMNS overflows int32 at 2**31
    x_ptr += row * TILING.COLUMNS
    codes_ptr += row * TILING.COLUMNS
    scales_ptr += row * TILING.N_GROUPS
    if N_TAKEN > 0:
        for tile in range((N_TAKEN + TAKEN_TILE - 1) // TAKEN_TILE):
            k = tile * TAKEN_TILE + tl.arange(0, TAKEN_TILE)
            taken = tl.load(x_ptr + tl.load(columns_ptr + k, mask=k < N_TAKEN, other=0))
            tl.store(taken_ptr + k.to(tl.int64) * n_rows + row, taken, mask=k < N_TAKEN)
    for group_tile in range(TILING.GROUP_TILES):
        first_group = group_tile * TILING.GROUPS
        source = x_ptr, zero_columns_ptr
        store_quantized(
            _load_kept, source, codes_ptr, scales_ptr, first_group, TILING, IN_PLACE=False
        )


@triton.jit(do_not_specialize=["n_rows"])
def _dequantize_kernel(
    codes_ptr,  # [n_rows, COLUMNS] int8
    scales_ptr,  # [n_rows, N_GROUPS] fp32
    outlier_values_ptr,  # [n_rows, N_OUTLIERS] fp32
    outlier_columns_ptr,  # [n_rows, N_OUTLIERS] int16 or int32
    rows_ptr,  # [n / EACH] int32 or int64, if GATHER: e stands for the EACH rows from e * EACH on
    x_ptr,  # [n, COLUMNS] fp32, bf16 or fp16, written
    n_rows,
    GATHER: tl.constexpr,
    EACH: tl.constexpr,
    N_OUTLIERS: tl.constexpr,
    OUTLIER_TILE: tl.constexpr,
    TILING: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program
    row_exists = row >= 0
    if GATHER:
        row = tl.load(rows_ptr + program // EACH).to(tl.int64) * EACH + program % EACH
        row_exists = (row >= 0) & (row < n_rows)
        row = tl.where(row_exists, row, 0)
    codes_ptr += row * TILING.COLUMNS
    scales_ptr += row * TILING.N_GROUPS
    x_ptr += program * TILING.COLUMNS
    for group_tile in range(TILING.GROUP_TILES):
        for unit_tile in range(TILING.UNIT_TILES):
            start, exists, column, mask = tile_columns(
                group_tile * TILING.GROUPS, unit_tile * TILING.UNITS, TILING
            )
            scale = tl.load(scales_ptr + start // TILING.GROUP, mask=exists, other=0.0)
            if GATHER:
                scale = tl.where(row_exists, scale, float("nan"))
            code = tl.load(codes_ptr + column, mask=mask, other=0)
            x = code.to(tl.float32) * scale[:, None]
            tl.store(x_ptr + column, x.to(x_ptr.dtype.element_ty), mask=mask)
    if N_OUTLIERS > 0:
        # This program wrote every element of its row. The barrier orders the writes of all its
        # threads before those of outliers.
        tl.debug_barrier()
        for tile in range((N_OUTLIERS + OUTLIER_TILE - 1) // OUTLIER_TILE):
            k = tile * OUTLIER_TILE + tl.arange(0, OUTLIER_TILE)
            mask = k < tl.where(row_exists, N_OUTLIERS, 0)
            column = tl.load(outlier_columns_ptr + row * N_OUTLIERS + k, mask=mask, other=0)
            value = tl.load(outlier_values_ptr + row * N_OUTLIERS + k, mask=mask, other=0.0)
            tl.store(x_ptr + column.to(tl.int32), value.to(x_ptr.dtype.element_ty), mask=mask)


_launch_quantize = Launcher(_quantize_kernel)
_launch_dequantize = Launcher(_dequantize_kernel)


@operators.quantize.register("triton")
def quantize(x: Tensor, *, group_size: int | None) -> tuple[Tensor, Tensor]:
    return launch_quantize(x, group_size)


def launch_quantize(
    x: Tensor,
    group_size: int | None,
    zero_columns: Tensor | None = None,
    columns: Tensor | None = None,
    taken: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `quantize` with some columns counted as 0, and copy `columns` of `x` to rows of `taken`.

    Args:
        x: As in `quantize`.
        group_size: As in `quantize`.
        zero_columns: int8 `[columns]`, 1 for columns that count as 0; or None.
        columns: int64 `[n]`, the columns to copy; or None.
        taken: `[n, rows]` of the dtype of `x`, written; or None.
    """
    rows, n_columns = x.shape
    codes = torch.empty_like(x, dtype=torch.int8)
    n_groups = tiling(n_columns, group_size).N_GROUPS
    scales = x.new_empty(rows, n_groups, dtype=torch.float32)
    n_taken = 0 if columns is None else columns.shape[0]
    constants = _constants(n_columns, group_size, n_taken)
    _launch_quantize((rows,), constants, x, zero_columns, columns, codes, scales, taken, rows)
    return codes, scales


@cache
def _constants(n_columns: int, group_size: int | None, n_taken: int) -> Constants:
    tile = outlier_tile(n_taken)
    return row_constants(n_columns, group_size, N_TAKEN=n_taken, TAKEN_TILE=tile)


@cache
def outlier_tile(n_outliers: int) -> int:
    """Return how many outliers a program handles at a time."""
    return min(256, triton.next_power_of_2(max(1, n_outliers)))


@operators.dequantize.register("triton")
def dequantize(weight: Weight, *, rows: Tensor | None, n_each: int, dtype: torch.dtype) -> Tensor:
    n_rows, columns = weight.codes.shape
    n = n_rows if rows is None else n_each * rows.shape[0]
    x = weight.codes.new_empty(n, columns, dtype=dtype)
    if n == 0:
        return x
    # An embedding looks up a different number of single rows each time: no plan is kept for them.
    is_kept = rows is None or n_each > 1
    key = dtype if rows is None else (dtype, n, n_each)
    plan = weight.plans.get(key) if is_kept else None
    if plan is None:
        n_outliers = weight.outlier_values.shape[1]
        constants = row_constants(
            columns, weight.group_size, GATHER=rows is not None, EACH=n_each,
            N_OUTLIERS=n_outliers, OUTLIER_TILE=outlier_tile(n_outliers),
        )  # fmt: skip
        # Without rows the kernel ignores this argument; with rows each launch gives it.
        numbers = weight.scales if rows is None else ...
        plan = Plan(_launch_dequantize, (n,), constants, *weight.tensors, numbers, ..., n_rows)
        if is_kept:
            weight.plans[key] = plan
    if rows is None:
        plan(x)
    else:
        plan(rows, x)
    return x
