"""Groups of columns and their scales, in plain PyTorch: what all references are made of.

Every backend returns the same bits, so each step uses only operations that round the same way
everywhere: max, multiplication, true division, addition.
"""

import torch
from torch import Tensor

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


def group_parts(x: Tensor, group_size: int | None) -> list[Tensor]:
    """Views `[rows, groups, columns of a group]` of `x`: the full groups, then the short one."""
    columns = x.shape[1]
    size = min(group_size or columns, columns)
    full = columns - columns % size
    parts = [x[:, :full].unflatten(1, (-1, size))]
    if full < columns:
        parts.append(x[:, full:].unsqueeze(1))
    return parts


def group_absmax(x: Tensor, group_size: int | None) -> Tensor:
    """Largest magnitude in each group: `[rows, columns]` to `[rows, n_groups]`; NaN wins."""
    return torch.cat([part.abs().amax(dim=2) for part in group_parts(x, group_size)], dim=1)


def scale_groups_(x: Tensor, factors: Tensor, group_size: int | None) -> Tensor:
    """Multiply each group of `x` `[rows, columns]` by its entry of `factors` `[rows, n_groups]`."""
    start = 0
    for part in group_parts(x, group_size):
        stop = start + part.shape[1]
        part.mul_(factors[:, start:stop, None])
        start = stop
    return x


def spread_groups(values: Tensor, columns: int, group_size: int | None) -> Tensor:
    """Repeat each group's entry over its columns: `[rows, n_groups]` to `[rows, columns]`."""
    size = min(group_size or columns, columns)
    return values.repeat_interleave(size, dim=1)[:, :columns]


def quantized(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Codes int8 and scales of an FP32 matrix, rounded to nearest; see `kernels.quantize`."""
    scales = absmax_scale(group_absmax(x, group_size))
    # Division of a tensor by a tensor is IEEE division; a Python number on top may not be.
    inverse = torch.ones_like(scales) / scales
    values = scale_groups_(x.clone(), inverse, group_size)
    values = values.add_(MAGIC).sub_(MAGIC)
    # A group that is not finite keeps its scale, which tells, and gets codes 0.
    return values.nan_to_num_(0.0).clamp_(-QMAX, QMAX).to(torch.int8), scales


def expanded(codes: Tensor, scales: Tensor, group_size: int | None) -> Tensor:
    """`codes * scale` in FP32."""
    return scale_groups_(codes.float(), scales, group_size)
