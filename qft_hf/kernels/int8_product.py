"""Product of two INT8 matrices, accumulated exactly, with their scales applied to the result."""

import torch
from torch import Tensor

from .checks import (
    check_bias,
    check_codes,
    check_float_dtype,
    check_given_column_values,
    check_given_columns,
    check_group_size,
    check_scales,
)
from .groups import empty_quantized
from .operators import operator
from .quantization import quantize

# 2**17 products of two codes in [-127, 127] fit a signed 32-bit sum; a longer one is split.
MAX_SUMMED = 2**17


@operator(fake=lambda a, b, *_, dtype, **__: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype))
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

    A factor or term that is None is left out, and `out` is rounded to `dtype` once. If K is above
    131,072, parts of that length are summed and scaled this way, and then added in order in FP32.

    With the codes of `quantize(x, group_size=None)` and `quantize_gradient` the three products of
    a linear layer, `x` `[N, C]` and `w` `[R, C]`, are

        y = int8_matmul(x_codes, w_codes.t(), x_scales, w_scales)
        grad_x = int8_matmul(row_codes, w_codes, row_scales, None)
        grad_w = int8_matmul(column_codes, x_codes, column_scales, None)

    Integer matrix units of GPUs need both operands contiguous along K, with rows of a multiple of
    16 bytes. Any other operand is copied first: `w_codes` and `x_codes` in the last two lines. The
    copy moves two bytes per element, and holds one while the product runs. A caller that multiplies
    by one matrix several times can transpose it once, and pass `transposed.t()`.

    Args:
        a: int8 `[M, K]`, codes in [-127, 127]; contiguous or transposed, or a slice of rows or
            columns of such a matrix: one stride must be 1.
        b: int8 `[K, N]`, likewise.
        a_scales: fp32 `[M, 1]`, as `quantize` returns them, or None.
        b_scales: fp32 `[N, 1]`, or None.
        bias: Float `[N]`, or None.
        columns: int64 `[k]`, each at most once: columns of the result that are taken from `values`
            instead of the product; or None.
        values: Float `[M, k]`, the contents of those columns; or None.
        dtype: A float type.

    Returns:
        `[M, N]` of `dtype`, contiguous. Zeros, or the bias, if K is 0.

    Raises:
        TypeError: Codes are not int8, or `dtype` is not a float type.
        ValueError: Shapes, strides or devices do not fit.
        IndexError: On the CPU only: one of `columns` does not exist.

    Source:
        Dettmers et al. 2022, "LLM.int8()", section 3.1, vector-wise quantization
        (arXiv:2208.07339).
    """
    if fits_one_int32_sum(a, b):
        # Sums of products of codes are integers below 2**53: FP64 holds them exactly in any order.
        # Adding 0 makes -0, which a sum of zeros may be in FP64, the 0 of an integer.
        out = (a.double() @ b.double()).float().add_(0.0)
        if a_scales is not None:
            out.mul_(a_scales)
        if b_scales is not None:
            out.mul_(b_scales.t())
    else:
        out = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
        if out.numel():
            for start in range(0, a.shape[1], MAX_SUMMED):
                part = slice(start, start + MAX_SUMMED)
                out += int8_matmul(a[:, part], b[part], a_scales, b_scales, dtype=torch.float32)
    if bias is not None:
        out.add_(bias.float())
    if columns is not None and values is not None:
        out.index_copy_(1, columns, values.float())
    return out.to(dtype)


@int8_matmul.supported_by_backends
def fits_one_int32_sum(a: Tensor, b: Tensor, *_: object, **__: object) -> bool:
    """Whether the product is not empty and a 32-bit sum can hold each of its elements."""
    rows, summed = a.shape
    return 0 < summed <= MAX_SUMMED and rows > 0 and b.shape[1] > 0


@int8_matmul.checks
def _(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    *,
    bias: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
    dtype: torch.dtype,
) -> None:
    _check_operands(a, b, a_scales, columns, values)
    check_float_dtype("int8_matmul", dtype)
    if b_scales is not None:
        check_scales("b_scales", b_scales, (b.shape[1], 1), a.device)
    check_bias(bias, b.shape[1], a.device)


@operator(
    fake=lambda a, b, *_, group_size, **__: empty_quantized(
        a.shape[0], b.shape[1], group_size, a.device
    ),
    composed=True,
)
def requantized_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    *,
    columns: Tensor | None = None,
    values: Tensor | None = None,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """`quantize(int8_matmul(a, b, a_scales, None, ...), group_size=group_size)`: the same bits.

    On a CPU the whole float product is never in memory.

    Args:
        a: int8 `[M, K]`, as `int8_matmul` takes it.
        b: int8 `[K, N]`, likewise.
        a_scales: fp32 `[M, 1]`, or None.
        columns: int64 `[k]`: columns taken from `values`, as in `int8_matmul`; or None.
        values: Float `[M, k]`, or None.
        group_size: Columns per scale of the result.

    Returns:
        codes: int8 `[M, N]` in [-127, 127].
        scales: fp32 `[M, n_groups]`, as `quantize` returns them.

    Raises:
        TypeError: Codes are not int8.
        ValueError: Shapes, strides or devices do not fit.
        IndexError: On the CPU only: one of `columns` does not exist.
    """
    product = int8_matmul(a, b, a_scales, None, columns=columns, values=values, dtype=torch.float32)
    return quantize(product, group_size=group_size)


requantized_matmul.supported_by_backends(fits_one_int32_sum)


@requantized_matmul.checks
def _(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    *,
    columns: Tensor | None,
    values: Tensor | None,
    group_size: int,
) -> None:
    _check_operands(a, b, a_scales, columns, values)
    check_group_size(group_size)


@int8_matmul.checks_values
@requantized_matmul.checks_values
def _(a: Tensor, b: Tensor, *_: Tensor | None, columns: Tensor | None, **__: object) -> None:
    check_given_column_values(columns, b.shape[1])


def _check_operands(
    a: Tensor, b: Tensor, a_scales: Tensor | None, columns: Tensor | None, values: Tensor | None
) -> None:
    """Raise unless `a` and `b` can be multiplied, and the scales and given columns fit them."""
    check_codes("a", a)
    check_codes("b", b)
    if a.shape[1] != b.shape[0] or a.device != b.device:
        raise ValueError(
            f"An INT8 product multiplies [M, K] by [K, N] on one device, got {tuple(a.shape)} on "
            f"{a.device} and {tuple(b.shape)} on {b.device}. Pass .t() of a matrix stored the "
            "other way round."
        )
    if a_scales is not None:
        check_scales("a_scales", a_scales, (a.shape[0], 1), a.device)
    check_given_columns(columns, values, a.shape[0], a.device)
