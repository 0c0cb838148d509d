"""A step of an INT8 weight in a given direction, in Triton. Twin: `kernels/weight.py`."""

from torch import Tensor

from .. import weight as operators
from ..values import Lion, Rounding, Weight
from .lion import launch


@operators.step_weight_.register("triton")
def step_weight_(
    weight: Weight, direction: Tensor, *, lr: float, weight_decay: float, rounding: Rounding
) -> None:
    # Without momentum the kernel never touches what stands in the place of scales and squares.
    rule = Lion(lr=lr, beta1=0.0, beta2=0.0, weight_decay=weight_decay)
    launch(
        weight, None, (direction, weight.scales), weight.scales, None,
        group_size=weight.group_size, rule=rule, rounding=rounding,
    )  # fmt: skip
