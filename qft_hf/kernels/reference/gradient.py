"""Sum and norm of INT8 gradients in plain PyTorch. This file is the specification."""

import torch
from torch import Tensor

from .groups import group_parts
from .quantize import dequantize, quantize


def accumulate_(
    codes: Tensor, scales: Tensor, other_codes: Tensor, other_scales: Tensor, group_size: int
) -> None:
    """See `qft_hf.kernels.gradient.accumulate_`."""
    total = dequantize(codes, scales, group_size)
    total += dequantize(other_codes, other_scales, group_size)
    new_codes, new_scales = quantize(total, group_size)
    codes.copy_(new_codes)
    scales.copy_(new_scales)


def squared_norm(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """See `qft_hf.kernels.gradient.squared_norm`."""
    # A group's sum of squared codes is below 2**24 and so exact in FP32; the rest is FP64.
    sums = torch.cat(
        [part.float().square_().sum(dim=2) for part in group_parts(codes, group_size)], dim=1
    )
    return (sums.double() * scales.double().square()).sum()
