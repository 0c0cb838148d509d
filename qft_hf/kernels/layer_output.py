"""Output of a linear layer by an INT8 product, with outlier columns of both sides beside it."""

import torch
from torch import Tensor

from .checks import check_bias, check_codes, check_float_dtype, check_row_scales
from .int8_product import MAX_SUMMED, int8_matmul
from .layer_input import take_columns
from .operators import operator
from .values import Input, Weight


def _fake(
    x: Input, floats: Tensor, weight: Weight, *, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.codes.new_empty((x.codes.shape[0], weight.codes.shape[0]), dtype=dtype)


@operator(fake=_fake, composed=True)
def int8_linear(
    x: Input, floats: Tensor, weight: Weight, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """`x W^T + b` where `x` and `W` are INT8 but for outlier columns, which are float products.

    Outlier columns of `W` `[R, C]` meet all of `x` `[N, C]`, and those of `x` the codes of `W`:

        y = int8_matmul(x.codes, W.codes^T, x.scales, W.scales, bias)
            + sum_j floats[:, c_j] W.outlier_values[:, j]
            + sum_i x.values[:, i] (W.codes[:, x.columns_i] * W.scales)

    The factors of both sums are rounded to `dtype`. These sums of k = j + i terms have no order, so
    backends agree to a bound only. With T the sum of the magnitudes of the integer sum times its
    scales, of the bias and of the k products, and u half the distance from 1 to the next number of
    `dtype`, the result is off by at most

        (k + 3) 2**-23 T + 2 u T

    of the sum of exact products of the rounded factors: each term passes through at most k + 3
    roundings of FP32 (its own, those of the scales, and one for each sum that it is part of), and a
    backend may round to `dtype` before the products are added and once more after it.

    Args:
        x: The quantized input; its codes are 0 in its columns.
        floats: `[N, C]`, contiguous: what was quantized.
        weight: `[R, C]`, with one scale per row, and outliers in the same columns of every row.
        bias: Float `[R]`, or None.
        dtype: A float type.

    Returns:
        `[N, R]` of `dtype`, contiguous.

    Raises:
        TypeError: Codes are not int8, or `dtype` is not a float type.
        ValueError: Shapes or devices do not fit.

    Source:
        Dettmers et al. 2022, "LLM.int8()", section 3.2, mixed-precision decomposition
        (arXiv:2208.07339).
    """
    y = int8_matmul(x.codes, weight.codes.t(), x.scales, weight.scales, bias=bias, dtype=dtype)
    columns = weight.shared_columns
    if len(columns) + len(x.columns):
        both = torch.cat((take_columns(floats, columns), x.values), dim=1)
        coded = take_columns(weight.codes, x.columns) * weight.scales
        factors = torch.cat((weight.outlier_values, coded), dim=1)
        y.addmm_(both.to(dtype), factors.to(dtype).t())
    return y


@int8_linear.backends_take
def _(x: Input, floats: Tensor, weight: Weight, **_: object) -> bool:
    return x.codes.shape[1] <= MAX_SUMMED and x.codes.numel() > 0


@int8_linear.checks
def _(x: Input, floats: Tensor, weight: Weight, *, bias: Tensor | None, dtype: torch.dtype) -> None:
    check_codes("x", x.codes)
    n_tokens, n_columns = x.codes.shape
    rows, columns = weight.codes.shape
    if n_columns != columns or floats.shape != x.codes.shape or not floats.is_contiguous():
        raise ValueError(
            f"x and the float input that it was quantized from, contiguous, must have the "
            f"{columns} columns of the weight, got {tuple(x.codes.shape)} and "
            f"{tuple(floats.shape)} of strides {floats.stride()}."
        )
    check_float_dtype("int8_linear", dtype)
    device = weight.codes.device
    check_row_scales("the scales of x", x.scales, n_tokens, device)
    check_row_scales("the scales of the weight", weight.scales, rows, device)
    check_bias(bias, rows, device)
