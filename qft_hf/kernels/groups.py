"""Groups of columns and their scales in plain PyTorch: the building blocks of all references.

Every backend returns the same bits, so each step uses only operations that round the same way
everywhere: max, multiplication, true division, addition.
"""

import torch
from torch import Tensor

from ..layout import n_groups

QMAX = 127  # symmetric: -128 is never produced, so every code can be negated
# The least scale, and that of a group of zeros. It is far below usual scales, and its inverse fits
# FP32. A subnormal value, which is 0 on some devices, gets code 0 with it on all of them, however
# it is rounded: 2**-126 / TINY is below 2**-25, and FP32 loses that when it is added to 1 - 2**-24.
TINY = 1e-30
# Adding and subtracting 1.5 * 2**23 rounds FP32 to the nearest integer, ties to even.
MAGIC = 12582912.0


def absmax_scale(absmax: Tensor, largest: int = QMAX) -> Tensor:
    """Return the scale that maps `absmax` to the largest value of a code, but at least `TINY`.

    Multiplies by a constant: some devices would turn a division by 127 into a multiplication.
    A NaN or infinite absmax gives a NaN or infinite scale.
    """
    return (absmax * (1.0 / largest)).clamp_min(TINY)


def inverse(scales: Tensor) -> Tensor:
    """One over each scale, correctly rounded."""
    # Tensor / tensor is IEEE division; with a Python number as the numerator it may not be.
    return torch.ones_like(scales) / scales


def empty_quantized(
    rows: int, columns: int, group_size: int | None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Codes int8 `[rows, columns]` and scales fp32 `[rows, n_groups]`, undefined."""
    return (
        torch.empty(rows, columns, dtype=torch.int8, device=device),
        torch.empty(rows, n_groups(columns, group_size), dtype=torch.float32, device=device),
    )


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
    """Largest magnitude in each group, NaN if it has one: fp32 `[rows, n_groups]`."""
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


def rounded_up_or_down(values: Tensor, uniform: Tensor) -> Tensor:
    """Round up with the probability of the fraction, if `uniform` is uniform in [0, 1).

    The fraction and the random number are added without the whole part, so that no FP32 rounding of
    their sum can change a whole number.
    """
    whole = values.floor()
    return whole + ((values - whole).add_(uniform) >= 1)


def stochastic_codes(values: Tensor, uniform: Tensor) -> Tensor:
    """Codes int8 of `values`, in units of a code, rounded up or down."""
    codes = rounded_up_or_down(values, uniform)
    # A row with NaN or infinity gets codes 0; its non-finite scale marks it.
    return codes.nan_to_num_(0.0).clamp_(-QMAX, QMAX).to(torch.int8)


def quantized(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Codes int8 and scales of an FP32 matrix, rounded to nearest; see `kernels.quantize`."""
    scales = absmax_scale(group_absmax(x, group_size))
    values = scale_groups_(x.clone(), inverse(scales), group_size)
    values = values.add_(MAGIC).sub_(MAGIC)
    # A group with NaN or infinity gets codes 0; its non-finite scale marks it.
    return values.nan_to_num_(0.0).clamp_(-QMAX, QMAX).to(torch.int8), scales


def expanded(codes: Tensor, scales: Tensor, group_size: int | None) -> Tensor:
    """`codes * scale` in FP32."""
    return scale_groups_(codes.float(), scales, group_size)
