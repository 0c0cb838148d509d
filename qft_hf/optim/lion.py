"""`QFTLion`: Lion on INT8 weights, gradients and momentum, and on float parameters beside them."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .. import kernels
from ..gradients import GradientStack
from ..kernels.lion_float import FLOATS
from ..layout import MOMENTUM_BITS, STATE_GROUP_SIZE
from ..quant import Int8Gradient, QFTWeight
from .hooks import GradientHook
from .release import ACCUMULATIONS, CLIPPINGS, GradientRelease, check_release
from .state import checked_state, initial_state

logger = logging.getLogger(__name__)

GRADIENTS = ("stack", "release")
LION_BETAS = (0.9, 0.99)
NONFINITE = ("raise", "skip")

PREVIOUS_NORM = "previous_norm"  # key in a state dict

# Attributes that hold an optimizer's settings beside those of its groups.
SETTINGS = (
    "gradient",
    "momentum_bits",
    "nonfinite",
    "skipped_steps",
    "accumulation",
    "clipping",
    "max_grad_norm",
    "is_accumulating",
)


class QFTLion(Optimizer):
    """Lion with decoupled weight decay; every state of a quantized weight is INT8.

    A `QFTWeight` keeps INT8 momentum (1.02 bytes per parameter) and is rounded stochastically; any
    other parameter, fp32 or bf16, gets ordinary Lion with FP32 momentum. The step consumes the
    gradients: each `.grad` is None afterwards, freed as its parameter is updated.

    Random numbers depend on `seed`, the number of the step, the position of the parameter among
    all parameters and the position of the element, on nothing else: from the same gradients a step
    makes the same bits on any device, with any number of threads and after a restart.

    Args:
        params: Parameters or parameter groups, as any `torch.optim.Optimizer` takes them.
        lr: Step size. Lion wants 1/3 to 1/10 of an AdamW rate.
        betas: Weight of the momentum in the direction, and decay of the momentum.
        weight_decay: Decoupled: weights shrink by `lr * weight_decay` a step.
        gradient: Where a gradient goes. `"stack"`: INT8 gradients wait for `step`. `"release"`:
            each is used and freed the moment backward has completed it, so that only one is alive;
            the results are the same bits. Any backward pass updates weights then, until `eval`.
        momentum_bits: Bits of one momentum value of a quantized weight: 8. Two more are
            experimental; `scripts/studies/momentum_bits.py` measures what they cost. 4: on uneven
            levels in groups of 64 columns, rounded stochastically (0.56 bytes per parameter); a
            small Llama learned 96 % of what it learned with FP32 momentum. 0: no state at all, the
            update is SGD's, `w - lr * (g + weight_decay * w)`, as LOMO has it; rates are 10 to 1000
            times Lion's, there are no betas, and steps are as large as gradients: clip them. It
            learns what FP32 SGD learns, which was a sixth of what Lion did there.
        maximize: Maximize the objective.
        stochastic_rounding: False rounds weights to nearest, for ablation: that does not train.
        nonfinite: What `step` does when a gradient has a NaN or infinity: `"raise"`, or `"skip"`
            the step, drop the gradients, count in `skipped_steps` and log. Either way weights and
            state are untouched. Release cannot skip, and raises when weights are updated, at the
            step: backward does not wait for a GPU to tell.
        accumulation: With `gradient="release"`: `"keep"` the INT8 gradients of micro-batches until
            the last one, or `"forbid"` more than one. See `accumulate`.
        clipping: With `gradient="release"`, how `max_grad_norm` is honoured: `"exact"`,
            `"previous"` or `"tensor"`; see `GradientRelease`. Waiting gradients are clipped as
            usual, by `torch.nn.utils.clip_grad_norm_`.
        max_grad_norm: With `clipping`: the norm to clip to.
        is_accumulating: With `gradient="release"`: whether the backward pass that is running is
            followed by another of the same step. The Trainer's optimizer asks Accelerate; in a loop
            of your own with Accelerate pass `qft_hf.hf.is_accumulating`, else use `accumulate`.
        seed: Key of the random numbers, in [0, 2**63).

    Raises:
        ValueError: An argument is out of its range.

    Source:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675); Li et
        al. 2023, "QFT" (arXiv:2310.07147).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = LION_BETAS,
        weight_decay: float = 0.0,
        *,
        gradient: str = "stack",
        momentum_bits: int = 8,
        maximize: bool = False,
        stochastic_rounding: bool = True,
        nonfinite: str = "raise",
        accumulation: str = "keep",
        clipping: str | None = None,
        max_grad_norm: float | None = None,
        is_accumulating: Callable[[], bool] | None = None,
        seed: int = 0,
    ) -> None:
        _check_choice("gradient", gradient, GRADIENTS)
        _check_choice("accumulation", accumulation, ACCUMULATIONS)
        _check_choice("clipping", clipping, (None, *CLIPPINGS))
        check_release(gradient, nonfinite, clipping, max_grad_norm)
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
            raise ValueError(f"betas must be in [0, 1), got {betas}. Lion's are {LION_BETAS}.")
        if momentum_bits == 0 and tuple(betas) != LION_BETAS:
            raise ValueError(
                f"momentum_bits=0 is SGD, which has no betas, got betas={betas}. Leave them out, "
                "or set momentum_bits=8."
            )
        self.gradient = gradient
        self.momentum_bits = momentum_bits
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        self.accumulation = accumulation
        self.clipping = clipping
        self.max_grad_norm = max_grad_norm
        self.is_accumulating = is_accumulating
        self._prepare()
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

    def _prepare(self) -> None:
        """Make what lives beside the state: where gradients go, and where parameters stand."""
        self._hook = GradientHook(self._take)
        self._stack = GradientStack()
        self._release = (
            GradientRelease(
                accumulation=self.accumulation,
                clipping=self.clipping,
                max_grad_norm=self.max_grad_norm,
                is_accumulating=self.is_accumulating or (lambda: False),
            )
            if self.gradient == "release"
            else None
        )
        self._places: dict[int, tuple[int, int]] = {}  # number and group of each, by identity

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; they are numbered in the order in which they come.

        Raises:
            TypeError: A parameter is neither quantized nor fp32 or bf16.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not isinstance(parameter, QFTWeight) and parameter.dtype not in FLOATS:
                shape = tuple(parameter.shape)
                del self.param_groups[-1]
                raise TypeError(
                    f"QFTLion trains INT8 weights, float32 and bfloat16 parameters, got "
                    f"{parameter.dtype} for a parameter of shape {shape}. Load the model with "
                    "dtype=torch.bfloat16."
                )
        self._number(len(self.param_groups) - 1)

    def _number(self, group: int) -> None:
        for parameter in self.param_groups[group]["params"]:
            self._places[id(parameter)] = (len(self._places), group)

    def train(self) -> None:
        """Have backward hand over finished gradients; the Trainer calls this every step.

        Another `QFTLion` that had these parameters has them no longer.
        """
        for parameter in self._parameters():
            if isinstance(parameter, QFTWeight):
                # The SGD step has no kernel that quantizes on the way.
                parameter.defers_gradient = self._release is not None and self.momentum_bits > 0
            if parameter.requires_grad:
                self._hook.attach(parameter)

    def eval(self) -> None:
        """Leave gradients where backward puts them, until `train` or the next step."""
        for parameter in self._parameters():
            self._hook.detach(parameter)
            if isinstance(parameter, QFTWeight):
                parameter.defers_gradient = False

    def _take(self, parameter: Parameter) -> None:
        """Receive a gradient from backward."""
        if self._release is None:
            self._stack.push(parameter)
        elif (released := self._release.take(parameter)) is not None:
            square = self._update(parameter, released.gradient, released.factor)
            if square is not None:
                self._release.note(square)

    def _parameters(self) -> Iterator[Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and free each gradient.

        INT8 weights go first, newest gradient first; float parameters follow together.

        With `gradient="release"` that has happened during backward, and the step ends here.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: A gradient is not finite and `nonfinite="raise"`. Weights, state and
                gradients are as before.
            TypeError: A quantized weight has a float gradient. Nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter in self._parameters():
            if parameter.grad is not None:
                _check_gradient(parameter, parameter.grad)
                self._stack.push(parameter)  # if set by hand, or before hooks were in place
        if not self._gradients_are_finite():
            self._refuse_step()
            return loss

        if self._release is not None:
            if self._release.finish([p for p in self._parameters() if p.grad is not None]):
                self.train()
        floats = []
        for parameter, gradient in self._stack.drain():
            if isinstance(parameter, QFTWeight):
                self._update(parameter, gradient)
            else:  # norms and biases: tiny, so they wait for each other and go together
                floats.append((parameter, gradient))
        self._update_floats(floats)
        return loss

    def accumulate(self) -> AbstractContextManager[None]:
        """Backward passes within keep their gradients for the one that follows; release needs it.

        The Trainer's optimizer knows without it; see `is_accumulating`.
        """
        return nullcontext() if self._release is None else self._release.accumulate()

    def measure_norm(self) -> AbstractContextManager[None]:
        """A backward pass within only finds the norm that `clipping="exact"` then clips by.

        Raises:
            RuntimeError: Gradients wait for the step and can be clipped as usual.
        """
        if self._release is None:
            raise RuntimeError(
                "measure_norm() is for gradient='release'. With gradient='stack', call "
                "torch.nn.utils.clip_grad_norm_ between backward and step."
            )
        if any(parameter.grad is not None for parameter in self._parameters()):
            raise RuntimeError(
                "measure_norm() would drop the gradients that wait for the step. With "
                "clipping='exact' they are clipped there: run the last micro-batch without it."
            )
        return self._release.measure_norm()

    @property
    def released_norm(self) -> Tensor | None:
        """Global norm, before clipping, of the gradients that the last step released: fp32.

        None if it released none. Gradients that waited for the step are not in it: the norm of
        those is what `torch.nn.utils.clip_grad_norm_` returned.
        """
        return None if self._release is None else self._release.released_norm

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 as torch has it
        """Drop all gradients; with release, also give up a step that failed half-way."""
        super().zero_grad(set_to_none)
        if self._release is not None:
            self._release.clear()

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
        if self._release is not None and self._release.n_used:
            raise self._release.nonfinite_error()
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

    @torch.no_grad()
    def _update(
        self, parameter: Parameter, gradient: Tensor, factor: Tensor | None = None
    ) -> Tensor | None:
        """Update one parameter and its state in place.

        Args:
            parameter: The parameter.
            gradient: Its gradient.
            factor: What a deferred gradient is multiplied by: fp32 scalar.

        Returns:
            The squared norm of a deferred gradient, which is quantized on the way, without the
            factor: fp64 scalar. Else None.
        """
        if not isinstance(parameter, QFTWeight):
            self._update_floats([(parameter, gradient)])
            return None
        stream, number = self._places[id(parameter)]
        state = self._next_state(parameter)
        gradient = cast(Int8Gradient, gradient)  # what backward makes, and `step` has checked
        weight = (
            parameter.codes,
            parameter.scales,
            parameter.outlier_values,
            parameter.outlier_columns,
        )
        arguments = {
            "group_size": parameter.group_size,
            "state_group_size": STATE_GROUP_SIZE,
            "step": state["step"],
            "stream": stream,
            **self._arguments(self.param_groups[number]),
        }
        if self.momentum_bits == 0:
            kernels.sgd_step_(*weight, gradient.codes, gradient.scales, **arguments)
            return None
        momentum = state["momentum_codes"], state["momentum_scales"]
        if gradient.tiles is not None:
            arguments["factor"] = factor
            squares = [
                kernels.quantize_and_lion_step_(
                    *[*(field[rows] for field in (*weight, *momentum)), tile],
                    **{**arguments, "first_row": rows.start},
                )
                for rows, tile in gradient.tiles
            ]
            return torch.stack(squares).sum()
        kernels.lion_step_(*weight, *momentum, gradient.codes, gradient.scales, **arguments)
        return None

    @torch.no_grad()
    def _update_floats(self, pairs: list[tuple[Parameter, Tensor]]) -> None:
        """Update float parameters and their states in place: one call a group and device."""
        calls: dict[tuple[int, torch.device], list[tuple[Parameter, Tensor]]] = {}
        for parameter, gradient in pairs:
            _, number = self._places[id(parameter)]
            calls.setdefault((number, parameter.device), []).append((parameter, gradient))
        for (number, _), members in calls.items():
            states = [self._next_state(parameter) for parameter, _ in members]
            parameters = [parameter for parameter, _ in members]
            gradients = [gradient for _, gradient in members]
            arguments = {
                "steps": [state["step"] for state in states],
                "streams": [self._places[id(parameter)][0] for parameter in parameters],
                **self._arguments(self.param_groups[number]),
            }
            if self.momentum_bits == 0:
                kernels.sgd_step_floats_(parameters, gradients, **arguments)
            else:
                momenta = [state["momentum"] for state in states]
                kernels.lion_step_floats_(parameters, momenta, gradients, **arguments)

    def _next_state(self, parameter: Parameter) -> dict[str, Any]:
        """The state of a parameter, made if need be, with this step counted."""
        state = self.state[parameter]
        if not state:
            state.update(initial_state(parameter, self.momentum_bits))
        state["step"] += 1
        return state

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the kernels take from a parameter group."""
        arguments = {
            "lr": float(group["lr"]),
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "stochastic": group["stochastic_rounding"],
            "seed": group["seed"],
        }
        if self.momentum_bits:
            arguments["beta1"], arguments["beta2"] = group["betas"]
        return arguments

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; INT8 stays INT8.

        `torch.optim.Optimizer` would cast every state tensor to the dtype of its parameter.

        Raises:
            ValueError: The groups do not match, the momentum has other bits, or a state tensor has
                another name, dtype or shape than its parameter calls for. The optimizer is
                unchanged.
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
                states[parameter] = checked_state(
                    parameter, state_dict["state"][key], key, self.momentum_bits
                )
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)
        if self._release is not None:
            self._release.restart(previous_norm=state_dict.get(PREVIOUS_NORM))
        self.train()  # Accelerate loads the state after it has moved the model, which cuts hooks

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: state by parameter, groups, and the norm that clips next."""
        state_dict = super().state_dict()
        if self._release is not None and self._release.previous_norm is not None:
            state_dict[PREVIOUS_NORM] = self._release.previous_norm
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep; `Optimizer` keeps its own three attributes only."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in SETTINGS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by `load_state_dict`, which keeps what lives beside the state."""
        super().__setstate__(state)
        if "_stack" not in self.__dict__:  # unpickled or copied
            self._prepare()
            for group in range(len(self.param_groups)):
                self._number(group)


def _check_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Raise for a gradient that no QFT module has made."""
    if isinstance(parameter, QFTWeight) and not isinstance(gradient, Int8Gradient):
        raise TypeError(
            f"A quantized weight of shape {tuple(parameter.shape)} has a gradient of type "
            f"{type(gradient).__name__}; only Int8Gradient is expected. Do not assign .grad by "
            "hand, and use the weight through its QFT module."
        )


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        wanted = " or ".join(map(repr, choices))
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")
