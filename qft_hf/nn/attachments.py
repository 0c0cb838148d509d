"""What others have put on a parameter survives when the inside of the parameter is replaced.

`quantize_model_`, `dequantize_model_` and `Module.to()` swap a parameter's inside, and autograd's
hooks and Python attributes would go with the old one. Without them a mask that a user has put on
the gradient would be gone, and nobody would say so.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Attributes of ours and of PyTorch that belong to the inside.
INSIDE = ("stored", "arrangement", "pending", "is_table", "_is_param")


class Attachments(NamedTuple):
    """Hooks and attributes of one parameter."""

    backward_hooks: Any
    accumulate_hooks: Any
    attributes: dict[str, Any]


def attachments(parameter: Tensor) -> Attachments:
    """What is attached to a parameter; handles of hooks refer to these dictionaries."""
    return Attachments(
        parameter._backward_hooks,
        parameter._post_accumulate_grad_hooks,
        {name: value for name, value in vars(parameter).items() if name not in INSIDE},
    )


def attach_(parameter: Tensor, attached: Attachments) -> None:
    """Connect hooks and attributes to a parameter that has a new inside."""
    if attached.backward_hooks:
        parameter._backward_hooks = attached.backward_hooks
    if attached.accumulate_hooks:
        parameter._post_accumulate_grad_hooks = attached.accumulate_hooks
    for name, value in attached.attributes.items():
        setattr(parameter, name, value)


def replace_(parameter: Tensor, tensor: Tensor) -> None:
    """Put `tensor` in the place of a parameter's value; everybody who holds it sees the new one.

    Hooks and attributes that others have put on the parameter stay.
    """
    attached = attachments(parameter)
    parameter.grad = None
    torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    attach_(parameter, attached)
