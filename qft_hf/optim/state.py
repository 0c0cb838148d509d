"""The optimizer's state of one parameter: which tensors, of which form."""

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAST_STEP = 2**62  # no run comes there, and a count beyond 2**63 overflows


class StateTensor(NamedTuple):
    """The form of one tensor.

    Attributes:
        dtype: Of its elements; int8 has codes in [-127, 127].
        shape: Of the tensor.
        fill: What it is full of before the first step. Beside codes of 0 any scale does; 1 is easy
            to read.
        is_signed: Whether values may be negative.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: float = 0.0
    is_signed: bool = True


StateFormat = dict[str, StateTensor]  # by name


def initial_state(wanted: StateFormat, device: torch.device) -> dict[str, Tensor]:
    """What each tensor is full of, and no step yet."""
    tensors = {
        name: torch.full(form.shape, form.fill, dtype=form.dtype, device=device)
        for name, form in wanted.items()
    }
    # On the host, which counts: asking a GPU for its number would mean to wait.
    return {"step": torch.zeros((), dtype=torch.int64), **tensors}


class StepCounter:
    """Counts the steps of one parameter in its state: the tensor `step`, int64, on the host.

    Through numpy, which shares the tensor's memory: that takes a tenth of an operator's time.
    """

    __slots__ = ("_array", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._array = tensor.numpy()

    def next(self) -> int:
        """Count a step and return its number."""
        number: int = self._array.item() + 1
        self._array.fill(number)
        return number


def checked_state(
    state: dict[str, Any],
    wanted: StateFormat,
    *,
    device: torch.device,
    name: str,
    hint: str | None,
) -> dict[str, Tensor]:
    """Copies of a loaded state on the parameter's device.

    Args:
        state: Tensors by name, and the number of the step.
        wanted: Their form.
        device: That of the parameter.
        name: What to call it in an error.
        hint: What to do if the state does not fit; None: the usual advice.

    Raises:
        ValueError: It does not fit the parameter, or is not finite.
    """
    found = {
        key: (value.dtype, tuple(value.shape))
        for key, value in state.items()
        if isinstance(value, Tensor) and key != "step"
    }
    forms = {key: (form.dtype, form.shape) for key, form in wanted.items()}
    if found != forms or "step" not in state:
        raise ValueError(
            f"The state of {name} must be a step and {forms}, got {list(state)} with {found}: "
            + (
                hint
                or "it was saved by another model, another optimizer or another QFTConfig. Resume "
                "with the ones it belongs to."
            )
        )
    for key, form in wanted.items():
        tensor = state[key]
        if not bool(tensor.isfinite().all()) or not (form.is_signed or bool((tensor >= 0).all())):
            raise ValueError(
                f"{key} of {name} has values that are NaN, infinite or, as a scale or a mean of "
                "squares, negative: the optimizer state is damaged. Resume from an earlier "
                "checkpoint, or without the optimizer's state."
            )
        if tensor.dtype == torch.int8 and bool((tensor == -128).any()):
            raise ValueError(
                f"{key} of {name} has -128, which is no code: the optimizer state is damaged. "
                "Resume from an earlier checkpoint, or without the optimizer's state."
            )
    try:
        counted = torch.as_tensor(state["step"]).cpu().reshape(())
        step = counted.to(torch.int64, copy=True)
        is_counted = bool(0 <= step < LAST_STEP and step == counted)
    except (RuntimeError, TypeError, ValueError):
        is_counted = False
    if not is_counted:
        raise ValueError(
            f"The step of {name} is {state['step']}, which no optimizer has counted: its state is "
            "damaged. Resume from an earlier checkpoint."
        )
    tensors = {key: state[key].to(device, copy=True) for key in wanted}
    return {"step": step, **tensors}


def check_form(state_dict: Any) -> None:
    """Raise unless this is what `state_dict` of an optimizer returns, whatever it says.

    Raises:
        ValueError: It is something else.
    """
    is_state = isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()
    if is_state:
        states, groups = state_dict["state"], state_dict["param_groups"]
        is_state = (
            isinstance(states, Mapping)
            and all(isinstance(state, Mapping) for state in states.values())
            and isinstance(groups, list)
            and all(isinstance(group, Mapping) and "params" in group for group in groups)
        )
    if not is_state:
        raise ValueError(
            "The state of an optimizer has 'state', tensors by parameter, and 'param_groups', a "
            f"list, got {reprlib.repr(state_dict)}. Load what state_dict() of an optimizer returns."
        )


def checked_norm(norm: Any) -> Tensor | None:
    """The norm of the step before, which `clipping="previous"` goes by: fp32 scalar, or None.

    Raises:
        ValueError: It is no norm.
    """
    if norm is None:
        return None
    try:
        checked = torch.as_tensor(norm, dtype=torch.float32).reshape(()).clone()
        is_norm = 0 <= float(checked) < float("inf")
    except (RuntimeError, TypeError, ValueError):
        is_norm = False
    if not is_norm:
        raise ValueError(
            f"The norm that clips the next step is {norm}, which no gradients have: the optimizer "
            "state is damaged. Resume from an earlier checkpoint."
        )
    return checked
