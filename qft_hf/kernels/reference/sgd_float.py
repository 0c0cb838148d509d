"""The SGD step on float parameters, in plain PyTorch: the specification."""

from typing import Any

from torch import Tensor

from .lion_float import step_float_


def sgd_step_floats_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    *,
    maximize: bool,
    steps: list[int],
    streams: list[int],
    **arguments: Any,
) -> None:
    """See `qft_hf.kernels.sgd_float.sgd_step_floats_`. Parameters are independent."""
    for parameter, gradient, step, stream in zip(
        parameters, gradients, steps, streams, strict=True
    ):
        direction = gradient.float().neg() if maximize else gradient.float()
        is_finite = direction.isfinite()
        step_float_(parameter, direction, is_finite, step=step, stream=stream, **arguments)
