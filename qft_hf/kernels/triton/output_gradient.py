"""Output gradients as INT8 operands in Triton. Twin: `kernels/output_gradient.py`.

A scale needs a whole row or column, so the gradient is read twice: first for the maxima of rows and
columns, then to round it to both forms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import output_gradient as operators
from ..output_gradient import COLUMNS as _COLUMNS
from ..output_gradient import ROWS as _ROWS
from .launch import Constants, Launcher
from .numerics import QMAX, magnitude_bits, nearest_code, quantized, random_words, weight_uniform
from .quantization import scale_of_bits

ROWS: tl.constexpr = tl.constexpr(_ROWS)
COLUMNS: tl.constexpr = tl.constexpr(_COLUMNS)

TILE = 64  # tokens and outputs: whole memory sectors of codes in both forms, 16 elements per thread
N_WARPS = 8
ALIGNED = 4  # maxima in 16 bytes


@triton.jit
def _load_tile(gradient_ptr, row_start, column_start, N, R, TILE: tl.constexpr):
    """Load a tile of the gradient in fp32; also return the numbers of its rows and columns."""
    n, r = row_start + tl.arange(0, TILE), column_start + tl.arange(0, TILE)
    index = n.to(tl.int64)[:, None] * R + r[None, :]
    mask = (n < N)[:, None] & (r < R)[None, :]
    return tl.load(gradient_ptr + index, mask=mask, other=0.0).to(tl.float32), n, r


@triton.jit(do_not_specialize=["N"])
def _maxima_kernel(
    gradient_ptr,  # [N, R] fp32, bf16 or fp16
    row_factors_ptr,  # [R] fp32, or None
    column_factors_ptr,  # [N] fp32, or None
    row_bits_ptr,  # [N] int32, zeros; raised to the bits of the largest magnitude
    column_bits_ptr,  # [R] int32, likewise
    N,
    R,
    TILE: tl.constexpr,
):
    gradient, n, r = _load_tile(
        gradient_ptr, tl.program_id(1) * TILE, tl.program_id(0) * TILE, N, R, TILE
    )
    # A maximum of integers does not depend on the order of the atomic operations.
    if row_factors_ptr is not None:
        factor = tl.load(row_factors_ptr + r, mask=r < R, other=0.0)
        largest = tl.max(magnitude_bits(gradient * factor[None, :]), axis=1)
        tl.atomic_max(row_bits_ptr + n, largest, mask=n < N)
    if column_factors_ptr is not None:
        factor = tl.load(column_factors_ptr + n, mask=n < N, other=0.0)
        largest = tl.max(magnitude_bits(gradient * factor[:, None]), axis=0)
        tl.atomic_max(column_bits_ptr + r, largest, mask=r < R)


@triton.jit
def _codes(
    values, bits, row, column_start, columns, seed, STREAM: tl.constexpr,
    TILE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Return codes of a tile of a matrix of `columns` columns; `bits` are those of row maxima."""
    _, inverse = scale_of_bits(bits)
    inverse = inverse[:, None]
    values = tl.where(inverse > 0, values, 0.0)  # the inverse is 0 if the row is not finite
    if STOCHASTIC:
        first_counter = (row.to(tl.int64) * ((columns + 3) // 4))[:, None]
        start = tl.zeros((TILE,), tl.int32) + column_start
        stream = tl.full((1, 1), STREAM, tl.int32)
        words = random_words(first_counter, start, TILE, seed, bits[:, None], stream)
        steps = values * inverse
        whole = tl.floor(steps)
        up = (steps - whole) + weight_uniform(words) >= 1.0
        codes = whole + up.to(tl.float32)
        codes = nearest_code(tl.minimum(tl.maximum(codes, -QMAX), QMAX))
    else:
        codes = quantized(values, inverse)
    return codes


@triton.jit(do_not_specialize=["seed"])
def _round_kernel(
    gradient_ptr,  # [N, R] fp32, bf16 or fp16
    row_factors_ptr,  # [R] fp32, or None
    column_factors_ptr,  # [N] fp32, or None
    row_bits_ptr,  # [N] int32: largest magnitudes, as bits
    column_bits_ptr,  # [R] int32, likewise
    row_codes_ptr,  # [N, R] int8, written
    row_scales_ptr,  # [N] fp32, written
    column_codes_ptr,  # [R, N] int8, written
    column_scales_ptr,  # [R] fp32, written
    N,
    R,
    seed,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    row_start, column_start = tl.program_id(1) * TILE, tl.program_id(0) * TILE
    gradient, n, r = _load_tile(gradient_ptr, row_start, column_start, N, R, TILE)
    mask = (n < N)[:, None] & (r < R)[None, :]
    if row_factors_ptr is not None:
        factor = tl.load(row_factors_ptr + r, mask=r < R, other=0.0)
        bits = tl.load(row_bits_ptr + n, mask=n < N, other=0)
        codes = _codes(
            gradient * factor[None, :], bits, n, column_start, R, seed, ROWS, TILE, STOCHASTIC
        )
        tl.store(row_codes_ptr + n.to(tl.int64)[:, None] * R + r[None, :], codes, mask=mask)
        if column_start == 0:
            tl.store(row_scales_ptr + n, scale_of_bits(bits)[0], mask=n < N)
    if column_factors_ptr is not None:
        factor = tl.load(column_factors_ptr + n, mask=n < N, other=0.0)
        bits = tl.load(column_bits_ptr + r, mask=r < R, other=0)
        values = tl.trans(gradient * factor[:, None])
        codes = _codes(values, bits, r, row_start, N, seed, COLUMNS, TILE, STOCHASTIC)
        index = r.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(column_codes_ptr + index, codes, mask=tl.trans(mask))
        if row_start == 0:
            tl.store(column_scales_ptr + r, scale_of_bits(bits)[0], mask=r < R)


_launch_maxima, _launch_round = Launcher(_maxima_kernel), Launcher(_round_kernel)
_MAXIMA = Constants(TILE=TILE, num_warps=N_WARPS)
_ROUND = {
    stochastic: Constants(STOCHASTIC=stochastic, TILE=TILE, num_warps=N_WARPS)
    for stochastic in (False, True)
}


@operators.quantize_gradient.register("triton")
def quantize_gradient(
    gradient: Tensor,
    row_factors: Tensor | None,
    column_factors: Tensor | None,
    *,
    stochastic: bool,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, outputs = gradient.shape
    results = operators.empty_forms(gradient, row_factors, column_factors)
    first_column = -(-tokens // ALIGNED) * ALIGNED
    row_bits = gradient.new_zeros(first_column + outputs, dtype=torch.int32)  # and column bits
    inputs = (gradient, row_factors, column_factors, row_bits, row_bits[first_column:])
    grid = (-(-outputs // TILE), -(-tokens // TILE))
    _launch_maxima(grid, _MAXIMA, *inputs, tokens, outputs)
    _launch_round(grid, _ROUND[stochastic], *inputs, *results, tokens, outputs, seed)
    return results
