"""INT8 products on integer matrix units. Twin: `kernels/int8_product.py`.

Both operands are read along K, the only order in which matrix units take INT8. From an operand that
is not contiguous along K the compiler gathers single bytes, in every program and every step of its
loop, and on sm_80 it runs out of registers doing so. Copying such an operand into order once costs
two bytes of traffic per element.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import int8_product as operators
from ..groups import empty_quantized
from .launch import Constants, Launcher
from .numerics import magnitude_bits
from .quantization import finite_codes, scale_of_bits

ALIGNED = 16  # bytes of one asynchronous copy; rows along K must be a multiple of this
# Rows of tiles that run together, so that their common part of `b` stays in the cache.
GROUP: tl.constexpr = tl.constexpr(8)
COPY_TILE = 128
COPY_WARPS = 8


class Tile(NamedTuple):
    """Sizes of one program and its pipeline."""

    rows: int  # of the result
    columns: int  # of the result
    summed: int  # part of K that one `tl.dot` sums
    unrolled: int  # number of `tl.dot` in one step of the loop
    n_warps: int  # of the program
    n_stages: int  # steps of the loop in flight


# Large tiles first. Two products in a step keep the compiler from carrying operands around the loop
# as single bytes, which it would unpack and pack again; sm_90 reads operands from shared memory.
# sm_120 has the instructions of sm_80 for these products, and the shared memory of sm_86.
# INT8 results use the tiles that are as wide as a group.
_AMPERE = (Tile(128, 256, 64, 2, 8, 3), Tile(128, 128, 64, 2, 8, 3), Tile(64, 64, 64, 2, 4, 4))
_HOPPER = (
    Tile(128, 256, 128, 1, 8, 4),
    Tile(128, 128, 128, 1, 8, 4),
    Tile(64, 128, 128, 1, 4, 4),
)
TILES = {(8, 0): _AMPERE, (8, 6): _AMPERE, (8, 9): _AMPERE, (9, 0): _HOPPER, (12, 0): _AMPERE}
OTHER_TILES = _AMPERE  # they need the least shared memory


def tiles_of(device: torch.device) -> tuple[Tile, ...]:
    """Return the tiles that a device can run, large ones first."""
    if device.type != "cuda":  # in the interpreter
        return OTHER_TILES
    return TILES.get(torch.cuda.get_device_capability(device), OTHER_TILES)


def choose_tile(rows: int, columns: int, device: torch.device, width: int | None = None) -> Tile:
    """Return the largest tile of which every multiprocessor gets one, otherwise the smallest.

    Args:
        rows: Rows of the result.
        columns: Columns of the result.
        device: The device that runs the product.
        width: Columns that the tile must have; None: any.
    """
    n_multiprocessors = 1
    if device.type == "cuda":
        n_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = [tile for tile in tiles_of(device) if width in (None, tile.columns)]
    for tile in tiles:
        if triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= n_multiprocessors:
            return tile
    return tiles[-1]


@triton.jit
def tile_of_sums(a_ptr, b_ptr, M, N, K, a_stride, b_stride, TILE: tl.constexpr):
    """Return the exact sums of this program's tile of the result, its rows and first column."""
    TILE_M: tl.constexpr = TILE.rows
    TILE_N: tl.constexpr = TILE.columns
    TILE_K: tl.constexpr = TILE.summed
    UNROLLED: tl.constexpr = TILE.unrolled
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    program = tl.program_id(0)
    first_m = program // (GROUP * tiles_n) * GROUP
    in_group = program % (GROUP * tiles_n)
    group = min(tiles_m - first_m, GROUP)
    m = (first_m + in_group % group) * TILE_M + tl.arange(0, TILE_M)
    first_n = in_group // group * TILE_N
    n = first_n + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    # Rows past the end read the last row again; their results are not stored.
    a_row = tl.minimum(m, M - 1).to(tl.int64) * a_stride
    b_row = tl.minimum(n, N - 1).to(tl.int64) * b_stride
    a_ptrs = a_ptr + a_row[:, None] + k[None, :]
    b_ptrs = b_ptr + b_row[None, :] + k[:, None]

    sums = tl.zeros((TILE_M, TILE_N), tl.int32)
    for start in range(0, K, TILE_K * UNROLLED):
        for part in tl.static_range(UNROLLED):
            left = K - start - part * TILE_K
            a = tl.load(a_ptrs + part * TILE_K, mask=k[None, :] < left, other=0)
            b = tl.load(b_ptrs + part * TILE_K, mask=k[:, None] < left, other=0)
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        a_ptrs += TILE_K * UNROLLED
        b_ptrs += TILE_K * UNROLLED
    return sums, m, first_n


@triton.jit
def scaled(sums, m, n, M, N, a_scales_ptr, b_scales_ptr, bias_ptr):
    """Return the sums as FP32, times their scales, plus the bias; scales and bias may be None."""
    out = sums.to(tl.float32)
    if a_scales_ptr is not None:
        out = out * tl.load(a_scales_ptr + m, mask=m < M, other=0.0)[:, None]
    if b_scales_ptr is not None:
        out = out * tl.load(b_scales_ptr + n, mask=n < N, other=0.0)[None, :]
    if bias_ptr is not None:
        out = out + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def store_tile(out_ptr, out, m, n, M, N):
    index = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _with_overwritten_columns(
    out, m, first_n, M, columns_ptr, values_ptr, row_stride, column_stride,
    N_OVERWRITTEN: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Put given columns into the tile `out`; of a hundred given columns, few are in one tile."""
    n = first_n + tl.arange(0, TILE_N)
    for i in range(N_OVERWRITTEN):
        column = tl.load(columns_ptr + i)
        if (column >= first_n) & (column < first_n + TILE_N):
            index = m.to(tl.int64) * row_stride + i * column_stride
            value = tl.load(values_ptr + index, mask=m < M, other=0.0).to(tl.float32)
            out = tl.where(n[None, :] == column, value[:, None], out)
    return out


@triton.jit(do_not_specialize=["M"])
def _int8_matmul_kernel(
    a_ptr,  # [M, K] int8, contiguous along K
    b_ptr,  # [N, K] int8, contiguous along K: the second operand, transposed
    a_scales_ptr,  # [M] fp32, or None
    b_scales_ptr,  # [N] fp32, or None
    bias_ptr,  # [N] float, or None
    columns_ptr,  # [N_OVERWRITTEN] int64: columns of the result that are given; or None
    values_ptr,  # [M, N_OVERWRITTEN] float with the strides below: values of these columns; or None
    out_ptr,  # [M, N] float, or int8 if the next argument is given; written
    out_scales_ptr,  # [M, cdiv(N, TILE.columns)] fp32, written; or None
    M,
    N,
    K,
    a_stride,
    b_stride,
    values_row,
    values_column,
    N_OVERWRITTEN: tl.constexpr,
    TILE: tl.constexpr,  # as wide as a group of an int8 result
):
    sums, m, first_n = tile_of_sums(a_ptr, b_ptr, M, N, K, a_stride, b_stride, TILE)
    n = first_n + tl.arange(0, TILE.columns)
    out = scaled(sums, m, n, M, N, a_scales_ptr, b_scales_ptr, bias_ptr)
    if N_OVERWRITTEN > 0:
        out = _with_overwritten_columns(
            out, m, first_n, M, columns_ptr, values_ptr, values_row, values_column,
            N_OVERWRITTEN, TILE.columns,
        )  # fmt: skip
    if out_scales_ptr is not None:
        out = tl.where((n < N)[None, :], out, 0.0)
        scale, inverse = scale_of_bits(tl.max(magnitude_bits(out), axis=1))
        index = m.to(tl.int64) * tl.cdiv(N, TILE.columns) + first_n // TILE.columns
        tl.store(out_scales_ptr + index, scale, mask=m < M)
        out = finite_codes(out, inverse[:, None])
    store_tile(out_ptr, out, m, n, M, N)


@triton.jit(do_not_specialize=["n_columns"])
def _copy_kernel(
    x_ptr,  # [n_rows, n_columns] int8 with the strides below
    out_ptr,  # [n_rows, out_columns] int8, written; zeros in the columns beyond those of x
    n_rows,
    n_columns,
    row_stride,
    column_stride,
    out_columns,
    TILE: tl.constexpr,
):
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    exists = row < n_rows
    x = tl.load(
        x_ptr + row * row_stride + column * column_stride,
        mask=exists & (column < n_columns),
        other=0,
    )
    tl.store(out_ptr + row * out_columns + column, x, mask=exists & (column < out_columns))


_launch_copy, _launch_int8_matmul = Launcher(_copy_kernel), Launcher(_int8_matmul_kernel)
_COPY = Constants(TILE=COPY_TILE, num_warps=COPY_WARPS)


@cache
def _constants(tile: Tile, **others: int) -> Constants:
    return Constants(
        **others,
        TILE=tile,
        num_warps=tile.n_warps,
        num_stages=tile.n_stages,
    )


@lru_cache(maxsize=1024)  # one entry per shape: the number of tokens differs between batches
def product_tiles(
    rows: int, columns: int, device: torch.device, *, width: int | None = None, **others: int
) -> tuple[tuple[int], Constants]:
    """Return grid and constants of a product with this shape; `others` are more constants."""
    tile = choose_tile(rows, columns, device, width)
    n_tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return (n_tiles,), _constants(tile, **others)


def along_k(x: Tensor) -> Tensor:
    """Return `x` `[rows, K]` or a zero-padded copy, with contiguous rows of whole 16 bytes."""
    rows, summed = x.shape
    row_stride, column_stride = x.stride()
    misaligned = summed % ALIGNED or row_stride % ALIGNED or x.data_ptr() % ALIGNED
    if column_stride == 1 and not misaligned:
        return x
    out_columns = -(-summed // ALIGNED) * ALIGNED
    out = x.new_empty(rows, out_columns)
    grid = (-(-rows // COPY_TILE), -(-out_columns // COPY_TILE))
    _launch_copy(grid, _COPY, x, out, rows, summed, row_stride, column_stride, out_columns)
    return out


@operators.int8_matmul.register("triton")
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
    out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    _multiply(a, b, (a_scales, b_scales, bias, columns, values), out)
    return out


@operators.requantized_matmul.register("triton")
def requantized_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    *,
    columns: Tensor | None,
    values: Tensor | None,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    if all(tile.columns != group_size for tile in tiles_of(a.device)):
        return operators.requantized_matmul.reference(
            a, b, a_scales, columns=columns, values=values, group_size=group_size
        )
    codes, scales = empty_quantized(a.shape[0], b.shape[1], group_size, a.device)
    _multiply(a, b, (a_scales, None, None, columns, values), codes, scales, width=group_size)
    return codes, scales


def _multiply(
    a: Tensor,
    b: Tensor,
    others: tuple[Tensor | None, ...],
    out: Tensor,
    out_scales: Tensor | None = None,
    *,
    width: int | None = None,
) -> None:
    """Write the product into `out`; with `out_scales`, as INT8 in groups of `width` columns.

    `others` are the kernel's arguments between operands and results; the last are given values.
    """
    rows, n_columns = out.shape
    values = others[-1]
    n_given, *strides = (0, 0, 0) if values is None else (values.shape[1], *values.stride())
    tiles = product_tiles(rows, n_columns, a.device, width=width, N_OVERWRITTEN=n_given)
    a, b = along_k(a), along_k(b.t())
    _launch_int8_matmul(
        *tiles, a, b, *others, out, out_scales,
        rows, n_columns, a.shape[1], a.stride(0), b.stride(0), *strides,
    )  # fmt: skip
