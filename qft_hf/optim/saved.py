"""The saved form of an optimizer's state: plain tensors and numbers.

It is the same whether one process has trained or several: `whole_states` gathers the rows of all
processes, and `loaded` selects the own ones. Everything is checked before anything changes.
"""

import copy
import reprlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..quant import QFTWeight

PREVIOUS_NORM = "previous_norm"  # key of the norm that `clipping="previous"` clips by
SKIPPED_STEPS = "skipped_steps"  # key of their number, if there are any
LAST_STEP = 2**62  # no run gets this far, and a count beyond 2**63 overflows


class Loaded(NamedTuple):
    """Contents of a state dict, made for an optimizer."""

    # State by parameter: copies of the own rows, on the parameter's device.
    states: defaultdict[Tensor, dict[str, Tensor]]
    groups: list[dict[str, Any]]  # options of each group, with the parameters of the optimizer
    previous_norm: Tensor | None  # fp32 scalar, or None
    skipped_steps: int  # steps that were skipped because a gradient was not finite


def loaded(state_dict: dict[str, Any], optimizer: Any) -> Loaded:
    """Check a state dict against a `QFTOptimizer`, and copy it. Neither is modified.

    Raises:
        ValueError: The groups do not match, an option is out of its range, or a state tensor has
            another name, dtype or shape than its parameter calls for.
    """
    check_form(state_dict)
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    own = list(optimizer.parameters())
    if len(saved) != len(own):
        raise ValueError(
            f"The optimizer state is for {len(saved)} parameters, this optimizer has "
            f"{len(own)}: it was saved by another model. Resume with the model it belongs to."
        )
    if unknown := [key for key in state_dict["state"] if key not in saved]:
        raise ValueError(
            f"The optimizer state has parameter {unknown[0]}, which is in none of its groups: "
            "it is damaged. Resume from an earlier checkpoint."
        )
    groups = _loaded_groups(state_dict["param_groups"], optimizer)
    previous_norm = _checked_norm(state_dict.get(PREVIOUS_NORM))
    skipped_steps = state_dict.get(SKIPPED_STEPS, 0)
    if not isinstance(skipped_steps, int) or skipped_steps < 0:
        raise ValueError(
            f"The number of skipped steps must be a whole number from 0, got {skipped_steps!r}: "
            "the optimizer state is damaged. Resume from an earlier checkpoint."
        )
    states: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    for key, parameter in zip(saved, own, strict=True):
        if key in state_dict["state"]:
            state = _checked_state(
                state_dict["state"][key], optimizer, parameter, name=f"parameter {key}"
            )
            if optimizer.processes is not None:
                state = optimizer.processes.own_state(state, parameter)
            states[parameter] = state
    return Loaded(states, groups, previous_norm, skipped_steps)


def whole_states(optimizer: Any) -> dict[int, dict[str, Tensor | None]]:
    """Gather the state tensors of INT8 weights, by parameter number, on the host of process 0.

    Every process must call this; processes other than 0 get None for each tensor.
    """
    return {
        number: {
            name: optimizer.processes.whole(state[name], parameter.arrangement.matrix_shape[0])
            for name in optimizer.state_format(parameter)
        }
        for number, parameter in enumerate(optimizer.parameters())
        if isinstance(parameter, QFTWeight) and (state := optimizer.state.get(parameter))
    }


def check_form(state_dict: Any) -> None:
    """Raise unless this has the structure of an optimizer's `state_dict`; values may be any.

    Raises:
        ValueError: It has another structure.
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


def _loaded_groups(saved: list[dict[str, Any]], optimizer: Any) -> list[dict[str, Any]]:
    """Return checked copies of the groups of a state dict, with this optimizer's parameters."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if (theirs := [len(group["params"]) for group in saved]) != sizes:
        raise ValueError(
            f"The optimizer state has groups of {theirs} parameters, this optimizer of {sizes}"
            ": it was saved with other groups. Resume with the ones it belongs to."
        )
    groups = []
    for own, group in zip(optimizer.param_groups, saved, strict=True):
        # Options that an older version did not save get their defaults.
        kept = {name: own[name] for name in ("params", "param_names") if name in own}
        options = {name: value for name, value in group.items() if name != "params"}
        groups.append(optimizer.defaults | kept | copy.deepcopy(options))
        optimizer.check_group(groups[-1])
    return groups


def _checked_state(
    state: dict[str, Any], optimizer: Any, parameter: Parameter, *, name: str
) -> dict[str, Tensor]:
    """Return copies of a loaded state on the parameter's device.

    Args:
        state: Tensors by name, and the number of the step.
        optimizer: Says which state the parameter has.
        parameter: The parameter.
        name: Its name in an error text.

    Raises:
        ValueError: The state does not fit the parameter, or has invalid values.
    """
    wanted = optimizer.state_format(parameter)
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
                optimizer.state_hint(parameter, state)
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
                f"{key} of {name} has -128, which is not a code: the optimizer state is damaged. "
                "Resume from an earlier checkpoint, or without the optimizer's state."
            )
    try:
        counted = torch.as_tensor(state["step"], device="cpu").reshape(())
        step = counted.to(torch.int64, copy=True)
        is_counted = bool(0 <= step < LAST_STEP and step == counted)
    except (RuntimeError, TypeError, ValueError):
        is_counted = False
    if not is_counted:
        raise ValueError(
            f"The step of {name} is {state['step']}, which is not a valid count: its state is "
            "damaged. Resume from an earlier checkpoint."
        )
    tensors = {key: state[key].to(parameter.device, copy=True) for key in wanted}
    return {"step": step, **tensors}


def _checked_norm(norm: Any) -> Tensor | None:
    """Return the previous step's norm, for `clipping="previous"`: fp32 scalar or None.

    Raises:
        ValueError: It is not a finite number of at least 0.
    """
    if norm is None:
        return None
    try:
        device = norm.device if isinstance(norm, Tensor) else "cpu"
        checked = torch.as_tensor(norm, dtype=torch.float32, device=device).reshape(()).clone()
        is_norm = 0 <= float(checked) < float("inf")
    except (RuntimeError, TypeError, ValueError):
        is_norm = False
    if not is_norm:
        raise ValueError(
            f"The norm that clips the next step is {norm}, which is not a valid norm: the "
            "optimizer state is damaged. Resume from an earlier checkpoint."
        )
    return checked
