"""Output of a linear layer: an INT8 product plus float products of both operands' outliers."""

import torch
from torch import Tensor

from .checks import check_bias, check_codes, check_float_dtype, check_scales
from .int8_product import MAX_SUMMED, int8_matmul
from .layer_input import take_columns
from .operators import operator
from .values import Input, Weight


@operator(
    fake=lambda x, _, weight, *, dtype, **__: x.codes.new_empty(
        (x.codes.shape[0], weight.codes.shape[0]), dtype=dtype
    ),
    composed=True,
)
def int8_linear(
    x: Input, floats: Tensor, weight: Weight, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """`x W^T + b`: an INT8 product of `x` and `W`, plus float products of their outlier columns.

    Outlier columns of `W` `[R, C]` are multiplied by the float input, `floats` `[N, C]`, and those
    of `x` by the codes of `W`:

        y = int8_matmul(x.codes, W.codes^T, x.scales, W.scales, bias)
            + sum_j floats[:, c_j] W.outlier_values[:, j]
            + sum_i x.values[:, i] (W.codes[:, x.columns_i] * W.scales)

    The factors of both sums are rounded to `dtype`. The k terms of both sums have no fixed order,
    so backends agree only to a bound. Let T be the sum of the magnitudes of the integer sum times
    its scales, of the bias and of the k products, and u half the distance from 1 to the next number
    of `dtype`. Then the result differs by at most

        (k + 3) 2**-23 T + 2 u T

    from the sum of exact products of the rounded factors: each term goes through at most k + 3
    FP32 roundings (its own, those of the scales, and one for each sum that it is part of), and a
    backend may round to `dtype` before the products are added and once more afterwards.

    Args:
        x: The quantized input; its codes are 0 in its outlier columns.
        floats: `[N, C]`, contiguous: the float input that `x` was quantized from.
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


@int8_linear.supported_by_backends
def _(x: Input, floats: Tensor, weight: Weight, **_: object) -> bool:
    return x.codes.shape[1] <= MAX_SUMMED and x.codes.numel() > 0


@int8_linear.checks
def _(x: Input, floats: Tensor, weight: Weight, *, bias: Tensor | None, dtype: torch.dtype) -> None:
    check_codes("x", x.codes)
    n_tokens, n_columns = x.codes.shape
    rows, columns = weight.codes.shape
    if n_columns != columns or floats.shape != x.codes.shape or not floats.is_contiguous():
        raise ValueError(
            f"x and the float input that it was quantized from must have one shape, with the "
            f"{columns} columns of the weight, and the float input must be contiguous, got "
            f"{tuple(x.codes.shape)} and {tuple(floats.shape)} with strides {floats.stride()}."
        )
    values, shape = x.values, (n_tokens, x.columns.shape[0])
    # Comparing strides is faster than making a view; those of a single row or column may differ.
    if values.shape != shape or not (
        values.stride() == (1, n_tokens) or values.t().is_contiguous()
    ):
        raise ValueError(
            f"The outlier values of x must have shape {shape} and be stored column by column, got "
            f"{tuple(values.shape)} with strides {values.stride()}. Pass those of quantize_input, "
            "or values.t().contiguous().t()."
        )
    check_float_dtype("int8_linear", dtype)
    device = weight.codes.device
    check_scales("the scales of x", x.scales, (n_tokens, 1), device)
    if weight.scales.shape[1] > 1:
        raise ValueError(
            f"The weight must have one scale per row, got groups of {weight.group_size} columns. "
            "Quantize it with group_size=None, or multiply by its float values."
        )
    check_bias(bias, rows, device)
