"""Product of a few tokens with an INT8 weight that is never expanded in memory."""

import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, check_bias, check_column_values, check_matrix
from .operators import operator
from .quantization import dequantize
from .values import Weight


@operator(fake=lambda x, weight, *, bias: x.new_empty((x.shape[0], weight.codes.shape[0])))
def dequantized_matmul(x: Tensor, weight: Weight, *, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias` with the weight that `dequantize(weight, dtype=x.dtype)` returns.

    For few tokens the product takes the time of reading the weight: here one byte per element,
    while expanding first writes and reads two or four more. With many tokens the expansion is
    repeated for every few of them, and `dequantize` with a float product is faster.

    Backends do not return the same bits: a sum of floats depends on its order, and each backend
    sums in the order that suits its device. The terms are the same everywhere: elements of `W` and
    `bias` are rounded to the dtype of `x`, sums are FP32, and the result is rounded to that dtype
    once. So its error is at most `(columns + outliers + 1) * 2**-24` times the sum of the
    magnitudes of its terms, plus that rounding, and the bits are the same if FP32 holds all partial
    sums exactly.

    Args:
        x: `[tokens, columns]`, contiguous; fp32, bf16 or fp16.
        weight: `[rows, columns]`.
        bias: Float `[rows]`, or None.

    Returns:
        `[tokens, rows]` of the dtype of `x`.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes or devices do not fit. On the CPU also: an outlier column does not exist.
    """
    expanded = dequantize.reference(weight, dtype=x.dtype)
    bias = None if bias is None else bias.to(x.dtype).float()
    return F.linear(x.float(), expanded.float(), bias).to(x.dtype)


@dequantized_matmul.checks
def _(x: Tensor, weight: Weight, *, bias: Tensor | None) -> None:
    check_matrix("x", x, FLOATS)
    rows, columns = weight.codes.shape
    if x.shape[1] != columns or x.device != weight.device:
        raise ValueError(
            f"dequantized_matmul multiplies x [tokens, columns] by a weight [rows, columns] on one "
            f"device, got {tuple(x.shape)} on {x.device} and {(rows, columns)} on {weight.device}."
        )
    check_bias(bias, rows, weight.device)


@dequantized_matmul.checks_values
def _(x: Tensor, weight: Weight, *, bias: Tensor | None) -> None:
    check_column_values(weight.outlier_columns, weight.codes)
