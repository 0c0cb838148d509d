"""INT8 products in plain PyTorch. This file is the specification."""

import torch
from torch import Tensor


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    *,
    bias: Tensor | None = None,
    columns: Tensor | None = None,
    values: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """See `qft_hf.kernels.int8_matmul.int8_matmul`."""
    # Sums of products of codes are integers below 2**53: FP64 holds them exactly in any order.
    out = scaled((a.double() @ b.double()).float(), a_scales, b_scales, bias)
    if columns is not None and values is not None:
        out.index_copy_(1, columns, values.float())
    return out.to(dtype)


def scaled(
    sums: Tensor, a_scales: Tensor | None, b_scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Scales and bias on the FP32 sums `[M, N]`, in place, in the order that is specified."""
    if a_scales is not None:
        sums.mul_(a_scales)
    if b_scales is not None:
        sums.mul_(b_scales.t())
    if bias is not None:
        sums.add_(bias.float())
    return sums
