"""The optimizer's state of one parameter: which tensors, of which form."""

from typing import Any

import torch
from torch import Tensor

from ..layout import STATE_GROUP_SIZE, GroupLayout
from ..quant import QFTWeight


def state_format(parameter: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each state tensor of a parameter."""
    if not isinstance(parameter, QFTWeight):
        return {"momentum": (torch.float32, tuple(parameter.shape))}
    rows, columns = parameter.shape
    n_groups = GroupLayout(rows, columns, STATE_GROUP_SIZE).n_groups
    return {
        "momentum_codes": (torch.int8, (rows, columns)),
        "momentum_scales": (torch.float32, (rows, n_groups)),
    }


def initial_state(parameter: Tensor) -> dict[str, Any]:
    """Zero momentum; scales of zero codes are 1."""
    tensors = {
        name: torch.full(
            shape, 1 if name == "momentum_scales" else 0, dtype=dtype, device=parameter.device
        )
        for name, (dtype, shape) in state_format(parameter).items()
    }
    return {"step": 0, **tensors}


def checked_state(parameter: Tensor, state: dict[str, Any], key: Any) -> dict[str, Any]:
    """Copies of the loaded state on the parameter's device.

    Raises:
        ValueError: It does not fit the parameter, or is not finite.
    """
    wanted = state_format(parameter)
    found = {
        name: (value.dtype, tuple(value.shape))
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    }
    if found != wanted or "step" not in state:
        raise ValueError(
            f"The state of parameter {key} must be a step and {wanted}, got {list(state)} with "
            f"{found}: it was saved by another model, another optimizer or another QFTConfig. "
            "Resume with the ones it belongs to."
        )
    for name in wanted:
        if not bool(state[name].isfinite().all()):
            raise ValueError(
                f"{name} of parameter {key} has NaN or infinite values: the optimizer state is "
                "damaged. Resume from an earlier checkpoint, or without the optimizer's state."
            )
    tensors = {name: state[name].to(parameter.device, copy=True) for name in wanted}
    return {"step": int(state["step"]), **tensors}
