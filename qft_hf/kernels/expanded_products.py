"""Products of float matrices with a weight that is expanded to float, a tile of rows at a time.

`torch.compile` sees each product as one call. If the expansion were visible, the compiler would
find it in the forward and in the backward pass, and would keep the float weight between them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import row_tiles
from .operators import composition
from .quantization import dequantize
from .values import Weight


def expand(
    weight: Weight,
    own_dtype: torch.dtype,
    dtype: torch.dtype | None = None,
    *,
    rows: Tensor | None = None,
    n_each: int = 1,
) -> Tensor:
    """The values of a weight, rounded to its own dtype and then to another.

    Args:
        weight: `[rows, columns]`.
        own_dtype: The float type that the weight stands for. If FP32, values are rounded only once.
        dtype: The dtype of the result; None: `own_dtype`.
        rows: As in `dequantize`.
        n_each: As in `dequantize`.
    """
    dtype = dtype or own_dtype
    if own_dtype == torch.float32:
        own_dtype = dtype
    values = dequantize(weight, rows=rows, n_each=n_each, dtype=own_dtype)
    return values if dtype == own_dtype else values.to(dtype)


def _fake_linear(
    x: Tensor, weight: Weight, *, bias: Tensor | None, own_dtype: torch.dtype
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.codes.shape[0]))


@composition(fake=_fake_linear)
def expanded_linear(
    x: Tensor, weight: Weight, *, bias: Tensor | None = None, own_dtype: torch.dtype
) -> Tensor:
    """`x W^T + b`.

    Args:
        x: Float `[..., C]`.
        weight: `[R, C]`.
        bias: Float `[R]` or None.
        own_dtype: The dtype that the weight stands for; the product is computed in that of `x`.

    Returns:
        `[..., R]` of the dtype of `x`.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if weight.is_one_tile:
        return F.linear(x, expand(weight, own_dtype, x.dtype), bias)
    tiles = [
        F.linear(
            x, expand(weight.rows(rows), own_dtype, x.dtype), None if bias is None else bias[rows]
        )
        for rows in row_tiles(*weight.codes.shape)
    ]
    return torch.cat(tiles, dim=-1)


def _fake_input_gradient(grad: Tensor, weight: Weight, *, own_dtype: torch.dtype) -> Tensor:
    dtype = grad.dtype if weight.is_one_tile else torch.float32
    return grad.new_empty((grad.shape[0], weight.codes.shape[1]), dtype=dtype)


@composition(fake=_fake_input_gradient)
def expanded_input_gradient(grad: Tensor, weight: Weight, *, own_dtype: torch.dtype) -> Tensor:
    """`grad W`, the gradient of the input of `expanded_linear`.

    Args:
        grad: Float `[N, R]`.
        weight: `[R, C]`.
        own_dtype: The dtype that the weight stands for; products are computed in that of `grad`.

    Returns:
        `[N, C]` of the dtype of `grad`, or FP32 if it is the sum over several tiles.
    """
    if weight.is_one_tile:
        return grad @ expand(weight, own_dtype, grad.dtype)
    # Tiles are summed in FP32: rounding partial sums would lose bits.
    products = (
        (grad[:, rows] @ expand(weight.rows(rows), own_dtype, grad.dtype)).float()
        for rows in row_tiles(*weight.codes.shape)
    )
    total = next(products)
    for product in products:
        total += product
    return total
