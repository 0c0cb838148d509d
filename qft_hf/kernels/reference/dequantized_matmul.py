"""Products with an INT8 weight in plain PyTorch: what is summed, in an order that is left open."""

import torch.nn.functional as F
from torch import Tensor

from .quantize import dequantize


def dequantized_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_size: int | None,
    *,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """See `qft_hf.kernels.dequantized_matmul.dequantized_matmul`."""
    weight = dequantize(
        codes,
        scales,
        group_size,
        outlier_values=outlier_values,
        outlier_columns=outlier_columns,
        dtype=x.dtype,
    )
    bias = None if bias is None else bias.to(x.dtype).float()
    return F.linear(x.float(), weight.float(), bias).to(x.dtype)
