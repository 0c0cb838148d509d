"""Values of INT8 tensors in float64, computed independently of the package."""

from typing import Any

import torch
from torch import Tensor

from qft_hf.quant import Int8Tensor


def scales64(stored: Any) -> Tensor:
    """The scale of each element of 8-bit codes: float64 `[rows, columns]`.

    Args:
        stored: A weight or gradient (`Int8Tensor`), or a `Quantized` or `Weight` of the kernels.
    """
    matrix = stored.stored if isinstance(stored, Int8Tensor) else stored
    columns = matrix.codes.shape[1]
    group = torch.arange(columns) // (matrix.group_size or columns)
    return matrix.scales.double()[:, group]


def values64(stored: Any) -> Tensor:
    """Return the stored values in float64, outliers included; for a float tensor, its values."""
    if isinstance(stored, Tensor) and not isinstance(stored, Int8Tensor):
        return stored.detach().double()
    values = stored.codes.double() * scales64(stored)
    if hasattr(stored, "outlier_columns"):
        values.scatter_(1, stored.outlier_columns.long(), stored.outlier_values.double())
    return values
