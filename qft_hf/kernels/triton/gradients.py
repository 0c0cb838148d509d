"""Sum and norm of INT8 gradients in Triton. Twin: `kernels/gradients.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gradients as operators
from ..values import Quantized
from .launch import Launcher
from .numerics import magnitude_bits
from .quantization import finite_codes, scale_of_bits
from .tiling import group_max, over_units, row_constants, tile_columns


@triton.jit
def _sum_tile(
    codes_ptr, scales_ptr, other_codes_ptr, other_scales_ptr, first_group, first_unit,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    UNITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The FP32 sum of a tile of both gradients, with its columns and mask."""
    start, exists, column, mask = tile_columns(
        first_group, first_unit, COLUMNS, GROUP, UNIT, UNITS, GROUPS
    )
    scale = tl.load(scales_ptr + start // GROUP, mask=exists, other=0.0)
    other_scale = tl.load(other_scales_ptr + start // GROUP, mask=exists, other=0.0)
    code = tl.load(codes_ptr + column, mask=mask, other=0).to(tl.float32)
    other = tl.load(other_codes_ptr + column, mask=mask, other=0).to(tl.float32)
    total = code * scale[:, None] + other * other_scale[:, None]
    # A non-finite scale must show in the columns that exist, but not turn padding into NaN.
    return tl.where(mask, total, 0.0), column, mask


@triton.jit
def _accumulate_kernel(
    codes_ptr,  # [rows, COLUMNS] int8, modified
    scales_ptr,  # [rows, N_GROUPS] fp32, modified
    other_codes_ptr,  # [rows, COLUMNS] int8
    other_scales_ptr,  # [rows, N_GROUPS] fp32
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    UNIT_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    codes_ptr += row * COLUMNS
    other_codes_ptr += row * COLUMNS
    scales_ptr += row * N_GROUPS
    other_scales_ptr += row * N_GROUPS
    for group_tile in range(GROUP_TILES):
        first_group = group_tile * GROUPS
        total, column, mask = _sum_tile(
            codes_ptr, scales_ptr, other_codes_ptr, other_scales_ptr,
            first_group, 0, COLUMNS, GROUP, UNIT, UNITS, GROUPS,
        )  # fmt: skip
        largest = group_max(magnitude_bits(total), UNITS, GROUPS)
        for unit_tile in range(1, UNIT_TILES):
            more, _, _ = _sum_tile(
                codes_ptr, scales_ptr, other_codes_ptr, other_scales_ptr,
                first_group, unit_tile * UNITS, COLUMNS, GROUP, UNIT, UNITS, GROUPS,
            )  # fmt: skip
            largest = tl.maximum(largest, group_max(magnitude_bits(more), UNITS, GROUPS))
        scale, inverse = scale_of_bits(largest)
        inverse = over_units(inverse, UNITS, GROUPS)
        tl.debug_barrier()  # every thread has read this tile before any thread overwrites it
        tl.store(codes_ptr + column, finite_codes(total, inverse), mask=mask)
        for unit_tile in range(1, UNIT_TILES):
            more, column, mask = _sum_tile(
                codes_ptr, scales_ptr, other_codes_ptr, other_scales_ptr,
                first_group, unit_tile * UNITS, COLUMNS, GROUP, UNIT, UNITS, GROUPS,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(codes_ptr + column, finite_codes(more, inverse), mask=mask)
        group = first_group + tl.arange(0, GROUPS)
        tl.store(scales_ptr + group, scale, mask=group < N_GROUPS)


@triton.jit
def _squared_norms_kernel(
    codes_ptr,  # [rows, COLUMNS] int8
    scales_ptr,  # [rows, N_GROUPS] fp32
    norms_ptr,  # [rows] fp64, written
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    UNIT_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    codes_ptr += row * COLUMNS
    scales_ptr += row * N_GROUPS
    norms = tl.zeros((GROUPS,), tl.float64)
    for group_tile in range(GROUP_TILES):
        first_group = group_tile * GROUPS
        sums = tl.zeros((GROUPS,), tl.int64)
        for unit_tile in range(UNIT_TILES):
            _, _, column, mask = tile_columns(
                first_group, unit_tile * UNITS, COLUMNS, GROUP, UNIT, UNITS, GROUPS
            )
            code = tl.load(codes_ptr + column, mask=mask, other=0).to(tl.int32)
            of_units = tl.reshape(tl.sum(code * code, axis=1), (GROUPS, UNITS))
            sums += tl.sum(of_units.to(tl.int64), axis=1)
        group = first_group + tl.arange(0, GROUPS)
        scale = tl.load(scales_ptr + group, mask=group < N_GROUPS, other=0.0).to(tl.float64)
        norms += sums.to(tl.float64) * (scale * scale)
    tl.store(norms_ptr + row, tl.sum(norms, axis=0))


_launch_accumulate = Launcher(_accumulate_kernel)
_launch_squared_norms = Launcher(_squared_norms_kernel)


@operators.accumulate_.register("triton")
def accumulate_(gradient: Quantized, other: Quantized) -> None:
    rows, columns = gradient.codes.shape
    constants = row_constants(columns, gradient.group_size)
    _launch_accumulate((rows,), constants, *gradient.tensors, *other.tensors)


@operators.squared_norms.register("triton")
def squared_norms(gradient: Quantized) -> Tensor:
    codes, scales = gradient.tensors
    rows, columns = codes.shape
    norms = scales.new_empty(rows, dtype=torch.float64)
    constants = row_constants(columns, gradient.group_size)
    _launch_squared_norms((rows,), constants, codes, scales, norms)
    return norms
