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
from .quantization import store_quantized
from .tiling import row_constants, tile_columns, tiling

TOKENS: tl.constexpr = tl.constexpr(4)  # loaded together, so that no load waits for another


@triton.jit
def _sum_tile(source, first_group, first_unit, TILING: tl.constexpr):
    """The FP32 sum over the tokens of a row from `position` on, with its columns and mask."""
    gradient_ptr, order_ptr, sorted_ptr, position, n, row = source
    _, _, column, mask = tile_columns(first_group, first_unit, TILING)
    total = tl.zeros(column.shape, tl.float32)
    is_of_row = position < n
    while is_of_row:
        for _ahead in tl.static_range(TOKENS):
            is_of_row = position < n
            other_row = tl.load(sorted_ptr + position, mask=is_of_row, other=-1)
            is_of_row = is_of_row & (other_row == row)
            token = tl.load(order_ptr + position, mask=is_of_row, other=0)
            there = mask & (column < tl.where(is_of_row, TILING.COLUMNS, 0))
            value = tl.load(gradient_ptr + token * TILING.COLUMNS + column, mask=there, other=0.0)
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
    TILING: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * TILING.GROUPS
    row = tl.load(sorted_ptr + position).to(tl.int64)
    before = tl.load(sorted_ptr + position - 1, mask=position > 0, other=-1)
    if (row < 0) | (row >= n_rows) | (row == padding_idx) | (row == before):
        return
    codes_ptr += row * TILING.COLUMNS
    scales_ptr += row * TILING.N_GROUPS
    source = gradient_ptr, order_ptr, sorted_ptr, position, n, row
    store_quantized(_sum_tile, source, codes_ptr, scales_ptr, first_group, TILING, IN_PLACE=False)


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
