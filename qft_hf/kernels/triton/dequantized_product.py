"""Products with an INT8 weight in Triton. Twin: `kernels/dequantized_product.py`.

A program computes some rows of the weight for a few tokens in a loop over the columns. Each thread
reads 16 bytes of codes at a time and expands them in registers. Several BF16 or FP16 tokens are
padded to the 16 that matrix units take and multiplied on those, with FP32 sums. A single token, and
FP32, for which there are no matrix units, are multiplied and summed by ordinary instructions.

Such a product is bound by memory: enough of the weight must be in flight at a time. Matrix units
take 16 rows, so a matrix of 4,096 rows makes 256 programs, two per multiprocessor of an H100. Each
warp of a program therefore has columns of its own, a part, and the parts are added at the end.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dequantized_product as operators
from ..values import Weight
from .launch import Constants, Launcher
from .tiling import WIDE_UNIT

MATRIX_TOKENS = 16  # of one program on matrix units: the fewest that these take
FP32_TOKENS = 4  # of one program without them: each takes as many registers as the weight


@triton.jit
def _expanded(
    codes_ptr, scales_ptr, row, start,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, N_GROUPS: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """FP32 values `[PARTS, ROWS, TILE]` of columns from `start`; `UNIT` columns share a scale."""
    first = start + tl.arange(0, PARTS)[:, None, None] * TILE
    column = first + tl.arange(0, TILE)[None, None, :]
    index = row[None, :, None] * COLUMNS + column
    code = tl.load(codes_ptr + index, mask=column < COLUMNS, other=0)
    column = first + tl.arange(0, TILE // UNIT)[None, None, :] * UNIT
    index = row[None, :, None] * N_GROUPS + column // GROUP
    scale = tl.load(scales_ptr + index, mask=column < COLUMNS, other=0.0)
    units = tl.reshape(code.to(tl.float32), (PARTS, ROWS, TILE // UNIT, UNIT))
    return tl.reshape(units * scale[:, :, :, None], (PARTS, ROWS, TILE))


@triton.jit
def _add_token(totals, products, t):
    """Add the row sums of `products` to column `t` of `totals` `[ROWS, TOKENS]`."""
    is_token = tl.arange(0, totals.shape[1]) == t
    return totals + tl.where(is_token[None, :], tl.sum(products, axis=1)[:, None], 0.0)


@triton.jit(do_not_specialize=["n_tokens", "n_rows"])
def _dequantized_matmul_kernel(
    x_ptr,  # [n_tokens, COLUMNS] fp32, bf16 or fp16
    turned_ptr,  # [COLUMNS, n_tokens]: x transposed, so the tokens of one column are contiguous
    codes_ptr,  # [n_rows, COLUMNS] int8
    scales_ptr,  # [n_rows, N_GROUPS] fp32
    outlier_values_ptr,  # [n_rows, N_OUTLIERS] fp32
    outlier_columns_ptr,  # [n_rows, N_OUTLIERS] int16 or int32
    bias_ptr,  # [n_rows] float, or None
    y_ptr,  # [n_tokens, n_rows] of the dtype of x, written
    n_tokens,
    n_rows,
    N_OUTLIERS: tl.constexpr,
    OUTLIER_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,  # tokens of one program, a power of two
    ON_MATRIX_UNITS: tl.constexpr,
    PARTS: tl.constexpr,  # of one step along the columns, one per warp; 1 without matrix units
    TILE: tl.constexpr,  # columns of a part
    UNIT: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Programs of the same rows run together, so all but one read codes from the cache. All are on
    # the first axis of the grid: the others are limited to 65,535, and vocabularies are longer.
    token_tiles = tl.cdiv(n_tokens, TOKENS)
    first_token = tl.program_id(0) % token_tiles * TOKENS
    token = first_token + tl.arange(0, TOKENS)
    token_exists = token < n_tokens
    row = tl.program_id(0) // token_tiles * ROWS + tl.arange(0, ROWS)
    # Rows past the end read the last row again; their results are not stored.
    here = tl.minimum(row, n_rows - 1).to(tl.int64)
    x_ptr += first_token.to(tl.int64) * COLUMNS
    left = n_tokens - first_token

    parts = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)
    totals = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, COLUMNS, PARTS * TILE):
        weight = _expanded(
            codes_ptr, scales_ptr, here, start, COLUMNS, GROUP, N_GROUPS, ROWS, PARTS, TILE, UNIT
        ).to(dtype)
        if ON_MATRIX_UNITS:
            column = start + tl.arange(0, PARTS)[:, None] * TILE + tl.arange(0, TILE)[None, :]
            x = tl.load(
                x_ptr + tl.arange(0, TOKENS)[None, None, :] * COLUMNS + column[:, :, None],
                mask=(column < COLUMNS)[:, :, None] & token_exists[None, None, :],
                other=0.0,
            )
            parts = tl.dot(weight, x, parts)
        else:
            column = start + tl.arange(0, TILE)
            weight = tl.reshape(weight, (ROWS, TILE))
            for t in tl.static_range(TOKENS):
                mask = column < tl.where(t < left, COLUMNS, 0)
                x = tl.load(x_ptr + t * COLUMNS + column, mask=mask, other=0.0)
                products = weight.to(tl.float32) * x.to(tl.float32)[None, :]
                totals = _add_token(totals, products, t)
    totals += tl.sum(parts, axis=0)

    for tile in range((N_OUTLIERS + OUTLIER_TILE - 1) // OUTLIER_TILE):
        k = tile * OUTLIER_TILE + tl.arange(0, OUTLIER_TILE)[:, None]
        place = here[None, :] * N_OUTLIERS + k
        column = tl.load(outlier_columns_ptr + place, mask=k < N_OUTLIERS, other=0).to(tl.int32)
        value = tl.load(outlier_values_ptr + place, mask=k < N_OUTLIERS, other=0.0)
        value = value.to(dtype).to(tl.float32)
        x = tl.load(
            turned_ptr + column[:, :, None] * n_tokens + token[None, None, :],
            mask=(k < N_OUTLIERS)[:, :, None] & token_exists[None, None, :],
            other=0.0,
        )
        totals += tl.sum(value[:, :, None] * x.to(tl.float32), axis=0)

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + here).to(dtype).to(tl.float32)
        totals += bias[:, None]
    place = token.to(tl.int64)[None, :] * n_rows + row[:, None]
    tl.store(y_ptr + place, totals.to(dtype), mask=token_exists[None, :] & (row < n_rows)[:, None])


@cache
def _constants(
    n_tokens: int, columns: int, group_size: int | None, n_outliers: int, dtype: torch.dtype
) -> tuple[int, int, Constants]:
    """Tokens and rows of a program, and its constants."""
    group = min(group_size or columns, columns)
    # Aligned runs of `unit` columns share a scale: a row, or a power of two that divides groups.
    unit = columns if group == columns else group & -group
    on_matrix_units = dtype != torch.float32 and n_tokens > 1
    if on_matrix_units:
        tokens, rows, outliers = MATRIX_TOKENS, 16, 16
        tile = 128 if unit >= WIDE_UNIT else 64  # short units need more registers for scales
    else:
        tokens = min(FP32_TOKENS, triton.next_power_of_2(n_tokens))
        rows, outliers = 4, 64
        tile = 1024
    tile = min(tile, max(16, triton.next_power_of_2(columns)))
    n_warps = 4
    if on_matrix_units:
        n_warps = min(n_warps, triton.next_power_of_2(triton.cdiv(columns, tile)))
    constants = Constants(
        N_OUTLIERS=n_outliers,
        OUTLIER_TILE=min(outliers, triton.next_power_of_2(max(1, n_outliers))),
        COLUMNS=columns,
        GROUP=group,
        N_GROUPS=triton.cdiv(columns, group),
        ROWS=rows,
        TOKENS=tokens,
        ON_MATRIX_UNITS=on_matrix_units,
        PARTS=n_warps if on_matrix_units else 1,
        TILE=tile,
        UNIT=tile if group == columns else min(tile, unit),
        num_warps=n_warps,
    )
    return tokens, rows, constants


_launch_dequantized_matmul = Launcher(_dequantized_matmul_kernel)


@operators.dequantized_matmul.register("triton")
def dequantized_matmul(x: Tensor, weight: Weight, *, bias: Tensor | None) -> Tensor:
    n_tokens, columns = x.shape
    rows, n_outliers = weight.outlier_values.shape
    of_tokens, of_rows, constants = _constants(
        n_tokens, columns, weight.group_size, n_outliers, x.dtype
    )
    y = x.new_empty(n_tokens, rows)
    grid = (-(-rows // of_rows) * -(-n_tokens // of_tokens),)
    turned = x.t().contiguous() if n_outliers and n_tokens > 1 else x
    _launch_dequantized_matmul(
        grid, constants, x, turned, *weight.tensors, bias, y, n_tokens, rows
    )  # fmt: skip
    return y
