"""Sum and norm of INT8 gradients."""

import torch
from torch import Tensor

from .checks import check_quantized, check_same
from .operators import declare, nothing

_accumulate_ = declare(
    "accumulate_",
    "(Tensor(a!) codes, Tensor(b!) scales, Tensor other_codes, Tensor other_scales, "
    "int group_size) -> ()",
    fake=nothing,
)
_squared_norm = declare(
    "squared_norm",
    "(Tensor codes, Tensor scales, int group_size) -> Tensor",
    fake=lambda codes, *_: codes.new_empty((), dtype=torch.float64),
)


def accumulate_(
    codes: Tensor,
    scales: Tensor,
    other_codes: Tensor,
    other_scales: Tensor,
    *,
    group_size: int,
) -> None:
    """Add a second INT8 gradient to a first in place: the FP32 sum, rounded to nearest.

    Args:
        codes: int8 `[rows, columns]`, modified.
        scales: fp32 `[rows, n_groups]`, modified.
        other_codes: int8 `[rows, columns]`.
        other_scales: fp32 `[rows, n_groups]`.
        group_size: Columns per scale, in both gradients.

    Raises:
        TypeError: Codes are not int8.
        ValueError: Shapes do not fit; nothing was written.
    """
    check_quantized("gradient", codes, scales, group_size)
    check_quantized("other gradient", other_codes, other_scales, group_size)
    check_same("other gradient codes", other_codes, codes)
    _accumulate_(codes, scales, other_codes, other_scales, group_size)


def squared_norm(codes: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    """Sum of squares of the dequantized gradient, without dequantizing it.

    Args:
        codes: int8 `[rows, columns]`.
        scales: fp32 `[rows, n_groups]`.
        group_size: Columns per scale.

    Returns:
        fp64 scalar; NaN or infinite if any scale is.

    Raises:
        TypeError: Codes are not int8.
        ValueError: Shapes do not fit.
    """
    check_quantized("gradient", codes, scales, group_size)
    norm: Tensor = _squared_norm(codes, scales, group_size)
    return norm
