"""A step of an INT8 weight in a given direction, in Triton. Twin: `kernels/weight.py`."""

from torch import Tensor

from .. import weight as operators
from ..values import Lion, Rounding, Weight
from .lion import launch


@operators.step_weight_.register("triton")
def step_weight_(
    weight: Weight,
    direction: Tensor,
    *,
    lr: float,
    weight_decay: float,
    rounding: Rounding,
) -> None:
    # Without momentum the kernel never accesses the gradient scales and squares that it is passed.
    rule = Lion.without_momentum(lr, weight_decay)
    launch(
        weight, None, (direction, weight.scales), weight.scales, None,
        group_size=weight.group_size, rule=rule, rounding=rounding,
    )  # fmt: skip
