"""Output of a linear layer in Triton: one kernel adds the float columns to the integer product.

Twin: `kernels/layer_output.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layer_output as operators
from ..values import Input, Weight
from .int8_product import along_k, product_tiles, scaled, store_tile, tile_of_sums
from .launch import Launcher, Plan

OUTLIER_TILE = 16  # float columns in one product on matrix units


@triton.jit
def _add_products(out, left, right, DTYPE: tl.constexpr):
    """Return `out + left @ right`, with factors rounded to `DTYPE` and sums in FP32."""
    return tl.dot(left.to(DTYPE), right.to(DTYPE), out)


@triton.jit
def _add_product(out, left, right):
    """Return `out` plus an outer product of FP32 factors, which matrix units round to TF32."""
    return out + left.to(tl.float32)[:, None] * right[None, :]


@triton.jit(do_not_specialize=["M"])
def _int8_linear_kernel(
    b_ptr,  # [N, K] int8, contiguous along K: the weight's codes
    b_scales_ptr,  # [N] fp32
    b_values_ptr,  # [N, N_OF_B] fp32: outliers of the weight
    b_columns_ptr,  # [N_OF_B] int16 or int32: their columns, the same in every row
    bias_ptr,  # [N] float, or None
    a_ptr,  # [M, K] int8, contiguous along K: codes of the input
    a_scales_ptr,  # [M] fp32
    floats_ptr,  # [M, C] float: the input itself
    a_columns_ptr,  # [N_OF_A] int64: its outlier columns
    a_values_ptr,  # [N_OF_A, M] float: the values of these columns
    out_ptr,  # [M, N] float, written
    M,
    N,
    K,
    C,
    a_stride,
    b_stride,
    N_OF_A: tl.constexpr,
    N_OF_B: tl.constexpr,
    OUTLIER_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    sums, m, first_n = tile_of_sums(a_ptr, b_ptr, M, N, K, a_stride, b_stride, TILE)
    n = first_n + tl.arange(0, TILE.columns)
    out = scaled(sums, m, n, M, N, a_scales_ptr, b_scales_ptr, bias_ptr)
    row = tl.minimum(m, M - 1).to(tl.int64)
    b_row = tl.minimum(n, N - 1).to(tl.int64)
    b_scale = tl.load(b_scales_ptr + b_row)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if dtype == tl.float32:
        for i in range(N_OF_B):
            column = tl.load(b_columns_ptr + i).to(tl.int64)
            left = tl.load(floats_ptr + row * C + column)
            out = _add_product(out, left, tl.load(b_values_ptr + b_row * N_OF_B + i))
        for i in range(N_OF_A):
            left = tl.load(a_values_ptr + row)
            a_values_ptr += M
            code = tl.load(b_ptr + b_row * b_stride + tl.load(a_columns_ptr + i))
            out = _add_product(out, left, code.to(tl.float32) * b_scale)
    else:
        for start in range(0, N_OF_B, OUTLIER_TILE):
            i = start + tl.arange(0, OUTLIER_TILE)
            exists = i < N_OF_B
            column = tl.load(b_columns_ptr + i, mask=exists, other=0).to(tl.int64)
            index = (row * C)[:, None] + column[None, :]
            left = tl.load(floats_ptr + index, mask=exists[None, :], other=0.0)
            index = (b_row * N_OF_B)[None, :] + i[:, None]
            right = tl.load(b_values_ptr + index, mask=exists[:, None], other=0.0)
            out = _add_products(out, left, right, dtype)
        for start in range(0, N_OF_A, OUTLIER_TILE):
            i = start + tl.arange(0, OUTLIER_TILE)
            exists = i < N_OF_A
            index = row[:, None] + (i.to(tl.int64) * M)[None, :]
            left = tl.load(a_values_ptr + index, mask=exists[None, :], other=0.0)
            column = tl.load(a_columns_ptr + i, mask=exists, other=0)
            index = (b_row * b_stride)[None, :] + column[:, None]
            code = tl.load(b_ptr + index, mask=exists[:, None], other=0)
            out = _add_products(out, left, code.to(tl.float32) * b_scale[None, :], dtype)
    store_tile(out_ptr, out, m, n, M, N)


_launch_int8_linear = Launcher(_int8_linear_kernel)


@operators.int8_linear.register("triton")
def int8_linear(
    x: Input, floats: Tensor, weight: Weight, *, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    codes = x.codes
    n_tokens, columns = codes.shape
    rows = weight.codes.shape[0]
    out = codes.new_empty(n_tokens, rows, dtype=dtype)
    a = along_k(codes)
    n_of_a = x.columns.shape[0]
    key = n_tokens, n_of_a, a.stride(0)
    made_for, plan = weight.plans.get(("int8 linear", dtype), (None, None))
    if made_for != key:
        b = along_k(weight.codes)
        n_of_b = weight.outlier_values.shape[1]
        grid, constants = product_tiles(
            n_tokens, rows, codes.device, N_OF_A=n_of_a, N_OF_B=n_of_b, OUTLIER_TILE=OUTLIER_TILE
        )
        plan = Plan(
            _launch_int8_linear, grid, constants,
            b, weight.scales, weight.outlier_values, weight.outlier_columns,
            *[...] * 7, n_tokens, rows, columns, columns, a.stride(0), b.stride(0),
        )  # fmt: skip
        if b is weight.codes:  # not a copy, which would keep the codes of this step
            weight.plans["int8 linear", dtype] = key, plan
    plan(bias, a, x.scales, floats, x.columns, x.values, out)
    return out
