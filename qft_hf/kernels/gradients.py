"""Sum and norm of INT8 gradients."""

import torch
from torch import Tensor

from .checks import check_bits, check_same
from .groups import expanded, group_parts, quantized
from .operators import operator
from .values import Quantized

SERIAL = 2**14  # terms: a sum this short runs on one thread


@operator(writes=("gradient.codes", "gradient.scales"))
def accumulate_(gradient: Quantized, other: Quantized) -> None:
    """Add a second INT8 gradient to a first in place: the FP32 sum, rounded to nearest.

    Args:
        gradient: `[rows, columns]`, modified.
        other: A gradient of the same shape and groups.

    Raises:
        TypeError: Codes are not of 8 bits.
        ValueError: Shapes or groups do not fit; nothing was written.
    """
    total = expanded(*gradient.tensors, gradient.group_size)
    total += expanded(*other.tensors, other.group_size)
    codes, scales = quantized(total, gradient.group_size)
    gradient.codes.copy_(codes)
    gradient.scales.copy_(scales)


@accumulate_.checks
def _(gradient: Quantized, other: Quantized) -> None:
    check_bits("gradient", gradient.bits)
    check_bits("other gradient", other.bits)
    check_same("other gradient codes", other.codes, gradient.codes)
    if other.group_size != gradient.group_size:
        raise ValueError(
            f"other gradient must have groups of {gradient.group_size} columns, got "
            f"{other.group_size}: the sum has one scale for each group of both."
        )


@operator(fake=lambda gradient: gradient.scales.new_empty(len(gradient.codes), dtype=torch.float64))
def squared_norms(gradient: Quantized) -> Tensor:
    """Sum of squares of each row of the dequantized gradient, without dequantizing it.

    Args:
        gradient: `[rows, columns]`.

    Returns:
        fp64 `[rows]`; NaN or infinite for a row with such a scale. The order in which the groups
        of a row are added up depends on the backend.

    Raises:
        TypeError: Codes are not of 8 bits.
    """
    # Sums of squared codes are integers, exact in FP64 for groups of any length.
    parts = group_parts(gradient.codes, gradient.group_size)
    squares = [part.float().square_().sum(dim=2, dtype=torch.float64) for part in parts]
    return (torch.cat(squares, dim=1) * gradient.scales.double().square()).sum(dim=1)


@squared_norms.checks
def _(gradient: Quantized) -> None:
    check_bits("gradient", gradient.bits)


def squared_norm(gradient: Quantized) -> Tensor:
    """Sum of squares of the dequantized gradient: fp64 scalar; see `squared_norms`."""
    return sum_in_order(squared_norms(gradient))


def sum_in_order(terms: Tensor) -> Tensor:
    """Return the sum of `terms` `[n]`, with the same bits for any number of CPU threads.

    On a CPU PyTorch splits a sum of 32,768 terms or more among its threads.
    """
    if terms.device.type != "cpu":
        return terms.sum()
    return torch.stack([part.sum() for part in terms.split(SERIAL)]).sum()
