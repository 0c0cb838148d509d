"""Group-wise absmax INT8 quantization in plain PyTorch. This file is the specification.

Every other backend returns these codes and scales bit for bit, so each step uses only operations
that round the same way everywhere: max, multiplication, true division, addition.
"""

import torch
from torch import Tensor

from .groups import group_absmax, scale_groups_

QMAX = 127  # symmetric: -128 is never produced, so every code can be negated
# The least scale, and that of zeros: small beside every other, and with an inverse in FP32. What is
# subnormal, and to some devices 0, gets code 0 against it on all of them, whatever the rounding:
# 2**-126 / TINY is less than the 2**-25 that FP32 tells from a whole number.
TINY = 1e-30
# Adding and subtracting 1.5 * 2**23 rounds FP32 to the nearest integer, ties to even.
MAGIC = 12582912.0


def absmax_scale(absmax: Tensor) -> Tensor:
    """The scale that maps `absmax` to code 127, and at least `TINY`.

    Multiplies by a constant: dividing by 127 would be a reciprocal multiplication on some devices.
    A NaN or infinite absmax gives a NaN or infinite scale.
    """
    return (absmax * (1.0 / QMAX)).clamp_min(TINY)


def quantize(
    x: Tensor, group_size: int | None, zero_columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `qft_hf.kernels.quantize.quantize`."""
    x = x.float()
    if zero_columns is not None:
        x = x.masked_fill(zero_columns, 0.0)
    scales = absmax_scale(group_absmax(x, group_size))
    # Division of a tensor by a tensor is IEEE division; a Python number on top may not be.
    inverse = torch.ones_like(scales) / scales
    values = scale_groups_(x.clone(), inverse, group_size)
    values = values.add_(MAGIC).sub_(MAGIC)
    # A group that is not finite keeps its scale, which tells, and gets codes 0.
    codes = values.nan_to_num_(0.0).clamp_(-QMAX, QMAX).to(torch.int8)
    return codes, scales


def dequantize(
    codes: Tensor,
    scales: Tensor,
    group_size: int | None,
    *,
    rows: Tensor | None = None,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See `qft_hf.kernels.quantize.dequantize`."""
    if rows is not None:
        exists = (rows >= 0) & (rows < codes.shape[0])
        rows = torch.where(exists, rows, 0)
        codes, scales = codes[rows], scales[rows]
    values = scale_groups_(codes.float(), scales, group_size)
    if outlier_values is not None and outlier_columns is not None:
        if rows is not None:
            outlier_values, outlier_columns = outlier_values[rows], outlier_columns[rows]
        values.scatter_(1, outlier_columns.long(), outlier_values)
    if rows is not None:
        values.masked_fill_(~exists[:, None], float("nan"))
    return values.to(dtype)
