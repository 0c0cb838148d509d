"""The SGD step on float parameters in Triton. Twin: `kernels/reference/sgd_float.py`."""

from typing import Any

from torch import Tensor

from .lion_float import launch


def sgd_step_floats_(parameters: list[Tensor], gradients: list[Tensor], **arguments: Any) -> None:
    launch(parameters, None, gradients, beta1=0.0, beta2=0.0, **arguments)
