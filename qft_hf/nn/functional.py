"""Products with a quantized weight, and their gradients.

Shapes: N tokens (all leading dimensions), R rows (outputs), C columns (inputs). The weight is
expanded to float one row tile at a time, and each tile of its gradient is quantized as soon as it
exists, so neither ever exists whole in float.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..quant import Int8Gradient, QFTWeight


class _Linear(torch.autograd.Function):
    """y[N, R] = x[N, C] W[R, C]^T + b[R]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QFTWeight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        tiles = [
            F.linear(
                x,
                weight.dequantize_rows(rows).to(x.dtype),
                None if bias is None else bias[rows].to(x.dtype),
            )
            for rows in weight.row_tiles()
        ]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, Int8Gradient | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        x_rows = x.reshape(-1, x.shape[-1])
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])

        grad_x = None
        gradient = (
            Int8Gradient.zeros(*weight.shape, dtype=weight.dtype, device=weight.device)
            if needs_weight
            else None
        )
        tiles = list(weight.row_tiles())
        for rows in tiles:
            grad_tile = grad_rows[:, rows]
            if needs_x:
                product = grad_tile @ weight.dequantize_rows(rows).to(x.dtype)
                if len(tiles) > 1:  # they add up in FP32: rounding partial sums would lose bits
                    product = product.float()
                grad_x = product if grad_x is None else grad_x.add_(product)
            if gradient is not None:
                gradient.set_rows_(rows, grad_tile.t() @ x_rows)
        return (
            None if grad_x is None else grad_x.to(x.dtype).view(x.shape),
            gradient,
            grad_rows.sum(dim=0) if needs_bias else None,
        )


class _Embedding(torch.autograd.Function):
    """y[..., C] = W[ids]."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: QFTWeight, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding_idx = padding_idx
        if ids.numel() == 0:  # kernels refuse empty matrices
            return torch.empty(
                *ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device
            )
        return weight.dequantize_rows(ids.reshape(-1)).view(*ids.shape, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Int8Gradient, None]:
        ids, weight = ctx.saved_tensors
        grad_rows = grad_output.reshape(-1, weight.shape[1]).float()
        # Only rows that were looked up have a gradient: the dense table is never made.
        used, position = ids.reshape(-1).unique(return_inverse=True)
        sums = torch.zeros(len(used), weight.shape[1], dtype=torch.float32, device=weight.device)
        sums.index_add_(0, position, grad_rows)
        if ctx.padding_idx is not None:
            sums[used == ctx.padding_idx] = 0.0
        gradient = Int8Gradient.zeros(*weight.shape, dtype=weight.dtype, device=weight.device)
        if len(used):
            gradient.set_rows_(used, sums)
        return None, gradient, None


def linear(x: Tensor, weight: QFTWeight, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` with a quantized weight; the weight's gradient is an `Int8Gradient`.

    Args:
        x: Float `[..., C]`, of the weight's dtype; under autocast it is cast to the autocast dtype.
        weight: `[R, C]`.
        bias: Float `[R]` or None.

    Returns:
        Float `[..., R]` of the dtype of `x`.

    Raises:
        TypeError: The dtype of `x` is not the weight's, and autocast is off.
    """
    output: Tensor = _Linear.apply(computed_input(x, weight), weight, bias)
    return output


def computed_input(x: Tensor, weight: QFTWeight) -> Tensor:
    """`x` in the dtype of its product with `weight`.

    Raises:
        TypeError: The dtype of `x` is not the weight's, and autocast is off.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return x.to(torch.get_autocast_dtype(device_type))
    if x.dtype != weight.dtype:
        raise TypeError(
            f"linear needs an input of the weight's dtype {weight.dtype}, got {x.dtype}. Cast the "
            "input, load the model with another dtype, or run under torch.autocast."
        )
    return x


def embedding(ids: Tensor, weight: QFTWeight, padding_idx: int | None = None) -> Tensor:
    """Rows `ids` of a quantized table; the table's gradient is an `Int8Gradient`.

    Args:
        ids: Integers of any shape, in [0, rows).
        weight: `[rows, C]`.
        padding_idx: A row that gets no gradient, or None.

    Returns:
        Float `[*ids.shape, C]` of the weight's dtype.
    """
    output: Tensor = _Embedding.apply(ids, weight, padding_idx)
    return output
