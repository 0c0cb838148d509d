"""The SGD step on INT8 weights in Triton. Twin: `kernels/reference/sgd.py`."""

from typing import Any

from torch import Tensor

from .lion import launch


def sgd_step_(
    codes: Tensor,
    scales: Tensor,
    outlier_values: Tensor,
    outlier_columns: Tensor,
    *gradient: Tensor,
    **arguments: Any,
) -> None:
    # Without momentum the kernel never touches what stands in its place, or in that of sums.
    launch(
        codes, scales, outlier_values, outlier_columns, *gradient, *gradient,
        momentum_bits=0, beta1=0.0, beta2=0.0, sums=gradient[-1], **arguments,
    )  # fmt: skip
