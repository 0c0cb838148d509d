"""The float columns of a linear layer's two gradients, in addition to their INT8 products."""

from torch import Tensor

from .checks import FLOATS, check_matrix
from .operators import operator


def _fake(
    gradient: Tensor, weight_outliers: Tensor | None, input_outliers: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens, outputs = gradient.shape
    of_x = (0, 0) if weight_outliers is None else (tokens, weight_outliers.shape[1])
    of_weight = (0, 0) if input_outliers is None else (input_outliers.shape[1], outputs)
    return gradient.new_empty(of_x), gradient.new_empty(of_weight).t()


@operator(fake=_fake, composed=True)
def outlier_products(
    gradient: Tensor, weight_outliers: Tensor | None, input_outliers: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the outlier columns of `grad_x` and of `grad_w`, which are float products.

        of_x = gradient @ weight_outliers
        of_weight = gradient^T @ input_outliers

    Factors are rounded to the dtype of `gradient`, sums are FP32, and the results are rounded to
    that dtype. The order of the sums is not fixed, so backends agree only to a bound: a sum of K
    terms to `K * 2**-24` times the sum of their magnitudes, plus that rounding. Each backend
    returns the same bits at every call, with any number of threads.

    Args:
        gradient: Output gradient `[tokens, outputs]`, contiguous; fp32, bf16 or fp16.
        weight_outliers: Float `[outputs, j]`, or None to leave out `of_x`.
        input_outliers: Float `[tokens, k]`, or None to leave out `of_weight`.

    Returns:
        of_x: `[tokens, j]` of the dtype of `gradient`; empty if left out.
        of_weight: `[outputs, k]` of that dtype, stored column by column; empty if left out.

    Raises:
        TypeError: `gradient` is not one of the three float dtypes.
        ValueError: Shapes or devices do not fit.
    """
    dtype = gradient.dtype
    if weight_outliers is None:
        of_x = gradient.new_empty(0, 0)
    else:
        of_x = gradient @ weight_outliers.to(dtype)
    if input_outliers is None:
        of_weight = gradient.new_empty(0, 0)
    else:
        # On a CPU this takes half the time of gradient.t() @ input_outliers.
        of_weight = (input_outliers.to(dtype).t() @ gradient).t()
    return of_x, of_weight


@outlier_products.checks
def _(gradient: Tensor, weight_outliers: Tensor | None, input_outliers: Tensor | None) -> None:
    check_matrix("gradient", gradient, FLOATS)
    tokens, outputs = gradient.shape
    for name, outliers, rows in (
        ("weight_outliers", weight_outliers, outputs),
        ("input_outliers", input_outliers, tokens),
    ):
        if outliers is None:
            continue
        fits = outliers.ndim == 2 and outliers.shape[0] == rows
        if not fits or outliers.device != gradient.device:
            raise ValueError(
                f"{name} must be [{rows}, k] on {gradient.device}, to be multiplied by a gradient "
                f"of {tokens} tokens and {outputs} outputs, got shape {tuple(outliers.shape)} on "
                f"{outliers.device}."
            )
