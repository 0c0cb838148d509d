"""The SGD step on a float parameter, in plain PyTorch: the specification."""

from typing import Any

from torch import Tensor

from .lion_float import step_float_


def sgd_step_float_(
    parameter: Tensor, gradient: Tensor, *, maximize: bool, **arguments: Any
) -> None:
    """See `qft_hf.kernels.sgd_float.sgd_step_float_`."""
    gradient = gradient.float()
    step_float_(parameter, gradient.neg() if maximize else gradient, **arguments)
