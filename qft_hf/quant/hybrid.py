"""The hybrid format: which values of a float matrix are its outliers; the others are rounded."""

from math import isfinite

import torch
from torch import Tensor

from .. import kernels
from ..config import QuantizationSpec
from ..kernels.checks import fits
from ..layout import outliers_per_row, row_tiles
from .arrangement import Arrangement


def check_quantizable(name: str, weight: Tensor, arrangement: Arrangement) -> None:
    """Raise ValueError, with the name, if a value is NaN or infinite, or there are too many.

    Args:
        name: Name of the weight.
        weight: fp32, bf16 or fp16, of the shape of the arrangement; on the meta device only the
            shape is checked.
        arrangement: How it is stored.
    """
    if not fits(*arrangement.matrix_shape):
        raise ValueError(
            f"{name} has {weight.numel():,} values in rows of {arrangement.columns:,}, which are "
            "more than the INT8 kernels can count. List its module in modules_to_not_convert, "
            "which keeps it float."
        )
    if weight.is_meta or all(isfinite(end) for end in weight.aminmax()):
        return
    count = weight.numel() - int(weight.isfinite().sum())
    raise ValueError(
        f"{name} has {count} of {weight.numel()} values that are NaN or infinite and cannot be "
        "quantized. The checkpoint is damaged or its dtype is too narrow: load a good one."
    )


def quantized_rows(
    rows: Tensor, spec: QuantizationSpec, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, scales, outliers and outlier columns of finite float rows, rounded to nearest.

    Args:
        rows: `[n, columns]`.
        spec: The format.
        columns: Outlier columns of all rows, int64 `[n_outliers]`; None: those of the largest
            magnitudes of each row.
    """
    dense = rows.contiguous().float()
    if columns is None:
        n_outliers = outliers_per_row(dense.shape[1], spec.outlier_fraction)
        index = dense.abs().topk(n_outliers, dim=1).indices.sort(dim=1).values
    else:
        index = columns.expand(len(dense), -1)
    values = dense.gather(1, index)
    if index.shape[1]:
        dense = dense.scatter(1, index, 0.0)
    codes, scales = kernels.quantize(dense, group_size=spec.group_size)
    return codes, scales, values, index


def shared_columns(matrix: Tensor, spec: QuantizationSpec) -> Tensor:
    """Return the columns of a matrix that stay float for INT8 products: int64 `[n_outliers]`.

    They are those with the largest value relative to the norm of its row. Such a value sets the
    scale of its row, and the scales of the weight are folded into the output gradient before that
    is quantized, so a row with a large scale leaves the others fewer codes.
    """
    columns = matrix.shape[1]
    largest = matrix.new_zeros(columns, dtype=torch.float32)
    for tile in row_tiles(*matrix.shape):
        dense = matrix[tile].contiguous().float()
        norm = torch.linalg.vector_norm(dense, dim=1, keepdim=True)
        relative = dense.abs().div_(norm.clamp_min_(1e-30))  # a row may be zeros
        largest = largest.maximum(relative.amax(dim=0))
    return largest.topk(outliers_per_row(columns, spec.outlier_fraction)).indices.sort().values
