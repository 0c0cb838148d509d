"""Layer inputs as INT8 operands in Triton: column maxima, choice of outlier columns, codes.

Twin: `kernels/layer_input.py`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layer_input as operators
from .launch import Constants, Launcher
from .numerics import magnitude_bits
from .quantization import launch_quantize

# Maxima are taken over blocks of rows: enough blocks that all multiprocessors read, and few enough
# that one program can read the maxima of all blocks.
MAX_BLOCKS = 16
TILE_ROWS, TILE_COLUMNS = 32, 128
N_WARPS = 8
CHOICE_TILE, CHOICE_WARPS = 4096, 16  # of the one program that chooses outlier columns


@triton.jit(do_not_specialize=["n_rows", "block_rows"])
def _maxima_kernel(
    x_ptr,  # [n_rows, n_columns] fp32, bf16 or fp16
    bits_ptr,  # [n_blocks, n_columns] int32, written: the largest magnitudes of each block of rows
    n_rows,
    n_columns,
    block_rows,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    first = tl.program_id(1) * block_rows
    end = min(first + block_rows, n_rows)
    largest = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int32)
    for start in range(first, end, TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)
        mask = (row < end)[:, None] & (column < n_columns)[None, :]
        index = row.to(tl.int64)[:, None] * n_columns + column[None, :]
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(x))
    index = tl.program_id(1) * n_columns + column
    tl.store(bits_ptr + index, tl.max(largest, axis=0), mask=column < n_columns)


@triton.jit
def _count(bits_ptr, n_columns, limit, TILE: tl.constexpr):
    """Return how many columns have bits above `limit` >= 0; a NaN may have all 31 bits set."""
    found = tl.zeros((TILE,), tl.int32)
    for start in range(0, n_columns, TILE):
        column = start + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + column, mask=column < n_columns, other=0)
        found += (bits > limit).to(tl.int32)
    return tl.sum(found)


@triton.jit(do_not_specialize=["n_blocks"])
def _choose_kernel(
    bits_ptr,  # [n_blocks, n_columns] int32; the first row becomes the maxima over all rows
    columns_ptr,  # [N] int64, written: the columns with the largest maxima, ascending
    is_outlier_ptr,  # [n_columns] int8, written: 1 or 0
    n_blocks,
    n_columns,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    for start in range(0, n_columns, TILE):
        column = start + tl.arange(0, TILE)
        largest = tl.zeros((TILE,), tl.int32)
        for block in range(n_blocks):
            index = block * n_columns + column
            bits = tl.load(bits_ptr + index, mask=column < n_columns, other=0)
            largest = tl.maximum(largest, bits)
        tl.debug_barrier()  # several threads load an element that one of them stores
        tl.store(bits_ptr + column, largest, mask=column < n_columns)
    tl.debug_barrier()
    # The N-th largest maximum, from its highest bit down: the largest number that N maxima reach.
    least = 0
    for bit in range(31):
        candidate = least | (1 << (30 - bit))
        reached = _count(bits_ptr, n_columns, candidate - 1, TILE)
        least = tl.where(reached >= N, candidate, least)
    n_equal = N - _count(bits_ptr, n_columns, least, TILE)  # of columns that equal `least`
    n_chosen = 0
    for start in range(0, n_columns, TILE):
        column = start + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + column, mask=column < n_columns, other=-1)
        is_equal = (bits == least).to(tl.int32)
        is_chosen = (bits > least) | ((bits == least) & (tl.cumsum(is_equal, axis=0) <= n_equal))
        place = n_chosen + tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
        tl.store(columns_ptr + place, column.to(tl.int64), mask=is_chosen)
        tl.store(is_outlier_ptr + column, is_chosen.to(tl.int8), mask=column < n_columns)
        n_equal -= tl.sum(is_equal)
        n_chosen += tl.sum(is_chosen.to(tl.int32))


_launch_maxima, _launch_choose = Launcher(_maxima_kernel), Launcher(_choose_kernel)
_MAXIMA = Constants(TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, num_warps=N_WARPS)


@cache
def _choice(n_columns: int, n_outliers: int) -> Constants:
    tile = min(CHOICE_TILE, triton.next_power_of_2(n_columns))
    return Constants(N=n_outliers, TILE=tile, num_warps=CHOICE_WARPS)


@operators.quantize_input.register("triton")
def quantize_input(x: Tensor, *, n_outliers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, n_columns = x.shape
    columns = x.new_empty(n_outliers, dtype=torch.int64)
    values = x.new_empty(n_outliers, rows)
    if not n_outliers:
        return *launch_quantize(x, None), columns, values.t()
    block_rows = -(-rows // (MAX_BLOCKS * TILE_ROWS)) * TILE_ROWS
    n_blocks = -(-rows // block_rows)
    bits = x.new_empty(n_blocks, n_columns, dtype=torch.int32)
    grid = (-(-n_columns // TILE_COLUMNS), n_blocks)
    _launch_maxima(grid, _MAXIMA, x, bits, rows, n_columns, block_rows)
    is_outlier = x.new_empty(n_columns, dtype=torch.int8)
    constants = _choice(n_columns, n_outliers)
    _launch_choose((1,), constants, bits, columns, is_outlier, n_blocks, n_columns)
    codes, scales = launch_quantize(x, None, is_outlier, columns, values)
    return codes, scales, columns, values.t()
