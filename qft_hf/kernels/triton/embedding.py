"""The gradient of an embedding table in Triton. Twin: `kernels/embedding.py`.

Tokens are sorted by row and keep their order within a row. There is a program for each token and
tile of a row. Only the program of a row's first token writes that tile; the others return at once.
So the host need not know how many rows were looked up, and does not wait for the GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import embedding as operators
from ..values import Quantized
from .launch import Launcher
from .numerics import magnitude_bits
from .quantization import finite_codes, scale_of_bits
from .tiling import group_max, over_units, row_constants, tile_columns, tiling

TOKENS: tl.constexpr = tl.constexpr(4)  # loaded together, so that no load waits for another


@triton.jit
def _sum_tile(
    gradient_ptr, order_ptr, sorted_ptr, position, n, row, first_group, first_unit,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """The FP32 sum over the tokens of a row from `position` on, with its columns and mask."""
    _, _, column, mask = tile_columns(first_group, first_unit, COLUMNS, GROUP, UNIT, UNITS, GROUPS)
    total = tl.zeros(column.shape, tl.float32)
    is_of_row = position < n
    while is_of_row:
        for _ahead in tl.static_range(TOKENS):
            is_of_row = position < n
            other_row = tl.load(sorted_ptr + position, mask=is_of_row, other=-1)
            is_of_row = is_of_row & (other_row == row)
            token = tl.load(order_ptr + position, mask=is_of_row, other=0)
            there = mask & (column < tl.where(is_of_row, COLUMNS, 0))
            value = tl.load(gradient_ptr + token * COLUMNS + column, mask=there, other=0.0)
            total += value.to(tl.float32)  # adding 0 changes no sum: none is -0, as all start at 0
            position += 1
    return total, column, mask


@triton.jit(do_not_specialize=["n", "n_rows", "padding_idx"])
def _embedding_gradient_kernel(
    codes_ptr,  # [n_rows, COLUMNS] int8, modified
    scales_ptr,  # [n_rows, N_GROUPS] fp32, modified
    sorted_ptr,  # [n] int32 or int64: rows, ascending
    order_ptr,  # [n] int64: the token of each entry of `sorted_ptr`
    gradient_ptr,  # [n, COLUMNS] fp32, bf16 or fp16
    n,
    n_rows,
    padding_idx,  # -1: none
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    UNIT_TILES: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * GROUPS
    row = tl.load(sorted_ptr + position).to(tl.int64)
    before = tl.load(sorted_ptr + position - 1, mask=position > 0, other=-1)
    if (row < 0) | (row >= n_rows) | (row == padding_idx) | (row == before):
        return
    codes_ptr += row * COLUMNS
    scales_ptr += row * N_GROUPS
    # The first tile of a group stays in registers; other tiles of a long group are summed twice.
    total, column, mask = _sum_tile(
        gradient_ptr, order_ptr, sorted_ptr, position, n, row, first_group, 0,
        COLUMNS, GROUP, UNIT, UNITS, GROUPS,
    )  # fmt: skip
    largest = group_max(magnitude_bits(total), UNITS, GROUPS)
    for unit_tile in range(1, UNIT_TILES):
        more, _, _ = _sum_tile(
            gradient_ptr, order_ptr, sorted_ptr, position, n, row, first_group, unit_tile * UNITS,
            COLUMNS, GROUP, UNIT, UNITS, GROUPS,
        )  # fmt: skip
        largest = tl.maximum(largest, group_max(magnitude_bits(more), UNITS, GROUPS))
    scale, inverse = scale_of_bits(largest)
    inverse = over_units(inverse, UNITS, GROUPS)
    tl.store(codes_ptr + column, finite_codes(total, inverse), mask=mask)
    for unit_tile in range(1, UNIT_TILES):
        more, column, mask = _sum_tile(
            gradient_ptr, order_ptr, sorted_ptr, position, n, row, first_group, unit_tile * UNITS,
            COLUMNS, GROUP, UNIT, UNITS, GROUPS,
        )  # fmt: skip
        tl.store(codes_ptr + column, finite_codes(more, inverse), mask=mask)
    group = first_group + tl.arange(0, GROUPS)
    tl.store(scales_ptr + group, scale, mask=group < N_GROUPS)


_launch_embedding_gradient = Launcher(_embedding_gradient_kernel)


@operators.embedding_gradient_.register("triton")
def embedding_gradient_(
    table: Quantized, ids: Tensor, gradient: Tensor, *, padding_idx: int | None
) -> None:
    if not len(ids):
        return
    n_rows, columns = table.codes.shape
    sorted_ids, order = ids.sort(stable=True)
    _launch_embedding_gradient(
        (len(ids), tiling(columns, table.group_size).GROUP_TILES),
        row_constants(columns, table.group_size),
        *table.tensors, sorted_ids, order, gradient, len(ids), n_rows,
        -1 if padding_idx is None else padding_idx,
    )  # fmt: skip
