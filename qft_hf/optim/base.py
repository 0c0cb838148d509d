"""`QFTOptimizer`: all that the optimizers of INT8 weights have in common.

A rule, such as Lion's (`lion.py`), says which state a parameter has and how one step goes. Here is
the rest: parameters are numbered, each gradient that the flow (`flow.py`) hands over becomes an
update, and steps are counted for the random numbers that round. What is saved and loaded is the
state as it is stored (`saved.py`).
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, overload
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .. import kernels
from ..kernels.floats import PARAMETER_DTYPES
from ..quant import Int8Gradient, QFTWeight, TiledGradient
from .agreement import agree_on_settings
from .flow import Flow
from .processes import Processes
from .release import Release
from .rows import RowsRelease, RowsStack
from .saved import PREVIOUS_NORM, check_form, loaded, whole_states
from .settings import check_group, check_settings
from .stack import Stack
from .state import StateFormat, StepCounter, initial_state

logger = logging.getLogger(__name__)

OWN_ROWS = "own rows"  # key of the plans of a weight

_living: WeakSet["QFTOptimizer"] = WeakSet()


class QFTOptimizer(Optimizer):
    """Base of the optimizers whose weights, gradients and state are INT8.

    Random numbers depend on `seed`, the number of the step, the position of the parameter among
    all parameters and the position of the element, on nothing else: from the same gradients a step
    makes the same bits on any device, with any number of threads and after a restart.

    A step consumes the gradients: each `.grad` is None afterwards, freed as its parameter is
    updated.

    Args:
        params: Parameters or parameter groups, as any `torch.optim.Optimizer` takes them.
        defaults: Options of a group beside those below, `lr` and `weight_decay` among them.
        gradient: Where a gradient goes. `"stack"`: INT8 gradients wait for `step`. `"release"`:
            each is used and freed the moment backward has completed it, so that only one is alive;
            the results are the same bits. Any backward pass updates weights then, until `eval`.
        maximize: Maximize the objective.
        stochastic_rounding: False rounds weights to nearest, for ablation: that does not train.
        nonfinite: What `step` does when a gradient has a NaN or infinity: `"raise"`, or `"skip"`
            the step, drop the gradients, count in `skipped_steps` and log. Either way weights and
            state are untouched. Release cannot skip, and raises when weights are updated, at the
            step: backward does not wait for a GPU to tell.
        accumulation: With `gradient="release"`: `"keep"` the INT8 gradients of micro-batches until
            the last one, or `"forbid"` more than one. See `accumulate`.
        clipping: With `gradient="release"`, how `max_grad_norm` is honoured: `"exact"`,
            `"previous"` or `"tensor"`; see `release.Release`. Waiting gradients are clipped as
            usual, by `torch.nn.utils.clip_grad_norm_`.
        max_grad_norm: With `clipping`: the norm to clip to.
        is_accumulating: With `gradient="release"`: whether the backward pass that is running is
            followed by another of the same step. The Trainer's optimizer asks Accelerate; in a loop
            of your own with Accelerate pass `qft_hf.hf.is_accumulating`, else use `accumulate`.
        seed: Key of the random numbers, in [0, 2**63).

    Raises:
        ValueError: An argument is out of its range.
    """

    # Settings beside those of the groups: arguments of `__init__` and attributes.
    SETTINGS: ClassVar[tuple[str, ...]] = (
        "gradient",
        "nonfinite",
        "accumulation",
        "clipping",
        "max_grad_norm",
        "is_accumulating",
    )

    takes_tiles = False
    # Whether steps take their numbers from `live`, if it has any: else no graph may repeat one.
    reads_live = False

    @property
    def description(self) -> str:
        """The rule and how its state is stored, for a model card."""
        return type(self).__name__

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        gradient: str = "stack",
        maximize: bool = False,
        stochastic_rounding: bool = True,
        nonfinite: str = "raise",
        accumulation: str = "keep",
        clipping: str | None = None,
        max_grad_norm: float | None = None,
        is_accumulating: Callable[[], bool] | None = None,
        seed: int = 0,
    ) -> None:
        check_settings(gradient, nonfinite, accumulation, clipping, max_grad_norm)
        self.gradient = gradient
        self.nonfinite = nonfinite
        self.accumulation = accumulation
        self.clipping = clipping
        self.max_grad_norm = max_grad_norm
        self.is_accumulating = is_accumulating
        self.skipped_steps = 0
        self._prepare()
        own = {"maximize": maximize, "stochastic_rounding": stochastic_rounding, "seed": seed}
        super().__init__(params, {**defaults, **own})
        self.train()

    def _prepare(self) -> None:
        """Make what lives beside the state: where gradients go, and where parameters stand."""
        self.processes = Processes.found()
        self.flow = self._make_flow()
        self._places: dict[int, tuple[int, int]] = {}  # number and group of each, by identity
        # What is made of state tensors once, by their identity.
        self._quantized: dict[int, kernels.Quantized] = {}
        self._counters: dict[int, StepCounter] = {}
        self._has_stepped = False
        self._n_begun_anew = 0  # states since the last step
        self._whole: dict[int, dict[str, Any]] | None = None  # what `consolidate` has brought
        # The numbers of this step, and what puts them there: see `capturable.py`.
        self.live: Tensor | None = None
        self.write_numbers: Callable[[], None] | None = None
        _living.add(self)

    def _make_flow(self) -> Flow:
        if self.processes is None:
            return Stack(self) if self.gradient == "stack" else Release(self)
        return RowsStack(self) if self.gradient == "stack" else RowsRelease(self)

    # --- what a rule provides

    @abstractmethod
    def state_format(self, parameter: Tensor) -> StateFormat:
        """The form of each state tensor of a parameter, quantized or float."""

    def state_hint(self, parameter: Tensor, state: dict[str, Any]) -> str | None:
        """What a state that does not fit would fit, for an error; None: nothing known."""
        return None

    @abstractmethod
    def step_weight(
        self,
        weight: kernels.Weight,
        gradient: kernels.Quantized,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: kernels.Rounding,
    ) -> None:
        """One step of a quantized weight and its state, in place.

        Args:
            weight: Modified.
            gradient: Finite.
            state: Its state tensors by name, modified.
            group: Options of its group.
            rounding: The random numbers; its `step` is the number of this step, from 1.
        """

    @abstractmethod
    def step_floats(
        self,
        parameters: list[Parameter],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
        steps: list[int],
        streams: list[int],
    ) -> None:
        """One step of float parameters of one group on one device, in place."""

    def step_tiles(
        self,
        weight: kernels.Weight,
        gradient: TiledGradient,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: kernels.Rounding,
        factor: Tensor | None,
    ) -> Tensor:
        """`step_weight` with a gradient in float tiles, where `takes_tiles` says so.

        Args:
            weight: Modified.
            gradient: Rows that are not finite leave theirs of weight and state alone.
            state: Modified.
            group: Options of its group.
            rounding: The random numbers.
            factor: What the quantized gradient is multiplied by: fp32 scalar or None.

        Returns:
            Sums of squares of the quantized gradient, without the factor: fp64, to be added up.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no gradients in tiles.")

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """What a parameter of this group finds in `live` at this step: up to `N_LIVE` numbers."""
        return float(group["lr"]), float(group["weight_decay"]), step

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise for options of a group that are out of their range.

        Raises:
            ValueError: The text names the option and its range.
        """
        check_group(group)

    # --- what a rule may use

    def live_of(self, stream: int, n_numbers: int = 3) -> Tensor | None:
        """The first numbers in `live` of the parameter of this stream, if there are any."""
        return None if self.live is None else self.live[stream, :n_numbers]

    def quantized(
        self, state: dict[str, Tensor], name: str, group_size: int | None, bits: int = 8
    ) -> kernels.Quantized:
        """The state tensors `<name>_codes` and `<name>_scales` together; checked and made once."""
        codes = state[f"{name}_codes"]
        found = self._quantized.get(id(codes))
        if found is None or found.codes is not codes:
            found = kernels.Quantized(codes, state[f"{name}_scales"], group_size, bits)
            self._quantized[id(codes)] = found
        return found

    # --- parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; they are numbered in the order in which they come.

        Raises:
            TypeError: A parameter is neither quantized nor fp32 or bf16.
            ValueError: An option is out of its range. The optimizer is unchanged.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            for parameter in group["params"]:
                if not isinstance(parameter, QFTWeight) and parameter.dtype not in PARAMETER_DTYPES:
                    raise TypeError(
                        f"{type(self).__name__} trains INT8 weights, float32 and bfloat16 "
                        f"parameters, got {parameter.dtype} for a parameter of shape "
                        f"{tuple(parameter.shape)}. Load the model with dtype=torch.bfloat16."
                    )
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        self._number(len(self.param_groups) - 1)
        if self.flow.is_attached:
            self.flow.attach(group["params"])

    def _number(self, group: int) -> None:
        for parameter in self.param_groups[group]["params"]:
            self._places[id(parameter)] = (len(self._places), group)

    def parameters(self) -> Iterator[Parameter]:
        """All, in the order of their numbers."""
        for group in self.param_groups:
            yield from group["params"]

    # --- where gradients go

    def train(self) -> None:
        """Have backward hand over complete gradients; the Trainer calls this every step.

        Another optimizer that had these parameters has them no longer.
        """
        self.flow.attach(self.parameters())

    def eval(self) -> None:
        """Leave gradients where backward puts them, until `train` or the next step."""
        self.flow.detach(self.parameters())

    def accumulate(self) -> AbstractContextManager[None]:
        """Backward passes within keep their gradients for the one that follows; release needs it.

        The Trainer's optimizer knows without it; see `is_accumulating`.
        """
        return self.flow.accumulate()

    def measure_norm(self) -> AbstractContextManager[None]:
        """A backward pass within only finds the norm that `clipping="exact"` then clips by.

        Raises:
            RuntimeError: Gradients wait for the step and can be clipped as usual.
        """
        return self.flow.measure_norm()

    @property
    def n_released(self) -> int:
        """How many gradients of the step that is under way have been used already."""
        return self.flow.n_taken if self.gradient == "release" else 0

    @property
    def released_norm(self) -> Tensor | None:
        """Global norm, before clipping, of the gradients that the last step released: fp32.

        None if it released none. Gradients that waited for the step are not in it: the norm of
        those is what `torch.nn.utils.clip_grad_norm_` returned.
        """
        return self.flow.released_norm

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 as torch has it
        """Drop all gradients, and give up a step that failed half-way."""
        super().zero_grad(set_to_none)
        self.flow.clear()

    # --- a step

    def check_groups(self) -> None:
        """`check_group` of all: a scheduler may have written anything since the last step."""
        for group in self.param_groups:
            self.check_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and free each gradient.

        INT8 weights go first; float parameters follow together. With `gradient="release"` INT8
        weights were updated during backward, and the step ends here.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: A gradient is not finite and `nonfinite="raise"`. If gradients have
                waited, weights, state and gradients are as before.
            RuntimeError: The step before was interrupted half-way.
            ValueError: An option of a group is out of its range. Nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._n_begun_anew:
            logger.warning(
                "%d weights have become float or INT8 since the last step: "
                "their state in %s begins anew",
                self._n_begun_anew,
                type(self).__name__,
            )
            self._n_begun_anew = 0
        if self.write_numbers is None:
            self.check_groups()
        else:  # which checks them
            self.write_numbers()
        if not self._has_stepped:
            if self.processes is None and Processes.found() is not None:
                raise RuntimeError(
                    f"{type(self).__name__} was made before torch.distributed.init_process_group, "
                    "and would train this process alone. Make it afterwards."
                )
            self._has_stepped = True
            self._warn_without_int8()
        try:
            is_taken = self.flow.step(list(self.parameters()))
        finally:
            self.live = None
        if not is_taken:
            self.skipped_steps += 1
            logger.warning("Step skipped: a gradient is not finite (%d so far)", self.skipped_steps)
            self.zero_grad()
        return loss

    def _warn_without_int8(self) -> None:
        n_parameters = sum(1 for _ in self.parameters())
        if n_parameters and not any(isinstance(p, QFTWeight) for p in self.parameters()):
            logger.warning(
                "%s trains no INT8 weight: its %d parameters are float, and so are their gradients "
                "and their state. To train in INT8, call qft_hf.quantize_model_(model, "
                "qft_hf.QFTConfig()) on the model; the optimizer may be made before or after that",
                type(self).__name__,
                n_parameters,
            )

    def update(
        self, parameter: Parameter, gradient: Tensor, factor: Tensor | None = None
    ) -> Tensor | None:
        """Update one quantized weight and its state in place; the flow calls it.

        Args:
            parameter: A `QFTWeight`.
            gradient: An `Int8Gradient`, or a `TiledGradient` where `takes_tiles` says so.
            factor: What a gradient in tiles is multiplied by: fp32 scalar.

        Returns:
            Squared norms of the rows of a gradient in tiles, without the factor: fp64. Else None.
        """
        stream, number = self._places[id(parameter)]
        group = self.param_groups[number]
        state = self._state_of(parameter)
        rounding = kernels.Rounding(
            group["seed"], self._next_step(state), stream, stochastic=group["stochastic_rounding"]
        )
        stored: kernels.Weight = parameter.stored  # type: ignore[attr-defined]  # a QFTWeight
        codes = stored.codes
        own: slice | None = gradient.own_rows  # type: ignore[attr-defined]
        if own is not None:  # of several processes
            if not gradient.has_rows:  # type: ignore[attr-defined]  # of `own_rows.py`
                return None
            rounding = rounding._replace(first_row=own.start)
            plan = stored.plans.get(OWN_ROWS)
            if plan is None:
                plan = stored.plans[OWN_ROWS] = stored.rows(own)
            stored = plan
            self._whole = None
        # Autograd then refuses to read for backward what has moved on since it was used. Compiled
        # layers keep the codes for it, not the weight.
        torch.autograd.graph.increment_version((parameter, codes))
        if isinstance(gradient, TiledGradient):
            return self.step_tiles(stored, gradient, state, group, rounding, factor)
        if isinstance(gradient, Int8Gradient):
            self.step_weight(stored, gradient.stored, state, group, rounding)
        return None

    @torch.no_grad()
    def update_floats(self, pairs: list[tuple[Parameter, Tensor]]) -> None:
        """Update float parameters and their states in place: one call a group and device."""
        calls: dict[tuple[int, torch.device], list[tuple[Parameter, Tensor]]] = {}
        for parameter, gradient in pairs:
            _, number = self._places[id(parameter)]
            calls.setdefault((number, parameter.device), []).append((parameter, gradient))
        for (number, _), members in calls.items():
            parameters, gradients = (list(part) for part in zip(*members, strict=True))
            states = [self._state_of(parameter) for parameter in parameters]
            self.step_floats(
                parameters,
                gradients,
                states,
                self.param_groups[number],
                [self._next_step(state) for state in states],
                [self._places[id(parameter)][0] for parameter in parameters],
            )

    def updated(self, parameters: Sequence[Parameter]) -> None:
        """Do what updates do on the host, after a graph has repeated them on the device."""
        for parameter in parameters:
            self._next_step(self.state[parameter])
        torch.autograd.graph.increment_version(parameters)

    # --- the state of a parameter

    def _state_of(self, parameter: Parameter) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state.update(initial_state(self._own_format(parameter), parameter.device))
        return state

    def _own_format(self, parameter: Parameter) -> StateFormat:
        """The form of the state that this process has of a parameter."""
        wanted = self.state_format(parameter)
        return wanted if self.processes is None else self.processes.own_format(wanted, parameter)

    def _next_step(self, state: dict[str, Tensor]) -> int:
        step = state["step"]
        counter = self._counters.get(id(step))
        if counter is None or counter.tensor is not step:
            counter = self._counters[id(step)] = StepCounter(step)
        return counter.next()

    def fit_state(self, parameter: Parameter) -> None:
        """After the inside of a parameter was replaced, have its state fit the new one.

        Rows that stay keep their state, new ones begin; and so do all of a weight that has become
        float or INT8, which the next step says.
        """
        state = self.state.get(parameter)
        if not state:
            return
        wanted = self._own_format(parameter)
        if wanted.keys() != state.keys() - {"step"}:
            del self.state[parameter]  # made at the next step: after the last one there is none
            self._n_begun_anew += 1
            return
        if all(state[name].shape == form.shape for name, form in wanted.items()):
            return
        if self.processes is not None and isinstance(parameter, QFTWeight):
            raise RuntimeError(
                "The number of rows of a weight was changed, and other processes own other rows "
                "than before. Resize the model before training, or train on one process."
            )
        for name, fresh in initial_state(wanted, parameter.device).items():
            if fresh.ndim:  # `step` counts on
                n_kept = min(len(fresh), len(state[name]))
                fresh[:n_kept] = state[name][:n_kept]
                state[name] = fresh

    # --- saved, copied, and on several processes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; INT8 stays INT8. Hooks are called as torch does.

        `torch.optim.Optimizer` would cast every state tensor to the dtype of its parameter.

        Raises:
            ValueError: The groups do not match, an option is out of its range, or a state tensor
                has another name, dtype or shape than its parameter calls for. The optimizer is
                unchanged.
        """
        check_form(state_dict)
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        found = loaded(state_dict, self)
        self.__setstate__({"state": found.states, "param_groups": found.groups})
        self._quantized.clear()
        self._counters.clear()
        self.flow.restart(previous_norm=found.previous_norm)
        self.train()  # Accelerate loads the state after it has moved the model, which cuts hooks
        for loaded_hook in self._optimizer_load_state_dict_post_hooks.values():
            loaded_hook(self)

    def consolidate(self) -> None:
        """Bring the state of all rows to the host of process 0, which alone can save it then.

        Every process calls it, before the first of them calls `state_dict`; until the next step.
        On one process there is nothing to bring.
        """
        if self.processes is not None:
            whole = whole_states(self, self.processes)
            self._whole = whole if self.processes.rank == 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: state by parameter, groups, and the norm that clips next.

        It is the same whether one process has trained or several.

        Raises:
            RuntimeError: Several processes have the rows, and `consolidate` has not been called
                since the last step, or this is not process 0.
        """
        if n := self.flow.n_taken:
            logger.warning(
                "The optimizer's state is read while a step has taken the gradients of %d "
                "parameters and has not ended: who resumes from it begins between two steps",
                n,
            )
        state_dict = super().state_dict()
        if self.processes is not None and any(isinstance(p, QFTWeight) for p in self.state):
            if self._whole is None:
                raise RuntimeError(
                    f"Each of {self.processes.n} processes has the optimizer state of its own rows,"
                    f" and this is process {self.processes.rank}. Call optimizer.consolidate() on "
                    "all of them after the step, and optimizer.state_dict() on process 0."
                )
            for number, tensors in self._whole.items():
                state_dict["state"][number] = {**state_dict["state"][number], **tensors}
        if self.flow.previous_norm is not None:
            state_dict[PREVIOUS_NORM] = self.flow.previous_norm
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep; `Optimizer` keeps its own three attributes only.

        Raises:
            RuntimeError: A step has begun and not ended, and a copy would go on without the rest.
        """
        if n := self.flow.n_taken:
            raise RuntimeError(
                f"A step has taken the gradients of {n} parameters and has not ended, and a copy "
                "would go on without the others. Copy the optimizer after step(), or give the step "
                "up by zero_grad()."
            )
        kept = {name: getattr(self, name) for name in (*self.SETTINGS, "skipped_steps")}
        return {**super().__getstate__(), **kept, PREVIOUS_NORM: self.flow.previous_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by `load_state_dict`, which keeps what lives beside the state."""
        previous_norm = state.pop(PREVIOUS_NORM, None)
        super().__setstate__(state)
        if "flow" not in self.__dict__:  # unpickled or copied
            self._prepare()
            for group in range(len(self.param_groups)):
                self._number(group)
            self.flow.previous_norm = previous_norm

    def broadcast(self) -> None:
        """Give all processes the parameters of process 0; each of them calls it.

        Raises:
            ValueError: The processes have other settings or other parameters.
        """
        if self.processes is not None:
            agree_on_settings(self, self.processes)
            self.processes.broadcast_(self.parameters())


def fit_states(parameter: Parameter) -> None:
    """`QFTOptimizer.fit_state` in every optimizer that is alive; others know nothing of it."""
    for optimizer in _living:
        optimizer.fit_state(parameter)
