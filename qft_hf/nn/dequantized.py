"""The three products of a linear layer with the weight expanded to float, a row tile at a time.

Few tokens, as in generation, are multiplied without expanding it.

Shapes: N tokens (all leading dimensions), R rows (outputs), C columns (inputs). Each tile of the
weight's gradient is quantized as soon as it exists, so neither ever exists whole in float, but for
weights of a single tile.
"""

import torch
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
    return kernels.expanded_linear(x, weight.stored, bias=bias, own_dtype=weight.dtype)


def forward_few(x: Tensor, weight: QFTWeight, bias: Tensor | None) -> Tensor:
    """`forward` of at most `max_tokens` tokens: the same terms, in another order."""
    y = kernels.dequantized_matmul(
        x.reshape(-1, x.shape[-1]).contiguous(), weight.stored, bias=bias
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def input_gradient(grad: Tensor, weight: QFTWeight) -> Tensor:
    """grad_x[N, C] = grad[N, R] W[R, C]; FP32 if it was added up from several tiles."""
    return kernels.expanded_input_gradient(grad, weight.stored, own_dtype=weight.dtype)


def weight_gradient(grad: Tensor, x: Tensor) -> Tiles:
    """grad_W[R, C] = grad[N, R]^T x[N, C]."""
    return Tiles(lambda rows: (grad if rows is ALL_ROWS else grad[:, rows]).t() @ x)
