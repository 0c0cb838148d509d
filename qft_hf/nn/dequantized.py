"""The three products of a linear layer with the weight expanded to float, a row tile at a time.

Few tokens, as in generation, are multiplied without expanding it.

Shapes: N tokens (all leading dimensions), R rows (outputs), C columns (inputs). Each tile of the
weight's gradient is quantized as soon as it exists, so neither ever exists whole in float, but for
weights of a single tile.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..quant import ALL_ROWS, QFTWeight, Tiles

# At most so many tokens are multiplied without expanding the weight where no gradient is recorded:
# matrix units pad any fewer to as many. Measured on CPUs (one thread), 16 tokens take as long as
# expanding in FP32, or up to a ninth of it, and fewer tokens less. Where a CPU multiplies BF16
# natively, 4 tokens take as long as expanding, and 16 twice as long. On a GPU expanding moves five
# bytes an element, and this one.
MAX_TOKENS = 16
MAX_TOKENS_BESIDE_NATIVE_BF16 = 4


def max_tokens(dtype: torch.dtype, device: torch.device) -> int:
    """Up to how many tokens, computed in `dtype`, `forward_few` is the faster."""
    if dtype == torch.bfloat16 and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return MAX_TOKENS_BESIDE_NATIVE_BF16
    return MAX_TOKENS


def forward(x: Tensor, weight: QFTWeight, bias: Tensor | None) -> Tensor:
    """y[..., R] = x[..., C] W[R, C]^T + b[R], of the dtype of `x`."""
    if weight.is_one_tile:
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight.matrix(x.dtype), bias)
    tiles = [
        F.linear(
            x,
            weight.dequantize_rows(rows, x.dtype),
            None if bias is None else bias[rows].to(x.dtype),
        )
        for rows in weight.row_tiles()
    ]
    return torch.cat(tiles, dim=-1)


def forward_few(x: Tensor, weight: QFTWeight, bias: Tensor | None) -> Tensor:
    """`forward` of at most `max_tokens` tokens: the same terms, in another order."""
    y = kernels.dequantized_matmul(
        x.reshape(-1, x.shape[-1]).contiguous(), weight.stored, bias=bias
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def input_gradient(grad: Tensor, weight: QFTWeight) -> Tensor:
    """grad_x[N, C] = grad[N, R] W[R, C]; FP32 if it was added up from several tiles."""
    if weight.is_one_tile:
        return grad @ weight.matrix(grad.dtype)
    total = None
    for rows in weight.row_tiles():  # they add up in FP32: rounding partial sums would lose bits
        product = (grad[:, rows] @ weight.dequantize_rows(rows, grad.dtype)).float()
        total = product if total is None else total.add_(product)
    if total is None:
        raise ValueError(f"{weight!r} has no rows, and no gradient passes through it.")
    return total


def weight_gradient(grad: Tensor, x: Tensor) -> Tiles:
    """grad_W[R, C] = grad[N, R]^T x[N, C]."""
    return Tiles(lambda rows: (grad if rows is ALL_ROWS else grad[:, rows]).t() @ x)
