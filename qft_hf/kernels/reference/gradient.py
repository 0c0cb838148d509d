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
    # Sums of squared codes are integers, exact in FP64 for groups of any length.
    parts = group_parts(codes, group_size)
    squares = [part.float().square_().sum(dim=2, dtype=torch.float64) for part in parts]
    return (torch.cat(squares, dim=1) * scales.double().square()).sum()
