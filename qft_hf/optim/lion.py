"""`QFTLion`: Lion on INT8 weights, gradients and momentum, and on float parameters beside them."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .. import kernels
from ..gradients import GradientStack
from ..layout import STATE_GROUP_SIZE, GroupLayout
from ..quant import Int8Gradient, QFTWeight

logger = logging.getLogger(__name__)

GRADIENTS = ("stack",)
MOMENTUM_BITS = (8,)
NONFINITE = ("raise", "skip")


class QFTLion(Optimizer):
    """Lion with decoupled weight decay; every state of a quantized weight is INT8.

    A `QFTWeight` keeps INT8 momentum (1.02 bytes per parameter) and is rounded stochastically; any
    other parameter, fp32 or bf16, gets ordinary Lion with FP32 momentum. The step consumes the
    gradients: each `.grad` is None afterwards, freed as its parameter is updated.

    Random numbers depend on `seed`, the number of the step, the position of the parameter among
    all parameters and the position of the element, on nothing else: runs repeat and resume bit for
    bit on any device.

    Args:
        params: Parameters or parameter groups, as any `torch.optim.Optimizer` takes them.
        lr: Step size. Lion wants 1/3 to 1/10 of an AdamW rate.
        betas: Weight of the momentum in the direction, and decay of the momentum.
        weight_decay: Decoupled: weights shrink by `lr * weight_decay` a step.
        gradient: Where a gradient goes. `"stack"`: INT8 gradients wait for `step`.
        momentum_bits: Bits of one momentum value of a quantized weight: 8.
        maximize: Maximize the objective.
        stochastic_rounding: False rounds weights to nearest, for ablation: that does not train.
        nonfinite: What `step` does when a gradient has a NaN or infinity: `"raise"`, or `"skip"`
            the step, drop the gradients, count in `skipped_steps` and log. Either way weights and
            state are untouched.
        seed: Key of the random numbers, in [0, 2**63).

    Raises:
        ValueError: An argument is out of its range.

    Source:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675); Zhang
        et al. 2023, "QFT" (arXiv:2310.07147).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        gradient: str = "stack",
        momentum_bits: int = 8,
        maximize: bool = False,
        stochastic_rounding: bool = True,
        nonfinite: str = "raise",
        seed: int = 0,
    ) -> None:
        _check_choice("gradient", gradient, GRADIENTS)
        _check_choice("momentum_bits", momentum_bits, MOMENTUM_BITS)
        _check_choice("nonfinite", nonfinite, NONFINITE)
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}.")
        if lr < 0 or weight_decay < 0:
            raise ValueError(
                f"lr and weight_decay must not be negative, got lr={lr}, "
                f"weight_decay={weight_decay}. To climb, set maximize=True."
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}. Lion's are (0.9, 0.99).")
        self.gradient = gradient
        self.momentum_bits = momentum_bits
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        self._stack = GradientStack()
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "weight_decay": weight_decay,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)
        self.train()

    def train(self) -> None:
        """Have backward push finished gradients on the stack; the Trainer calls this every step.

        `Module.to()` and `quantize_model_` replace the inside of a parameter: it still lists its
        hooks then, but autograd does not call them. Setting the list again connects them.
        """
        for parameter in self._parameters():
            if not parameter.requires_grad:
                continue
            hooks = parameter._post_accumulate_grad_hooks
            if hooks and self._stack.push in hooks.values():
                parameter._post_accumulate_grad_hooks = hooks
            else:
                parameter.register_post_accumulate_grad_hook(self._stack.push)

    def eval(self) -> None:
        """Nothing to do; the counterpart of `train` for those who call both."""

    def _parameters(self) -> Iterator[Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, newest first, and free each gradient.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: A gradient is not finite and `nonfinite="raise"`. Weights, state and
                gradients are as before.
            TypeError: A parameter is neither quantized nor fp32 or bf16.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in self._parameters():
            if parameter.grad is not None:  # set by hand, or before hooks were in place
                self._stack.push(parameter)
        if not self._gradients_are_finite():
            self._refuse_step()
            return loss

        places = {
            id(parameter): (stream, group)
            for stream, (parameter, group) in enumerate(
                (parameter, group) for group in self.param_groups for parameter in group["params"]
            )
        }
        for parameter, gradient in self._stack.drain():
            stream, group = places[id(parameter)]
            self._update(parameter, gradient, group=group, stream=stream)
        return loss

    def _gradients_are_finite(self) -> bool:
        flags = [
            gradient.is_finite()
            if isinstance(gradient, Int8Gradient)
            else gradient.isfinite().all()
            for parameter in self._parameters()
            if (gradient := parameter.grad) is not None
        ]
        # One transfer to the host for all of them.
        return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())

    def _refuse_step(self) -> None:
        if self.nonfinite == "raise":
            raise FloatingPointError(
                "A gradient is NaN or infinite, so the step was not taken; weights and optimizer "
                "state are unchanged. Lower the learning rate or look at the batch; "
                "nonfinite='skip' drops such steps and counts them in skipped_steps."
            )
        self.skipped_steps += 1
        logger.warning("Step skipped: a gradient is not finite (%d so far)", self.skipped_steps)
        self._stack.clear()
        self.zero_grad()

    def _update(
        self, parameter: Parameter, gradient: Tensor, *, group: dict[str, Any], stream: int
    ) -> None:
        """Update one parameter and its state in place."""
        state = self.state[parameter]
        if not state:
            state.update(_initial_state(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        arguments = {
            "lr": float(group["lr"]),
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "stochastic": group["stochastic_rounding"],
            "seed": group["seed"],
            "step": state["step"],
            "stream": stream,
        }
        if not isinstance(parameter, QFTWeight):
            kernels.lion_step_float_(parameter, state["momentum"], gradient, **arguments)
            return
        if not isinstance(gradient, Int8Gradient):
            raise TypeError(
                f"A quantized weight of shape {tuple(parameter.shape)} has a gradient of type "
                f"{type(gradient).__name__}; only Int8Gradient is expected. Do not assign .grad by "
                "hand, and use the weight through its QFT module."
            )
        kernels.lion_step_(
            parameter.codes,
            parameter.scales,
            parameter.outlier_values,
            parameter.outlier_columns,
            state["momentum_codes"],
            state["momentum_scales"],
            gradient.codes,
            gradient.scales,
            group_size=parameter.group_size,
            state_group_size=STATE_GROUP_SIZE,
            **arguments,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; INT8 stays INT8.

        `torch.optim.Optimizer` would cast every state tensor to the dtype of its parameter.

        Raises:
            ValueError: The groups do not match, or a state tensor has another name, dtype or shape
                than its parameter calls for. The optimizer is unchanged.
        """
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = list(self._parameters())
        if len(saved) != len(own):
            raise ValueError(
                f"The optimizer state is for {len(saved)} parameters, this optimizer has "
                f"{len(own)}: it was saved by another model. Resume with the model it belongs to."
            )
        states: dict[Tensor, Any] = {}
        for key, parameter in zip(saved, own, strict=True):
            if key in state_dict["state"]:
                states[parameter] = _checked_state(parameter, state_dict["state"][key], key)
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep; `Optimizer` keeps its own three attributes only."""
        own = ("gradient", "momentum_bits", "nonfinite", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by `load_state_dict`; an unpickled optimizer gets a stack of its own."""
        super().__setstate__(state)
        if "_stack" not in self.__dict__:
            self._stack = GradientStack()


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        wanted = " or ".join(map(repr, choices))
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def _state_format(parameter: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each state tensor of a parameter."""
    if not isinstance(parameter, QFTWeight):
        return {"momentum": (torch.float32, tuple(parameter.shape))}
    rows, columns = parameter.shape
    n_groups = GroupLayout(rows, columns, STATE_GROUP_SIZE).n_groups
    return {
        "momentum_codes": (torch.int8, (rows, columns)),
        "momentum_scales": (torch.float32, (rows, n_groups)),
    }


def _initial_state(parameter: Tensor) -> dict[str, Any]:
    """Zero momentum; scales of zero codes are 1."""
    tensors = {
        name: torch.full(
            shape, 1 if name == "momentum_scales" else 0, dtype=dtype, device=parameter.device
        )
        for name, (dtype, shape) in _state_format(parameter).items()
    }
    return {"step": 0, **tensors}


def _checked_state(parameter: Tensor, state: dict[str, Any], key: Any) -> dict[str, Any]:
    """Copies of the loaded state on the parameter's device, or ValueError if it does not fit."""
    wanted = _state_format(parameter)
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
    tensors = {name: state[name].to(parameter.device, copy=True) for name in wanted}
    return {"step": int(state["step"]), **tensors}
