"""The three products of a linear layer with the weight expanded to float, a row tile at a time.

Few tokens, as in generation, are multiplied without expanding the weight.

Shapes: N tokens (all leading dimensions), R rows (outputs), C columns (inputs). Each tile of the
weight's gradient is quantized or used as soon as it exists. Neither the weight nor its gradient
exists whole in float, unless the weight has a single tile.
"""

import torch
from torch import Tensor

from .. import kernels
from ..quant import ALL_ROWS, QFTWeight, Tiles

# Largest number of tokens that are multiplied without expanding the weight if no gradient is
# recorded: matrix units pad fewer tokens to this number. On CPUs (measured with one thread), 16
# tokens take between a ninth of the time of expanding in FP32 and all of it, and fewer tokens take
# less. On a CPU with native BF16 products, 4 tokens take as long as expanding, and 16 twice as
# long. On a GPU expanding moves five bytes per element, and this product one.
MAX_TOKENS = 16
MAX_TOKENS_BESIDE_NATIVE_BF16 = 4


def max_tokens(dtype: torch.dtype, device: torch.device) -> int:
    """Return the largest number of tokens, computed in `dtype`, for which to use `forward_few`."""
    if dtype == torch.bfloat16 and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return MAX_TOKENS_BESIDE_NATIVE_BF16
    return MAX_TOKENS


def forward(x: Tensor, weight: QFTWeight, bias: Tensor | None) -> Tensor:
    """Return y[..., R] = x[..., C] W[R, C]^T + b[R], of the dtype of `x`."""
    return kernels.expanded_linear(x, weight.stored, bias=bias, own_dtype=weight.dtype)


def forward_few(x: Tensor, weight: QFTWeight, bias: Tensor | None) -> Tensor:
    """Return `forward` of at most `max_tokens` tokens: the same terms, added in another order."""
    y = kernels.dequantized_matmul(
        x.reshape(-1, x.shape[-1]).contiguous(), weight.stored, bias=bias
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def input_gradient(grad: Tensor, weight: QFTWeight) -> Tensor:
    """Return grad_x[N, C] = grad[N, R] W[R, C]; FP32 if it is a sum over several tiles."""
    return kernels.expanded_input_gradient(grad, weight.stored, own_dtype=weight.dtype)


def weight_gradient(grad: Tensor, x: Tensor) -> Tiles:
    """Return grad_W[R, C] = grad[N, R]^T x[N, C], which is computed in tiles."""
    return Tiles(lambda rows: (grad if rows is ALL_ROWS else grad[:, rows]).t() @ x)
