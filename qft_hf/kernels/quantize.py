"""Group-wise absmax INT8 quantization of a matrix, and back."""

from typing import Any

import torch
from torch import Tensor

from ..layout import GroupLayout
from .checks import (
    check_column_mask,
    check_group_size,
    check_matrix,
    check_outliers,
    check_quantized,
    check_row_values,
    check_rows,
)
from .operators import declare

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _fake_quantize(
    x: Tensor, group_size: int | None, zero_columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    layout = GroupLayout(x.shape[0], x.shape[1], group_size)
    scales = x.new_empty((layout.rows, layout.n_groups), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.int8), scales


def _fake_dequantize(
    codes: Tensor, *_: Any, rows: Tensor | None, dtype: torch.dtype, **__: Any
) -> Tensor:
    n_rows = codes.shape[0] if rows is None else rows.shape[0]
    return codes.new_empty((n_rows, codes.shape[1]), dtype=dtype)


def _check_dequantize(codes: Tensor, *_: Any, rows: Tensor | None, **__: Any) -> None:
    if rows is not None:
        check_row_values(rows, codes)


_quantize = declare(
    "quantize",
    "(Tensor x, int? group_size, Tensor? zero_columns) -> (Tensor codes, Tensor scales)",
    fake=_fake_quantize,
)
_dequantize = declare(
    "dequantize",
    "(Tensor codes, Tensor scales, int? group_size, *, Tensor? rows, Tensor? outlier_values, "
    "Tensor? outlier_columns, ScalarType dtype) -> Tensor",
    fake=_fake_dequantize,
    check_values=_check_dequantize,
)


def quantize(
    x: Tensor, *, group_size: int | None, zero_columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize `x` to INT8 with one absmax scale per row and group of columns.

    Rounds to nearest, ties to even. `x` is not modified. A group with a NaN or infinity gets a
    scale that is not finite and codes 0, so that the fault stays visible.

    Args:
        x: `[rows, columns]`, contiguous; fp32, bf16 or fp16. Arithmetic is fp32.
        group_size: Columns per scale; the last group of a row may be short. None: whole rows.
        zero_columns: bool `[columns]`: True where all of a column counts as 0, whatever it holds,
            NaN too, as if it had been filled with 0 before. None: nowhere.

    Returns:
        codes: int8 `[rows, columns]` in [-127, 127].
        scales: fp32 `[rows, n_groups]` in units of `x`: `x ~= codes * scale`, with error at most
            half a scale. At least 1e-30, which is that of a group of zeros.

    Raises:
        TypeError: `x` is not one of the three float dtypes, or `zero_columns` is not bool.
        ValueError: `x` is not a contiguous, non-empty matrix, `group_size` is below 1, or
            `zero_columns` does not fit `x`.

    Source:
        Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.1
        (arXiv:2110.02861). Codes are linear here, dynamic there.
    """
    check_matrix("x", x, FLOATS)
    check_group_size(group_size)
    if zero_columns is not None:
        check_column_mask("zero_columns", zero_columns, x)
    codes, scales = _quantize(x, group_size, zero_columns)
    return codes, scales


def dequantize(
    codes: Tensor,
    scales: Tensor,
    *,
    group_size: int | None,
    rows: Tensor | None = None,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Expand INT8 codes to `codes * scale`, with critical values in their places.

    Args:
        codes: int8 `[rows, columns]`, contiguous.
        scales: fp32 `[rows, n_groups]`.
        group_size: Columns per scale; None: whole rows.
        rows: int32 or int64 `[n]`: the rows to expand, in this order and as often as they come, as
            an embedding does with its ids; None: all of them, once.
        outlier_values: fp32 `[rows, n_outliers]`: the values of some columns; None for none.
        outlier_columns: int16 or int32 `[rows, n_outliers]`: which columns, each at most once.
        dtype: A float type. The product is FP32 and is rounded to nearest once.

    Returns:
        `[rows, columns]`, or `[n, columns]`, of `dtype`.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes do not fit each other or `group_size`.
        IndexError: One of `rows` does not exist, on the CPU. On a GPU that costs no waiting and
            reads nothing it should not: the result has NaN there, which no loss hides.
    """
    check_quantized("x", codes, scales, group_size)
    if not dtype.is_floating_point:
        raise TypeError(f"dequantize makes floats, got dtype={dtype}. The codes are INT8 already.")
    check_outliers(outlier_values, outlier_columns, codes)
    if rows is not None:
        check_rows(rows, codes)
    expanded: Tensor = _dequantize(
        codes,
        scales,
        group_size,
        rows=rows,
        outlier_values=outlier_values,
        outlier_columns=outlier_columns,
        dtype=dtype,
    )
    return expanded
