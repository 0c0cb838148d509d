"""Product of two INT8 matrices, accumulated exactly, with their scales applied to the result."""

from typing import Any

import torch
from torch import Tensor

from .checks import (
    check_bias,
    check_codes,
    check_given_column_values,
    check_given_columns,
    check_row_scales,
)
from .operators import declare

# 2**17 products of two codes in [-127, 127] fit a signed 32-bit sum; a longer sum goes in parts.
MAX_SUMMED = 2**17


def check_values(a: Tensor, b: Tensor, *_: Any, columns: Tensor | None, **__: Any) -> None:
    """Raise unless each of `columns` is a column of the result. Reads values."""
    check_given_column_values(columns, b.shape[1])


_int8_matmul = declare(
    "int8_matmul",
    "(Tensor a, Tensor b, Tensor? a_scales, Tensor? b_scales, *, Tensor? bias, Tensor? columns, "
    "Tensor? values, ScalarType dtype) -> Tensor",
    fake=lambda a, b, *_, dtype, **__: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype),
    check_values=check_values,
)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    *,
    bias: Tensor | None = None,
    columns: Tensor | None = None,
    values: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`a @ b` of INT8 codes, times one scale per row of `a` and one per column of `b`.

    The sum over K is an exact integer. The rest is FP32 and in this order, so that all backends
    return the same bits:

        out = ((float(sum) * a_scales) * b_scales) + bias

    where a missing factor or term is left out, and `out` is rounded to `dtype` once. A K above
    131,072 is summed in parts of that length, each scaled so, and the parts are added in FP32 in
    order.

    With the codes of `quantize(x, group_size=None)` and `quantize_gradient` the three products of
    a linear layer, `x` `[N, C]` and `w` `[R, C]`, are

        y = int8_matmul(x_codes, w_codes.t(), x_scales, w_scales)
        grad_x = int8_matmul(row_codes, w_codes, row_scales, None)
        grad_w = int8_matmul(column_codes, x_codes, column_scales, None)

    Integer matrix units of GPUs want both operands contiguous along K, and rows of whole 16 bytes.
    An operand that is not is copied first: `w_codes` and `x_codes` in the last two lines. That
    moves two bytes for each of its elements and keeps one while the product runs. Who multiplies
    by one matrix several times can turn it once, and pass `turned.t()`.

    Args:
        a: int8 `[M, K]`, codes in [-127, 127]; contiguous or transposed, or rows or columns of
            such a matrix: one stride must be 1.
        b: int8 `[K, N]`, likewise.
        a_scales: fp32 `[M, 1]`, as `quantize` returns them, or None.
        b_scales: fp32 `[N, 1]`, or None.
        bias: Float `[N]`, or None.
        columns: int64 `[k]`, each at most once: columns of the result that are not products and
            that `values` gives; or None.
        values: Float `[M, k]`, what those columns hold; or None.
        dtype: A float type.

    Returns:
        `[M, N]` of `dtype`, contiguous. Zeros, or the bias, where K is 0.

    Raises:
        TypeError: Codes are not int8, or `dtype` is not a float type.
        ValueError: Shapes, strides or devices do not fit.
        IndexError: One of `columns` does not exist, on the CPU.

    Source:
        Dettmers et al. 2022, "LLM.int8()", section 3.1, vector-wise quantization
        (arXiv:2208.07339).
    """
    check_operands(a, b)
    if not dtype.is_floating_point:
        raise TypeError(f"int8_matmul makes floats, got dtype={dtype}.")
    rows, summed = a.shape
    n_columns = b.shape[1]
    if a_scales is not None:
        check_row_scales("a_scales", a_scales, rows, a.device)
    if b_scales is not None:
        check_row_scales("b_scales", b_scales, n_columns, a.device)
    check_bias(bias, n_columns, a.device)
    check_given_columns(columns, values, rows, a.device)

    out: Tensor
    if a.numel() and b.numel() and summed <= MAX_SUMMED:
        out = _int8_matmul(
            a, b, a_scales, b_scales, bias=bias, columns=columns, values=values, dtype=dtype
        )
        return out
    out = a.new_zeros((rows, n_columns), dtype=torch.float32)
    if out.numel():
        for start in range(0, summed, MAX_SUMMED):
            part = slice(start, start + MAX_SUMMED)
            out += _int8_matmul(
                a[:, part],
                b[part],
                a_scales,
                b_scales,
                bias=None,
                columns=None,
                values=None,
                dtype=torch.float32,
            )
    if bias is not None:
        out += bias
    if columns is not None and values is not None:
        out.index_copy_(1, columns, values.float())
    return out.to(dtype)


def check_operands(a: Tensor, b: Tensor) -> None:
    """Raise unless `a` and `b` are codes that can be multiplied."""
    check_codes("a", a)
    check_codes("b", b)
    if a.shape[1] != b.shape[0] or a.device != b.device:
        raise ValueError(
            f"An INT8 product multiplies [M, K] by [K, N] on one device, got {tuple(a.shape)} on "
            f"{a.device} and {tuple(b.shape)} on {b.device}. Pass .t() of a matrix stored the "
            "other way round."
        )
