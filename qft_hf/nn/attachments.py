"""Keeps a parameter's hooks and attributes when the tensor inside it is replaced.

`quantize_model_`, `dequantize_model_` and `Module.to()` swap the tensor inside a parameter, and
autograd's hooks and Python attributes would be lost with the old one. A user's hook that masks the
gradient would then no longer run, without an error.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Attributes of this package and of PyTorch that belong to the inner tensor.
INSIDE = ("stored", "arrangement", "pending", "is_table", "_is_param")


class Attachments(NamedTuple):
    """Hooks and attributes of one parameter."""

    backward_hooks: Any
    accumulate_hooks: Any
    attributes: dict[str, Any]


def attachments(parameter: Tensor) -> Attachments:
    """Return the hooks and attributes of a parameter; hook handles refer to these dictionaries."""
    return Attachments(
        parameter._backward_hooks,
        parameter._post_accumulate_grad_hooks,
        {name: value for name, value in vars(parameter).items() if name not in INSIDE},
    )


def attach_(parameter: Tensor, attached: Attachments) -> None:
    """Connect hooks and attributes to a parameter whose inner tensor was replaced."""
    if attached.backward_hooks:
        parameter._backward_hooks = attached.backward_hooks
    if attached.accumulate_hooks:
        parameter._post_accumulate_grad_hooks = attached.accumulate_hooks
    for name, value in attached.attributes.items():
        setattr(parameter, name, value)


def replace_(parameter: Tensor, tensor: Tensor) -> None:
    """Replace a parameter's value by `tensor`; all references to the parameter see the new value.

    Hooks and attributes that other code has put on the parameter are kept.
    """
    attached = attachments(parameter)
    parameter.grad = None
    torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    attach_(parameter, attached)
