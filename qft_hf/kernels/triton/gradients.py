"""Sum and norm of INT8 gradients in Triton. Twin: `kernels/gradients.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gradients as operators
from ..values import Quantized
from .launch import Launcher
from .quantization import store_quantized
from .tiling import group_sum_of_squares, row_constants, tile_columns


@triton.jit
def _sum_tile(source, first_group, first_unit, TILING: tl.constexpr):
    """The FP32 sum of a tile of both gradients, with its columns and mask."""
    codes_ptr, scales_ptr, other_codes_ptr, other_scales_ptr = source
    start, exists, column, mask = tile_columns(first_group, first_unit, TILING)
    scale = tl.load(scales_ptr + start // TILING.GROUP, mask=exists, other=0.0)
    other_scale = tl.load(other_scales_ptr + start // TILING.GROUP, mask=exists, other=0.0)
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
    TILING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    codes_ptr += row * TILING.COLUMNS
    other_codes_ptr += row * TILING.COLUMNS
    scales_ptr += row * TILING.N_GROUPS
    other_scales_ptr += row * TILING.N_GROUPS
    source = codes_ptr, scales_ptr, other_codes_ptr, other_scales_ptr
    for group_tile in range(TILING.GROUP_TILES):
        first_group = group_tile * TILING.GROUPS
        store_quantized(
            _sum_tile, source, codes_ptr, scales_ptr, first_group, TILING, IN_PLACE=True
        )


@triton.jit
def _squared_norms_kernel(
    codes_ptr,  # [rows, COLUMNS] int8
    scales_ptr,  # [rows, N_GROUPS] fp32
    norms_ptr,  # [rows] fp64, written
    TILING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    codes_ptr += row * TILING.COLUMNS
    scales_ptr += row * TILING.N_GROUPS
    GROUPS: tl.constexpr = TILING.GROUPS  # Triton 3.6 makes no shape of plain numbers
    norms = tl.zeros((GROUPS,), tl.float64)
    for group_tile in range(TILING.GROUP_TILES):
        first_group = group_tile * TILING.GROUPS
        sums = tl.zeros((GROUPS,), tl.int64)
        for unit_tile in range(TILING.UNIT_TILES):
            _, _, column, mask = tile_columns(first_group, unit_tile * TILING.UNITS, TILING)
            code = tl.load(codes_ptr + column, mask=mask, other=0).to(tl.int32)
            sums += group_sum_of_squares(code, TILING)
        group = first_group + tl.arange(0, TILING.GROUPS)
        scale = tl.load(scales_ptr + group, mask=group < TILING.N_GROUPS, other=0.0).to(tl.float64)
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
