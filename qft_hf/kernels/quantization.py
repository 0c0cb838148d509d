"""Group-wise absmax INT8 quantization of a matrix, and back."""

import torch
from torch import Tensor

from .checks import (
    FLOATS,
    check_float_dtype,
    check_group_size,
    check_matrix,
    check_row_values,
    check_rows,
)
from .groups import empty_quantized, expanded, quantized
from .operators import operator
from .values import Weight


@operator(
    fake=lambda x, *, group_size: empty_quantized(x.shape[0], x.shape[1], group_size, x.device)
)
def quantize(x: Tensor, *, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Quantize `x` to INT8 with one absmax scale per row and group of columns.

    Rounds to nearest, ties to even. `x` is not modified. A group with a NaN or infinity gets a
    scale that is not finite and codes 0, so that the fault stays visible.

    Args:
        x: `[rows, columns]`, contiguous; fp32, bf16 or fp16. Arithmetic is fp32.
        group_size: Columns per scale; the last group of a row may be short. None: whole rows.

    Returns:
        codes: int8 `[rows, columns]` in [-127, 127].
        scales: fp32 `[rows, n_groups]` in units of `x`: `x ~= codes * scale`, with an error of at
            most half a scale. At least 1e-30, the scale of a group of zeros.

    Raises:
        TypeError: `x` is not one of the three float dtypes.
        ValueError: `x` is not a contiguous, non-empty matrix, or `group_size` is below 1.

    Source:
        Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.1
        (arXiv:2110.02861), where codes are dynamic; here they are linear.
    """
    return quantized(x.float(), group_size)


@quantize.checks
def _(x: Tensor, *, group_size: int | None) -> None:
    check_matrix("x", x, FLOATS)
    check_group_size(group_size)


def _fake_dequantize(
    weight: Weight, *, rows: Tensor | None, n_each: int, dtype: torch.dtype
) -> Tensor:
    n_rows = weight.codes.shape[0] if rows is None else n_each * rows.shape[0]
    return weight.codes.new_empty((n_rows, weight.codes.shape[1]), dtype=dtype)


@operator(fake=_fake_dequantize)
def dequantize(
    weight: Weight,
    *,
    rows: Tensor | None = None,
    n_each: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Expand INT8 codes to `codes * scale`, with outliers in their places.

    Args:
        weight: The weight; `Weight.dense` makes one from a matrix without outliers.
        rows: int32 or int64 `[n]`: the rows to expand, in this order and with repetitions, such as
            the ids of an embedding. None: each row once.
        n_each: How many rows each of these numbers stands for, such as the rows of an expert:
            number e stands for `n_each` rows from `e * n_each` on. Divides the rows of the weight.
        dtype: A float type. The product is FP32 and is rounded to nearest once.

    Returns:
        `[rows, columns]`, or `[n * n_each, columns]`, of `dtype`.

    Raises:
        TypeError: `dtype` is not a float type, or `rows` are neither int32 nor int64.
        ValueError: `rows` is not contiguous, of shape `[n]` and on the device of the weight, or
            `n_each` does not divide the rows.
        IndexError: On the CPU only: one of `rows` does not exist. On a GPU the result has NaN in
            that row, which the loss shows; the host does not wait, and no other memory is read.
    """
    codes, scales, outlier_values, outlier_columns = weight.tensors
    if rows is not None:
        rows = each_row(rows, n_each)
        exists = (rows >= 0) & (rows < codes.shape[0])
        rows = torch.where(exists, rows, 0)
        codes, scales, outlier_values, outlier_columns = (t[rows] for t in weight.tensors)
    values = expanded(codes, scales, weight.group_size)
    values.scatter_(1, outlier_columns.long(), outlier_values)
    if rows is not None:
        values.masked_fill_(~exists[:, None], float("nan"))
    return values.to(dtype)


def each_row(numbers: Tensor, n_each: int) -> Tensor:
    """Return all rows of the runs of `n_each` rows with these numbers: int64."""
    numbers = numbers.long()
    if n_each == 1:
        return numbers
    return (numbers[:, None] * n_each + torch.arange(n_each, device=numbers.device)).flatten()


@dequantize.checks
def _(weight: Weight, *, rows: Tensor | None, n_each: int, dtype: torch.dtype) -> None:
    check_float_dtype("dequantize", dtype)
    if rows is not None:
        check_rows(rows, weight.codes)
    if n_each < 1 or weight.codes.shape[0] % n_each:
        raise ValueError(
            f"n_each must divide the {weight.codes.shape[0]} rows of the weight, got {n_each}: it "
            "is how many rows each of the row numbers stands for."
        )


@dequantize.checks_values
def _(weight: Weight, *, rows: Tensor | None, n_each: int, dtype: torch.dtype) -> None:
    if rows is not None:
        check_row_values(rows, weight.codes.shape[0] // n_each)
