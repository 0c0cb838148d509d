"""The SGD step on INT8 weights and gradients, in plain PyTorch: the specification."""

from typing import Any

from torch import Tensor

from .quantize import dequantize
from .weight import row_chunks, step_weight_


def sgd_step_(
    codes: Tensor,
    scales: Tensor,
    outlier_values: Tensor,
    outlier_columns: Tensor,
    gradient_codes: Tensor,
    gradient_scales: Tensor,
    *,
    state_group_size: int,
    maximize: bool,
    **arguments: Any,
) -> None:
    """See `qft_hf.kernels.sgd.sgd_step_`. Rows are independent and go in chunks."""
    weight = codes, scales, outlier_values, outlier_columns
    for rows in row_chunks(codes):
        gradient = dequantize(gradient_codes[rows], gradient_scales[rows], state_group_size)
        step_weight_(
            *weight, gradient.neg_() if maximize else gradient, rows=rows, counted=rows, **arguments
        )
