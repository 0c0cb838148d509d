"""`QFTOptimizer`: the common base of the optimizers of INT8 weights.

A rule, such as Lion's (`lion.py`), defines the state of a parameter and how one step updates it.
The base does the rest: it numbers parameters, turns each gradient that the flow (`flow.py`) hands
over into an update, and counts the steps that index the random numbers for rounding. State is saved
and loaded in its stored form (`saved.py`).
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar, overload
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
from .saved import PREVIOUS_NORM, SKIPPED_STEPS, check_form, loaded, whole_states
from .settings import check_group, check_settings
from .stack import Stack
from .state import StateFormat, initial_state

logger = logging.getLogger(__name__)

T = TypeVar("T")
OWN_ROWS = "own rows"  # key in the `plans` of a weight

_living: WeakSet["QFTOptimizer"] = WeakSet()


class QFTOptimizer(Optimizer):
    """Base of the optimizers whose weights, gradients and state are INT8.

    Random numbers depend only on `seed`, the number of the step, the position of the parameter
    among all parameters and the position of the element. So a step on the same gradients makes the
    same bits on any device, with any number of threads and after a restart.

    A step consumes the gradients: each `.grad` is freed when its parameter is updated, and is None
    afterwards.

    Args:
        params: Parameters or parameter groups, as any `torch.optim.Optimizer` takes them.
        defaults: Options of a group other than those below, including `lr` and `weight_decay`.
        gradient: When gradients are used. `"stack"`: INT8 gradients wait for `step`. `"release"`:
            each is used and freed as soon as backward has completed it, so only one is alive;
            results are the same bits. Any backward pass then updates weights, until `eval`.
        maximize: Maximize the objective.
        stochastic_rounding: False rounds weights to nearest, for ablations: it does not train.
        nonfinite: What `step` does if a gradient has a NaN or infinity: `"raise"`, or `"skip"` the
            step, which drops the gradients, counts in `skipped_steps` and logs. Both leave weights
            and state unchanged. Release cannot skip, and raises in `step`, after weights were
            updated, because backward does not wait for the values of gradients.
        accumulation: With `gradient="release"`: `"keep"` the INT8 gradients of micro-batches until
            the last one, or `"forbid"` more than one micro-batch. See `accumulate`.
        clipping: With `gradient="release"`, how `max_grad_norm` is applied: `"exact"`, `"previous"`
            or `"tensor"`; see `release.Release`. With `"stack"`, clip gradients as usual, by
            `torch.nn.utils.clip_grad_norm_`.
        max_grad_norm: With `clipping`: the norm to clip to.
        is_accumulating: With `gradient="release"`: returns whether another backward pass of the
            same step follows the current one. The Trainer's optimizer asks Accelerate. In your own
            loop pass `qft_hf.hf.is_accumulating` if it uses Accelerate, or use `accumulate`.
        seed: Key of the random numbers, in [0, 2**63).

    Raises:
        ValueError: An argument is out of its range.
    """

    # Settings of the whole optimizer: arguments of `__init__` that are also attributes.
    SETTINGS: ClassVar[tuple[str, ...]] = (
        "gradient",
        "nonfinite",
        "accumulation",
        "clipping",
        "max_grad_norm",
        "is_accumulating",
    )

    takes_tiles = False
    # Whether steps take rate, decay and step number from the `live` of their rounding if it is set;
    # otherwise no graph may replay one.
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
        self.gradient = gradient
        self.nonfinite = nonfinite
        self.accumulation = accumulation
        self.clipping = clipping
        self.max_grad_norm = max_grad_norm
        self._check_settings()
        self.is_accumulating = is_accumulating
        self.skipped_steps = 0
        self._prepare()
        own = {"maximize": maximize, "stochastic_rounding": stochastic_rounding, "seed": seed}
        super().__init__(params, {**defaults, **own})
        self.train()

    def _prepare(self) -> None:
        """Create what is not part of the state: the flow, parameters' places and caches."""
        self.processes = Processes.found()
        self.flow = self._make_flow()
        self._places: dict[int, tuple[int, int]] = {}  # number and group of each, by its id
        # Objects made once from state tensors, by the ids of these.
        self._kept: dict[int, tuple[Tensor, Any]] = {}
        self._has_stepped = False
        self._n_begun_anew = 0  # states reset since the last step
        self._whole: dict[int, dict[str, Any]] | None = None  # state that `consolidate` gathered
        # The numbers of this step, and the function that writes them: see `capturable.py`.
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
        """Return the form of each state tensor of a parameter, quantized or float."""

    def state_hint(self, parameter: Tensor, state: dict[str, Any]) -> str | None:
        """Return, for an error text, what a state that does not fit belongs to; None if unknown."""
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
        """Update a quantized weight and its state by one step, in place.

        Args:
            weight: Modified.
            gradient: Finite.
            state: State tensors of the weight by name, modified.
            group: Options of the weight's group.
            rounding: The random numbers; `rounding.step` is the number of this step, from 1.
        """

    @abstractmethod
    def step_floats(
        self,
        parameters: list[Parameter],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
        roundings: kernels.Roundings,
    ) -> None:
        """Update float parameters of one group on one device by one step, in place."""

    def step_tiles(
        self,
        weight: kernels.Weight,
        gradient: TiledGradient,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: kernels.Rounding,
        factor: Tensor | None,
    ) -> Tensor:
        """Like `step_weight`, with a gradient in float tiles; called if `takes_tiles` is set.

        Args:
            weight: Modified.
            gradient: A row with non-finite values leaves its row of weight and state unchanged.
            state: Modified.
            group: Options of the weight's group.
            rounding: The random numbers.
            factor: Multiplies the quantized gradient: fp32 scalar or None.

        Returns:
            Squared norms of the rows of the quantized gradient, without the factor: fp64 `[rows]`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not accept gradients in tiles.")

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """Return the numbers in `live` for a group at this step, up to `N_LIVE`."""
        return float(group["lr"]), float(group["weight_decay"]), step

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise if an option of a group is out of range.

        Raises:
            ValueError: An option is out of range. The text names it and its range.
        """
        check_group(group)

    # --- what a rule may use

    def quantized(
        self, state: dict[str, Tensor], name: str, group_size: int | None, bits: int = 8
    ) -> kernels.Quantized:
        """Return state tensors `<name>_codes` and `<name>_scales` together, checked only once."""
        codes, scales = state[f"{name}_codes"], state[f"{name}_scales"]
        return self.kept(codes, lambda: kernels.Quantized(codes, scales, group_size, bits))

    def kept(self, tensor: Tensor, make: Callable[[], T]) -> T:
        """Return `make()`, which is called once for a state tensor, so its checks run once."""
        found = self._kept.get(id(tensor))
        if found is None or found[0] is not tensor:
            found = self._kept[id(tensor)] = tensor, make()
        made: T = found[1]
        return made

    # --- parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which are numbered in the order in which they are added.

        Raises:
            TypeError: A parameter is neither quantized nor fp32 or bf16.
            ValueError: An option is out of its range. The optimizer is unchanged.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            self._check_dtypes(group)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        self._number(len(self.param_groups) - 1)
        if self.flow.is_attached:
            self.flow.attach(group["params"])

    def _check_dtypes(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if not isinstance(parameter, QFTWeight) and parameter.dtype not in PARAMETER_DTYPES:
                raise TypeError(
                    f"{type(self).__name__} trains INT8 weights, float32 and bfloat16 parameters, "
                    f"got {parameter.dtype} for a parameter of shape {tuple(parameter.shape)}. "
                    "Load the model with dtype=torch.bfloat16, and do not cast it afterwards."
                )

    def _number(self, group: int) -> None:
        for parameter in self.param_groups[group]["params"]:
            self._places[id(parameter)] = (len(self._places), group)

    def parameters(self) -> Iterator[Parameter]:
        """Yield all parameters in the order of their numbers."""
        for group in self.param_groups:
            yield from group["params"]

    # --- where gradients go

    def train(self) -> None:
        """Have backward hand over complete gradients; the Trainer calls this every step.

        Another optimizer that was attached to these parameters is detached from them.
        """
        self.flow.attach(self.parameters())

    def eval(self) -> None:
        """Leave gradients in `.grad` until `train`, or until a release step finds them there."""
        self.flow.detach()

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes keep their gradients for a later pass.

        Accumulation with release needs it, except in the Trainer; see `is_accumulating`.
        """
        return self.flow.accumulate()

    def measure_norm(self) -> AbstractContextManager[None]:
        """Return a context in which backward only measures the norm for `clipping="exact"`.

        Raises:
            RuntimeError: Gradients wait for the step, where they can be clipped as usual.
        """
        return self.flow.measure_norm()

    @property
    def n_released(self) -> int:
        """Number of gradients that release has taken in the current step."""
        return self.flow.n_taken if self.gradient == "release" else 0

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` unscales gradients; a `GradScaler` asks first."""
        if self.n_released:
            raise NotImplementedError(
                "A GradScaler scales losses, and with gradient='release' backward has used the "
                "scaled gradients. Use bfloat16, which needs no scaling, in place of float16 and "
                "the GradScaler, and load the model again: its weights have been updated."
            )
        return False

    @property
    def released_norm(self) -> Tensor | None:
        """Global norm, before clipping, of the gradients that the last step released: fp32.

        None if it released none. Gradients that waited for the step are not included:
        `torch.nn.utils.clip_grad_norm_` returned their norm.
        """
        return self.flow.released_norm

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 as in torch
        """Drop all gradients, and give up a step that has begun.

        With `gradient="release"` weights that backward has updated stay so, which is logged.
        """
        super().zero_grad(set_to_none)
        self.flow.clear()

    # --- a step

    def _check_settings(self) -> None:
        check_settings(
            self.gradient, self.nonfinite, self.accumulation, self.clipping, self.max_grad_norm
        )

    def check_groups(self) -> None:
        """Check everything before a step: options may have been set, and `model.half()` called.

        Raises:
            TypeError: A float parameter is neither fp32 nor bf16.
            ValueError: An option is out of its range, or a group has a parameter that was not given
                to the optimizer.
        """
        self._check_settings()
        for group in self.param_groups:
            self.check_group(group)
            self._check_dtypes(group)
            if not all(id(parameter) in self._places for parameter in group["params"]):
                raise ValueError(
                    "A group has a parameter that was put into param_groups directly, for which "
                    f"{type(self).__name__} has no stream of random numbers. Give it to "
                    "add_param_group, or make a new optimizer."
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and free each gradient.

        INT8 weights are updated first, then all float parameters together. With
        `gradient="release"` INT8 weights were updated during backward, and this ends the step.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: A gradient is not finite and `nonfinite="raise"`. With
                `gradient="stack"`, weights, state and gradients are unchanged.
            RuntimeError: The previous step was interrupted half-way.
            TypeError: A float parameter has become neither fp32 nor bf16. Nothing was updated.
            ValueError: An option of a group is out of its range. Nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._n_begun_anew:
            logger.warning(
                "%d weights have become float or INT8 since the last step: "
                "their state in %s is reset",
                self._n_begun_anew,
                type(self).__name__,
            )
            self._n_begun_anew = 0
        if self.write_numbers is None:
            self.check_groups()
        else:  # this checks the groups too
            self.write_numbers()
        if not self._has_stepped:
            if self.processes is None and Processes.found() is not None:
                raise RuntimeError(
                    f"{type(self).__name__} was created before "
                    "torch.distributed.init_process_group, and would train on this process alone. "
                    "Create it afterwards."
                )
            self._has_stepped = True
            self._warn_without_int8()
        try:
            is_taken = self.flow.step()
        finally:
            self.live = None
        if not is_taken:
            self.skipped_steps += 1
            logger.warning("Step skipped: a gradient is not finite (%d so far)", self.skipped_steps)
            self.zero_grad()
        return loss

    def _warn_without_int8(self) -> None:
        parameters = list(self.parameters())
        has_int8 = any(isinstance(parameter, QFTWeight) for parameter in parameters)
        # An optimizer for norms and biases alone is no mistake: vectors stay float.
        if not has_int8 and any(parameter.ndim > 1 for parameter in parameters):
            logger.warning(
                "%s trains no INT8 weight: its %d parameters are float, and so are their gradients "
                "and their state. To train in INT8, call qft_hf.quantize_model_(model, "
                "qft_hf.QFTConfig()) on the model; the optimizer may be made before or after that",
                type(self).__name__,
                len(parameters),
            )

    def update(
        self, parameter: Parameter, gradient: Tensor, factor: Tensor | None = None
    ) -> Tensor | None:
        """Update one quantized weight and its state in place; called by the flow.

        Args:
            parameter: A `QFTWeight`.
            gradient: An `Int8Gradient`, or a `TiledGradient` if `takes_tiles` is set.
            factor: Multiplies a gradient in tiles: fp32 scalar.

        Returns:
            For a gradient in tiles, the squared norms of its rows without the factor: fp64.
            Otherwise None.
        """
        stream, number = self._places[id(parameter)]
        group = self.param_groups[number]
        state = self._state_of(parameter)
        rounding = kernels.Rounding(
            group["seed"],
            self._next_step(state),
            stream,
            stochastic=group["stochastic_rounding"],
            live=None if self.live is None else self.live[stream],
        )
        stored: kernels.Weight = parameter.stored  # type: ignore[attr-defined]  # a QFTWeight
        codes = stored.codes
        own: slice | None = gradient.own_rows  # type: ignore[attr-defined]
        if own is not None:  # several processes train
            if own.start == own.stop:
                return None
            rounding = rounding._replace(first_row=own.start)
            plan = stored.plans.get(OWN_ROWS)
            if plan is None:
                plan = stored.plans[OWN_ROWS] = stored.rows(own)
            stored = plan
            self._whole = None
        # Autograd then refuses a backward pass that saved the weight before this update. Compiled
        # layers save the codes instead of the weight.
        torch.autograd.graph.increment_version((parameter, codes))
        if isinstance(gradient, TiledGradient):
            return self.step_tiles(stored, gradient, state, group, rounding, factor)
        if isinstance(gradient, Int8Gradient):
            self.step_weight(stored, gradient.stored, state, group, rounding)
        return None

    @torch.no_grad()
    def update_floats(self, pairs: list[tuple[Parameter, Tensor]]) -> None:
        """Update float parameters and their states in place: one call per group and device."""
        calls: dict[tuple[int, torch.device], list[tuple[Parameter, Tensor]]] = {}
        for parameter, gradient in pairs:
            _, number = self._places[id(parameter)]
            calls.setdefault((number, parameter.device), []).append((parameter, gradient))
        for (number, _), members in calls.items():
            parameters, gradients = (list(part) for part in zip(*members, strict=True))
            states = [self._state_of(parameter) for parameter in parameters]
            group = self.param_groups[number]
            roundings = kernels.Roundings(
                group["seed"],
                [self._next_step(state) for state in states],
                [self._places[id(parameter)][0] for parameter in parameters],
                stochastic=group["stochastic_rounding"],
                live=self.live,
            )
            self.step_floats(parameters, gradients, states, group, roundings)

    def updated(self, parameters: Sequence[Parameter]) -> None:
        """Do the host's part of updates after a graph has replayed them on the device."""
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
        """Return the form of the state that this process keeps for a parameter."""
        wanted = self.state_format(parameter)
        return wanted if self.processes is None else self.processes.own_format(wanted, parameter)

    def _next_step(self, state: dict[str, Tensor]) -> int:
        """Count a step of one parameter, and return its number."""
        step = state["step"]
        # NumPy shares the tensor's memory and counts in a tenth of the time of a PyTorch operator.
        count = self.kept(step, step.numpy)
        number: int = count.item() + 1
        count.fill(number)
        return number

    def fit_state(self, parameter: Parameter) -> None:
        """Fit the state of a parameter to its data after the data were replaced.

        Rows that remain keep their state, and new rows start with a fresh one. A weight that has
        become float or INT8 starts with a fresh state, which the next step logs.
        """
        state = self.state.get(parameter)
        if not state:
            return
        wanted = self._own_format(parameter)
        for tensor in state.values():
            self._kept.pop(id(tensor), None)
        if wanted.keys() != state.keys() - {"step"}:
            del self.state[parameter]  # the next step, if there is one, creates it again
            self._n_begun_anew += 1
            return
        if all(state[name].shape == form.shape for name, form in wanted.items()):
            return
        if self.processes is not None and isinstance(parameter, QFTWeight):
            raise RuntimeError(
                "The number of rows of a weight was changed, which changes the rows that each "
                "process owns. Resize the model before training, or train on one process."
            )
        for name, fresh in initial_state(wanted, parameter.device).items():
            if fresh.ndim:  # not `step`, which is kept
                n_kept = min(len(fresh), len(state[name]))
                fresh[:n_kept] = state[name][:n_kept]
                state[name] = fresh

    # --- saved, copied, and on several processes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; INT8 stays INT8, and hooks are called as in PyTorch.

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
        self.skipped_steps = found.skipped_steps
        self.__setstate__({"state": found.states, "param_groups": found.groups})
        self._kept.clear()
        self._whole = None
        self.flow.restart(previous_norm=found.previous_norm)
        self.train()  # Accelerate moves the model before this, which disconnects hooks
        for loaded_hook in self._optimizer_load_state_dict_post_hooks.values():
            loaded_hook(self)

    def consolidate(self) -> None:
        """Gather the state of all rows on the host of process 0, which alone can then save it.

        Every process must call this before any of them calls `state_dict`. The result is valid
        until the next step. On one process it does nothing.
        """
        if self.processes is not None:
            whole = whole_states(self)
            self._whole = whole if self.processes.rank == 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and numbers: state by parameter, groups, norm for the next clipping.

        The form is the same whether one process has trained or several.

        Raises:
            RuntimeError: The rows are on several processes, and `consolidate` was not called since
                the last step, or this is not process 0.
        """
        if n := self.flow.n_taken:
            logger.warning(
                "The optimizer's state is read while a step has taken the gradients of %d "
                "parameters and has not ended: a run that resumes from it starts between two steps",
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
        if self.skipped_steps:
            state_dict[SKIPPED_STEPS] = self.skipped_steps
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep; `Optimizer` itself keeps only three attributes.

        Raises:
            RuntimeError: A step has not ended, and a copy would miss its remaining gradients.
        """
        if n := self.flow.n_taken:
            raise RuntimeError(
                f"A step has taken the gradients of {n} parameters and has not ended, so a copy "
                "would continue without the rest of the step. Copy the optimizer after step(), or "
                "give up the step with zero_grad()."
            )
        kept = {name: getattr(self, name) for name in (*self.SETTINGS, "skipped_steps")}
        return {**super().__getstate__(), **kept, PREVIOUS_NORM: self.flow.previous_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle; `load_state_dict` calls this too, and keeps the flow."""
        previous_norm = state.pop(PREVIOUS_NORM, None)
        super().__setstate__(state)
        if "flow" not in self.__dict__:  # unpickled or copied
            self._prepare()
            for group in range(len(self.param_groups)):
                self._number(group)
            self.flow.previous_norm = previous_norm

    def broadcast(self) -> None:
        """Copy the parameters of process 0 to all processes, each of which must call this.

        Raises:
            ValueError: The processes differ in settings or parameters.
        """
        if self.processes is not None:
            agree_on_settings(self)
            self.processes.broadcast_(self.parameters())


def fit_states(parameter: Parameter) -> None:
    """Call `fit_state` of every optimizer that is alive; those without the parameter ignore it."""
    for optimizer in _living:
        optimizer.fit_state(parameter)
