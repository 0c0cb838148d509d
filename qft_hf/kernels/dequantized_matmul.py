"""Product of a few tokens with an INT8 weight that is expanded on the way, never in memory."""

from typing import Any

from torch import Tensor

from .checks import (
    check_bias,
    check_column_values,
    check_matrix,
    check_outliers,
    check_quantized,
)
from .operators import declare
from .quantize import FLOATS


def _check_values(
    x: Tensor, codes: Tensor, *_: Any, outlier_columns: Tensor | None, **__: Any
) -> None:
    if outlier_columns is not None:
        check_column_values(outlier_columns, codes)


_dequantized_matmul = declare(
    "dequantized_matmul",
    "(Tensor x, Tensor codes, Tensor scales, int? group_size, *, Tensor? outlier_values, "
    "Tensor? outlier_columns, Tensor? bias) -> Tensor",
    fake=lambda x, codes, *_, **__: x.new_empty((x.shape[0], codes.shape[0])),
    check_values=_check_values,
)


def dequantized_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    group_size: int | None,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`x W^T + bias` with the weight that `dequantize(codes, ..., dtype=x.dtype)` returns.

    For few tokens the product takes the time of reading the weight: here one byte per element,
    where expanding first writes and reads two or four more. With many tokens the expansion is
    repeated for every few of them, and `dequantize` with a float product is faster.

    The one operator whose backends do not return the same bits: a sum of floats depends on its
    order, and each backend sums in the order that suits its device. What is summed is the same
    everywhere: elements of `W` and `bias` are rounded to the dtype of `x`, sums are FP32, and the
    result is rounded to that dtype once. So it is off by at most `(columns + outliers + 1) *
    2**-24` times the sum of the magnitudes of its terms and that rounding, and has the same bits
    wherever FP32 holds all partial sums exactly.

    Args:
        x: `[tokens, columns]`, contiguous; fp32, bf16 or fp16.
        codes: int8 `[rows, columns]`, contiguous; 0 under critical values.
        scales: fp32 `[rows, n_groups]`.
        group_size: Columns per scale; None: whole rows.
        outlier_values: fp32 `[rows, n_outliers]`: the values of some columns; None for none.
        outlier_columns: int16 or int32 `[rows, n_outliers]`: which columns, each at most once.
        bias: Float `[rows]`, or None.

    Returns:
        `[tokens, rows]` of the dtype of `x`.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes or devices do not fit, or, found on the CPU only, an outlier column does
            not exist.
    """
    check_quantized("weight", codes, scales, group_size)
    check_matrix("x", x, FLOATS)
    if x.shape[1] != codes.shape[1] or x.device != codes.device:
        raise ValueError(
            f"dequantized_matmul multiplies x [tokens, columns] by codes [rows, columns] on one "
            f"device, got {tuple(x.shape)} on {x.device} and {tuple(codes.shape)} on "
            f"{codes.device}."
        )
    check_outliers(outlier_values, outlier_columns, codes)
    check_bias(bias, codes.shape[0], codes.device)
    y: Tensor = _dequantized_matmul(
        x,
        codes,
        scales,
        group_size,
        outlier_values=outlier_values,
        outlier_columns=outlier_columns,
        bias=bias,
    )
    return y
