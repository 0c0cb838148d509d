"""The optimizer's state of one parameter: which tensors, of which form."""

from typing import Any

import torch
from torch import Tensor

from ..layout import momentum_shapes
from ..quant import QFTWeight

CODE_DTYPES = {8: torch.int8, 4: torch.uint8}  # of momentum codes, by momentum_bits


def state_format(
    parameter: Tensor, momentum_bits: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each state tensor of a parameter."""
    if momentum_bits == 0:
        return {}
    if not isinstance(parameter, QFTWeight):
        return {"momentum": (torch.float32, tuple(parameter.shape))}
    rows, columns = parameter.shape
    codes, scales = momentum_shapes(rows, columns, momentum_bits)
    return {
        "momentum_codes": (CODE_DTYPES[momentum_bits], codes),
        "momentum_scales": (torch.float32, scales),
    }


def initial_state(parameter: Tensor, momentum_bits: int) -> dict[str, Any]:
    """Zero momentum. Beside codes of 0 any scale does; 1 is easy to read."""
    tensors = {
        name: torch.full(
            shape, 1 if name == "momentum_scales" else 0, dtype=dtype, device=parameter.device
        )
        for name, (dtype, shape) in state_format(parameter, momentum_bits).items()
    }
    return {"step": 0, **tensors}


def checked_state(
    parameter: Tensor, state: dict[str, Any], key: Any, momentum_bits: int
) -> dict[str, Any]:
    """Copies of the loaded state on the parameter's device.

    Raises:
        ValueError: It does not fit the parameter, or is not finite.
    """
    wanted = state_format(parameter, momentum_bits)
    found = {
        name: (value.dtype, tuple(value.shape))
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    }
    if found != wanted or "step" not in state:
        others = [
            bits
            for bits in (*CODE_DTYPES, 0)
            if bits != momentum_bits and found == state_format(parameter, bits)
        ]
        if others and "step" in state:
            raise ValueError(
                f"The state of parameter {key} was saved with momentum_bits={others[0]}, and this "
                f"optimizer has momentum_bits={momentum_bits}. Go on with "
                f"momentum_bits={others[0]}, or start without the saved optimizer state."
            )
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
