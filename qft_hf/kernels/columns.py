"""Largest magnitude of each column: which columns of an input an INT8 product leaves in float."""

import torch
from torch import Tensor

from .checks import FLOATS, check_matrix
from .operators import operator


@operator(fake=lambda x: x.new_empty(x.shape[1], dtype=torch.float32), composed=True)
def column_absmax(x: Tensor) -> Tensor:
    """`max_n |x[n, c]|` of each column `c`.

    Args:
        x: `[N, C]`, contiguous; fp32, bf16 or fp16.

    Returns:
        fp32 `[C]`; NaN or infinite where a value of the column is.

    Raises:
        TypeError: `x` is not one of the three float dtypes.
        ValueError: `x` is not a contiguous, non-empty matrix.
    """
    low, high = x.aminmax(dim=0)  # one read of `x` and no copy of it; PyTorch's kernels are good
    return torch.maximum(high, -low).float()


@column_absmax.checks
def _(x: Tensor) -> None:
    check_matrix("x", x, FLOATS)
