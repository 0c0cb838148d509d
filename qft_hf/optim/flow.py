"""From backward to the update: what happens to each gradient once it is complete.

`Stack` leaves gradients in `.grad`, in INT8, until the step. `Release` uses each one the moment
backward has completed it and frees it.

Source:
    Li et al. 2023, "QFT", section 3.4 (arXiv:2310.07147), for gradients that wait; Lv et al. 2023,
    "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), section
    3.2 (arXiv:2306.09782), for release. There gradients of micro-batches are used one by one,
    clipping runs backward twice or not at all, and there is no momentum; here results are those of
    gradients that wait for the step, and whatever cannot give them raises.
"""

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ..kernels.gradients import sum_in_order
from ..quant import Int8Gradient, Int8Tensor, QFTWeight, TiledGradient, quantized

logger = logging.getLogger(__name__)

Result = TypeVar("Result", bound=Tensor | None)

GRADIENTS = ("stack", "release")
CLIPPINGS = ("exact", "previous", "tensor")
ACCUMULATIONS = ("keep", "forbid")
NONFINITE = ("raise", "skip")

# Float parameters up to this size, norms and biases, wait for each other and are updated together.
SMALL = 2**16

ACCUMULATION_IS_FORBIDDEN = (
    "Gradient accumulation keeps an INT8 gradient of every weight between micro-batches, and "
    "accumulation='forbid' was set. Set gradient_accumulation_steps=1, or accumulation='keep'."
)

HALF_A_STEP = (
    "An earlier step was interrupted after it had taken the gradients of {n} parameters: the model "
    "is between two steps. Reload a checkpoint, or call optimizer.zero_grad() to go on from here."
)


class Updates(Protocol):
    """The optimizer that a flow works for."""

    takes_tiles: bool  # whether `update` takes a `TiledGradient`
    reads_live: bool  # whether a graph may repeat updates

    def check_groups(self) -> None:
        """Raise for options that are out of their range."""
        ...

    def update(
        self, parameter: Parameter, gradient: Tensor, factor: Tensor | None = None
    ) -> Tensor | None:
        """Update a quantized weight; squared norms of the rows of a `TiledGradient`."""
        ...

    def update_floats(self, pairs: list[tuple[Parameter, Tensor]]) -> None:
        """Update float parameters together."""
        ...


class RunPart(Protocol):
    """Runs a part of a step that waits for no value; a graph may do it again."""

    def __call__(
        self,
        name: Hashable,
        part: Callable[[], Result],
        *,
        repeated: Callable[[], None] | None = None,
    ) -> Result:
        """Run it.

        Args:
            name: Of the part, the same at every step.
            part: What runs on the device depends on nothing but the gradients in `.grad` and on
                what is in memory.
            repeated: Does on the host what the part does there, after a graph has run instead of
                it; None: nothing. A part with it updates parameters.

        Returns:
            The part's result: a tensor or None.
        """
        ...


def run_directly(
    name: Hashable,
    part: Callable[[], Result],
    *,
    repeated: Callable[[], None] | None = None,
) -> Result:
    """Where nothing is captured."""
    return part()


class Left(NamedTuple):
    """What a backward pass leaves on the host until the step.

    Attributes:
        updated: Parameters that it has updated.
        squares: Squared norms of all gradients that it has taken but `floats`.
        floats: Gradients that wait for each other.
        late: Gradients that wait for the host, clipped.
    """

    updated: tuple[Parameter, ...] = ()
    squares: tuple[Tensor, ...] = ()
    floats: tuple[tuple[Parameter, Tensor], ...] = ()
    late: tuple[tuple[Parameter, Tensor], ...] = ()


class Flow(ABC):
    """Owns the gradients of one optimizer from the end of backward to the update.

    As a hook on its parameters it is told when a gradient is complete. A parameter obeys one flow,
    the one that was attached last: two would both use, and free, one gradient. The flow does not
    keep its optimizer alive; once that is gone it does nothing.

    Args:
        optimizer: What makes the updates.
        is_accumulating: Asked for each gradient: whether more micro-batches of the step follow.
    """

    # Whether gradients may come in float tiles now; see `QFTWeight.wants_tiles`.
    wants_tiles = False
    # Whether backward passes may be captured by a CUDA graph: what needs the host waits for `step`.
    is_captured = False
    run_part: RunPart = staticmethod(run_directly)

    def __init__(
        self, optimizer: Updates, *, is_accumulating: Callable[[], bool] | None = None
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._ask_accumulating = is_accumulating
        self._is_inside_accumulate = False
        self._n_updated = 0  # parameters, by a step that has begun and not ended
        self.is_attached = False

    @property
    def optimizer(self) -> Any:
        """The optimizer, or None if it is gone."""
        return self._optimizer()

    def __call__(self, parameter: Parameter) -> None:
        """What autograd calls: the gradient of `parameter` is complete."""
        if self._optimizer() is not None:
            _quantize_gradient_(parameter)
            self.complete(parameter)

    @abstractmethod
    def listens_to(self, parameter: Parameter) -> bool:
        """Whether to be told when the gradient of this parameter is complete."""

    @abstractmethod
    def complete(self, parameter: Parameter) -> None:
        """A gradient is complete in `.grad`."""

    @abstractmethod
    def step(self, parameters: list[Parameter]) -> bool:
        """Update what waits; returns False if the step was skipped."""

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within, backward passes keep their gradients for the one that follows outside."""
        self._is_inside_accumulate = True
        try:
            yield
        finally:
            self._is_inside_accumulate = False

    def _is_accumulating(self) -> bool:
        ask = self._ask_accumulating
        return self._is_inside_accumulate or (ask is not None and ask())

    def clear(self) -> None:
        """Give up a step that was begun."""
        self._n_updated = 0

    @abstractmethod
    def left(self, parameters: Iterable[Parameter]) -> Left:
        """What a backward pass that was captured has left of these parameters."""

    @abstractmethod
    def replayed(self, left: Left) -> None:
        """The device has run that pass again: be as after it."""

    def attach(self, parameters: Iterable[Parameter]) -> None:
        """Take the place of another flow on these parameters; hooks of others stay."""
        self.is_attached = True
        for parameter in parameters:
            hooks = _hooks_of(parameter)
            for key, hook in list(hooks.items()):
                if isinstance(hook, Flow) and hook is not self:
                    del hooks[key]
            if not parameter.requires_grad or not self.listens_to(parameter):
                continue
            if self not in hooks.values():
                parameter.register_post_accumulate_grad_hook(self)
            # `Module.to()` replaces the inside of a parameter: it still lists its hooks then, but
            # autograd does not call them. Setting the list again connects them.
            parameter._post_accumulate_grad_hooks = _hooks_of(parameter)

    def detach(self, parameters: Iterable[Parameter]) -> None:
        """Leave these parameters alone from now on."""
        self.is_attached = False
        for parameter in parameters:
            hooks = _hooks_of(parameter)
            for key, hook in list(hooks.items()):
                if hook is self:
                    del hooks[key]

    def _waiting(self, parameters: list[Parameter]) -> list[Parameter]:
        """Those of the parameters that have a gradient, now in INT8 if they are INT8 weights."""
        waiting = []
        for parameter in parameters:
            if isinstance(parameter.grad, TiledGradient):  # whoever wanted tiles did not take them
                parameter.grad = parameter.grad.quantized()
            _quantize_gradient_(parameter)  # set by hand, or while no hook was there
            if parameter.grad is not None:
                waiting.append(parameter)
        return waiting

    def _refuse_half_a_step(self) -> None:
        if n := self._n_half_done():
            raise RuntimeError(HALF_A_STEP.format(n=n))

    def _n_half_done(self) -> int:
        """Parameters that took part in a step which did not come to its end; 0: none is open."""
        return self._n_updated

    def _update_all(self, waiting: list[Parameter]) -> None:
        """Update parameters and free their gradients, newest first; float ones together."""
        floats = []
        for number, parameter in enumerate(reversed(waiting), start=1):
            self._n_updated = number  # first: an interrupt may come between any two lines
            gradient, parameter.grad = parameter.grad, None
            if isinstance(gradient, Int8Gradient):
                self._update(parameter, gradient)
            elif gradient is not None:  # norms and biases: tiny, so they go together
                floats.append((parameter, gradient))
        self.optimizer.update_floats(floats)
        self._settle()
        self._n_updated = 0

    def _update(self, parameter: Parameter, gradient: Tensor, factor: Tensor | None = None) -> Any:
        return self.optimizer.update(parameter, gradient, factor)

    def _settle(self) -> None:  # noqa: B027 there is nothing to wait for
        """Wait for what updates have begun and not ended: nothing on one process."""


class Stack(Flow):
    """Gradients wait for the step, in INT8: exact clipping, and a step may be refused.

    Args:
        optimizer: What makes the updates.
        nonfinite: What a step does when a gradient has a NaN or infinity: `"raise"`, or `"skip"`.
        **settings: Those of `Flow`.
    """

    def __init__(self, optimizer: Updates, *, nonfinite: str, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self.nonfinite = nonfinite

    def listens_to(self, parameter: Parameter) -> bool:
        """To INT8 weights, for a gradient that is float."""
        return isinstance(parameter, QFTWeight)

    def complete(self, parameter: Parameter) -> None:
        """It waits."""

    def left(self, parameters: Iterable[Parameter]) -> Left:
        """Gradients in `.grad`, and nothing here."""
        return Left()

    def replayed(self, left: Left) -> None:
        """Nothing is here."""

    def step(self, parameters: list[Parameter]) -> bool:
        """Update every parameter that has a gradient.

        Raises:
            FloatingPointError: A gradient is not finite. Nothing was updated.
            RuntimeError: The step before was interrupted half-way.
        """
        self._refuse_half_a_step()
        waiting = self._waiting(parameters)
        if not _are_finite(waiting, self.run_part):
            if self.nonfinite == "raise":
                raise FloatingPointError(
                    "A gradient is NaN or infinite, so the step was not taken; weights and "
                    "optimizer state are unchanged. Lower the learning rate or look at the batch; "
                    "nonfinite='skip' drops such steps and counts them in skipped_steps."
                )
            return False
        if self.is_captured and self.optimizer.reads_live:
            self._n_updated = len(waiting)  # until the host has done its part, too
            self.run_part(
                "update",
                lambda: self._update_all(waiting),
                repeated=lambda: self._repeated(waiting),
            )
        else:
            self._update_all(waiting)
        return True

    def _repeated(self, waiting: list[Parameter]) -> None:
        """What `_update_all` does on the host."""
        for parameter in waiting:
            parameter.grad = None
        self.optimizer.updated(waiting)
        self._n_updated = 0


class Release(Flow):
    """Each gradient is used and freed the moment backward has completed it.

    Kernels that take a gradient in float leave alone what is not finite, so nobody has to look
    before they run, and a GPU need not wait for the host: the step looks at all norms at once. A
    gradient that is INT8 by then costs one transfer to the host: those of embeddings, sums over
    micro-batches, and all of them with `clipping="tensor"` or without a kernel that quantizes on
    the way. Norms and biases wait for the step, where they are updated together.

    Args:
        optimizer: What makes the updates.
        accumulation: `"keep"`: the gradients of all micro-batches but the last wait in `.grad`, in
            INT8. `"forbid"`: a backward pass that is not the last of its step raises.
        clipping: How `max_grad_norm` is honoured although the first weight is updated before the
            last gradient exists; None: not at all. `"exact"`: by the norm that a first backward
            pass under `measure_norm` has found; accumulated gradients wait for the step and need
            none. `"previous"`: by the global norm of the step before (the first step is not
            clipped). `"tensor"`: each gradient by its own norm.
        max_grad_norm: The norm that `clipping` clips to.
        **settings: Those of `Flow`.
    """

    def __init__(
        self,
        optimizer: Updates,
        *,
        accumulation: str,
        clipping: str | None,
        max_grad_norm: float | None,
        **settings: Any,
    ) -> None:
        super().__init__(optimizer, **settings)
        self.accumulation = accumulation
        self.clipping = clipping
        self.max_grad_norm = max_grad_norm
        self.previous_norm: Tensor | None = None  # of all gradients of the last step
        self.released_norm: Tensor | None = None  # of those that it released
        self._measured: Tensor | None = None  # of the step to come, by `measure_norm`
        self._squares: list[Tensor] = []  # fp64, of the gradients of this step; added up once
        self._used: set[int] = set()  # parameters whose gradient this step has taken
        self._is_in_backward = False  # and stays so after a pass that failed
        self._floats: list[tuple[Parameter, Tensor]] = []  # gradients that wait for each other
        self._late: list[tuple[Parameter, Tensor]] = []  # and, if captured, for the host; clipped
        self._is_measuring = False
        self._keeps = False  # whether gradients have been kept for a later micro-batch, ever

    def listens_to(self, parameter: Parameter) -> bool:
        """To all."""
        return True

    @property
    def wants_tiles(self) -> bool:  # type: ignore[override]
        """Whether a gradient that is complete now is used at once, by a kernel that quantizes."""
        optimizer = self.optimizer
        return (
            optimizer is not None
            and optimizer.takes_tiles
            and self.clipping != "tensor"
            and not self._is_measuring
            and not (self.clipping == "exact" and self._measured is None)
            and not self._is_accumulating()
        )

    @property
    def n_taken(self) -> int:
        """Gradients that were taken from their parameters in this step."""
        return len(self._used)

    @property
    def n_used(self) -> int:
        """Parameters updated in this step."""
        return len(self._used) - len(self._floats) - len(self._late)

    def complete(self, parameter: Parameter) -> None:
        """Use a gradient and free it, or let it wait.

        Raises:
            FloatingPointError: It is INT8 and has a NaN or infinity.
            RuntimeError: The parameter was updated in this step already, or the norm that exact
                clipping needs was not measured.
            ValueError: It belongs to an earlier micro-batch, and `accumulation` is `"forbid"`; or
                an option of a group is out of its range, and nothing was updated.
        """
        if self._is_measuring:
            if parameter.grad is not None:
                self._squares.append(_squared_norm(parameter.grad))
            parameter.grad = None
        elif self._is_accumulating():
            if self.accumulation == "forbid":
                raise ValueError(ACCUMULATION_IS_FORBIDDEN)
            self._keeps = True
        elif self.clipping == "exact" and self._measured is None:
            # A run that accumulates has room for all gradients: a last window of one micro-batch
            # may wait for the step as the others do.
            if not self._keeps:
                raise RuntimeError(
                    "clipping='exact' needs the global norm before the first update. Run backward "
                    "once under optimizer.measure_norm() and once more as usual, as QFTTrainer "
                    "does, or set clipping='previous' or 'tensor'."
                )
        elif parameter.grad is not None:
            self._use(parameter)

    def _use(self, parameter: Parameter) -> None:
        if id(parameter) in self._used:
            raise RuntimeError(
                "A second gradient arrived for a weight that this step has updated already, one of "
                f"{self.n_used}. If a backward pass failed half-way, the model is between two "
                "steps: reload a checkpoint, or call optimizer.zero_grad() to go on from here. To "
                "accumulate, run the earlier backward passes under optimizer.accumulate(). If "
                "layers share the weight under checkpointing, set use_reentrant=False."
            )
        gradient, optimizer = parameter.grad, self.optimizer
        if not self._used:  # the first of this step
            optimizer.check_groups()
        if isinstance(gradient, TiledGradient):
            self._take(parameter)
            factor = self._factor(self._norm_of_all(), gradient.device)
            self._n_updated = len(self._used)  # until the update has come to its end
            self._squares.append(self._update(parameter, gradient, factor))
            self._n_updated = 0
        elif isinstance(gradient, Int8Gradient):
            square = _squared_norm(gradient)
            self._refuse_nonfinite(gradient, square)
            self._take(parameter)
            self._clip_(gradient, square)
            self._squares.append(square)
            if self.is_captured:
                self._late.append((parameter, gradient))
                return
            self._n_updated = len(self._used)
            self._update(parameter, gradient)
            self._n_updated = 0
        elif gradient is not None:
            is_small = parameter.numel() <= SMALL
            if self.clipping == "tensor" or not is_small:  # else the step takes all norms together
                square = _squared_norm(gradient)
                if self.clipping == "tensor" and not bool(square.isfinite()):
                    raise self.nonfinite_error()
                self._clip_(gradient, square)
                self._squares.append(square)
            self._take(parameter)
            if is_small:
                self._floats.append((parameter, gradient))
            elif self.is_captured:
                self._late.append((parameter, gradient))
            else:
                self._update_floats([(parameter, gradient)])

    def _refuse_nonfinite(self, gradient: Tensor, square: Tensor) -> None:
        """Raise for an INT8 gradient of which this sum of squares is not finite."""
        if not self.is_captured and not bool(square.isfinite()):
            raise self.nonfinite_error()

    def _take(self, parameter: Parameter) -> None:
        if not self._is_in_backward:
            self._is_in_backward = True
            # Autograd calls it when the pass ends, and not after an error or an interrupt.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self._used.add(id(parameter))
        parameter.grad = None

    def _end_backward(self) -> None:
        self._is_in_backward = False

    def _n_half_done(self) -> int:
        """Those of a step that was interrupted, or of a backward pass that was."""
        return self._n_updated or (len(self._used) if self._is_in_backward else 0)

    def _update_floats(self, floats: list[tuple[Parameter, Tensor]]) -> None:
        self._n_updated = len(self._used)
        self.optimizer.update_floats(floats)
        self._n_updated = 0

    def nonfinite_error(self) -> FloatingPointError:
        """What to raise for a gradient with a NaN or infinity."""
        return FloatingPointError(
            f"A gradient is NaN or infinite, and {self.n_used} weights had been handed theirs in "
            "this step when that was known: these are updated but for rows whose gradient is not "
            "finite, and those that one of several processes owns with them; other weights are "
            "unchanged. Reload a checkpoint, or call optimizer.zero_grad() to go on from here; "
            "gradient='stack' checks all gradients before the first update."
        )

    def step(self, parameters: list[Parameter]) -> bool:
        """End the step: clip and use the gradients that wait for it, and note its norm.

        Gradients wait after exact accumulation, where the Trainer has clipped them by now; where
        the last micro-batch had none for a weight; and where hooks were lost.

        Raises:
            FloatingPointError: A gradient has a NaN or infinity. Those that waited were not used.
            RuntimeError: The step before was interrupted half-way.
        """
        self._refuse_half_a_step()
        waiting = self._waiting(parameters)
        floats = [] if self.clipping == "tensor" else [gradient for _, gradient in self._floats]
        released, total = [], None
        # Other gradients than those of a pass may wait, and no graph has seen them.
        run_part = run_directly if waiting else self.run_part
        if self._squares or floats:
            released = [
                run_part("squares", lambda: _joined(self._squares + _squared_norms(floats)))
            ]
            total = _total(released)
        if not _are_finite(waiting) or (total is not None and not bool(total.isfinite())):
            raise self.nonfinite_error()
        together, late, self._floats, self._late = self._floats, self._late, [], []
        self._n_updated = len(self._used)
        run_part(
            "update",
            lambda: self._update_late(floats, together, late),
            repeated=lambda: self.optimizer.updated([p for p, _ in (*together, *late)]),
        )
        self._n_updated = 0
        squares = []
        if self.clipping is not None:
            gradients = [p.grad for p in waiting if p.grad is not None]
            squares = [_squared_norm(gradient) for gradient in gradients]
            self._clip_waiting(gradients, squares)
        self.released_norm = None if total is None else total.sqrt().float()
        if released or squares:
            self._remember(_total_norm(released + squares) if squares else self.released_norm)
        self._update_all(waiting)
        self._forget()
        if waiting and not self._keeps:
            logger.warning(
                "%d gradients waited for the step although they were to be released: moving a "
                "model with .to() cuts its hooks, which are connected again now",
                len(waiting),
            )
            self.attach(parameters)
        return True

    def _update_late(
        self,
        floats: list[Tensor],
        together: list[tuple[Parameter, Tensor]],
        late: list[tuple[Parameter, Tensor]],
    ) -> None:
        """Use what has waited for the step: `floats`, clipped only here, are among `together`."""
        for device, members in _by_device(floats).items():
            if (factor := self._factor(self._norm_of_all(), device)) is not None:
                torch._foreach_mul_(members, factor)
        for parameter, gradient in late:
            if isinstance(gradient, Int8Gradient):
                self._update(parameter, gradient)
            else:
                together = [*together, (parameter, gradient)]
        self.optimizer.update_floats(together)

    def _remember(self, norm: Tensor | None) -> None:
        """For `clipping="previous"`; always in the same place, if captured."""
        if norm is None or not self.is_captured:
            self.previous_norm = norm
        elif self.previous_norm is None:
            self.previous_norm = norm.clone()
        else:
            self.previous_norm.copy_(norm)

    def _clip_waiting(self, gradients: list[Tensor], squares: list[Tensor]) -> None:
        if self.max_grad_norm is None or not gradients:
            return
        total = _total_norm(squares)
        if self.clipping == "exact":
            if total <= self.max_grad_norm * (1 + 1e-5):
                return  # clipped already, up to rounding
            self._measured = total
        for gradient, square in zip(gradients, squares, strict=True):
            self._clip_(gradient, square)

    def _clip_(self, gradient: Tensor, square: Tensor) -> None:
        """Scale a gradient with this squared norm in place."""
        if self.clipping is None:
            return
        norm = square.sqrt().float() if self.clipping == "tensor" else self._norm_of_all()
        if (factor := self._factor(norm, gradient.device)) is not None:
            gradient.mul_(factor)

    def _factor(self, norm: Tensor | None, device: torch.device) -> Tensor | None:
        """What clips a gradient by this norm, by the formula of torch.nn.utils.clip_grad_norm_."""
        if norm is None or self.max_grad_norm is None:
            return None
        return (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).to(device)

    def _norm_of_all(self) -> Tensor | None:
        """The norm that all gradients of the step are clipped by, if it is known."""
        if self.clipping == "exact":
            return self._measured
        return self.previous_norm if self.clipping == "previous" else None

    @contextmanager
    def measure_norm(self) -> Iterator[None]:
        """Within, gradients are measured and dropped; afterwards exact clipping knows the norm.

        Raises:
            FloatingPointError: A gradient has a NaN or infinity. Nothing was updated.
        """
        self._is_measuring = True
        try:
            yield
            squares = self._squares
        finally:
            self._is_measuring = False
            self._squares = []
        if not _is_finite(squares):
            raise FloatingPointError(
                "A gradient is NaN or infinite; nothing was updated. Lower the learning rate or "
                "look at the batch, and run the next one."
            )
        self._measured = _total_norm(squares)

    def restart(self, *, previous_norm: Tensor | None) -> None:
        """Go on from a checkpoint, whatever state a failed step has left."""
        self.clear()
        self.previous_norm = previous_norm
        self.released_norm = None

    def clear(self) -> None:
        """Forget a step that was begun."""
        super().clear()
        self._forget()

    def _forget(self) -> None:
        self._measured = None
        self._squares, self._used, self._floats, self._late = [], set(), [], []
        self._is_in_backward = False

    def left(self, parameters: Iterable[Parameter]) -> Left:
        """Norms, gradients that wait for the step, and what was updated."""
        wait = {id(parameter) for parameter, _ in (*self._floats, *self._late)}
        updated = tuple(p for p in parameters if id(p) in self._used - wait)
        return Left(updated, tuple(self._squares), tuple(self._floats), tuple(self._late))

    def replayed(self, left: Left) -> None:
        """The same, in the same places."""
        wait = [parameter for parameter, _ in (*left.floats, *left.late)]
        self._used = {id(parameter) for parameter in (*left.updated, *wait)}
        self._squares = list(left.squares)
        self._floats, self._late = list(left.floats), list(left.late)


def _quantize_gradient_(parameter: Parameter) -> None:
    """Make the gradient of a weight INT8 that came in float, as by use outside of its module."""
    gradient = parameter.grad
    if isinstance(parameter, QFTWeight) and not isinstance(gradient, Int8Tensor | None):
        parameter.grad = quantized(gradient, parameter)


def _hooks_of(parameter: Parameter) -> dict[Any, Any]:
    return parameter._post_accumulate_grad_hooks or {}


def _squared_norm(gradient: Tensor) -> Tensor:
    """Sum of squares of a gradient: fp64 scalar."""
    if isinstance(gradient, Int8Gradient):
        return gradient.squared_norm()
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float32).double()
    # Squares overflow in FP32 from 1e19 on.
    wide = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return torch.where(norm.isinf(), wide, norm).square()


def _squared_norms(gradients: list[Tensor]) -> list[Tensor]:
    """The same of many float gradients, by few operators: fp64 `[n]` of those of one device."""
    squares = []
    for members in _by_device(gradients).values():
        norm, wide = (
            torch.stack(torch._foreach_norm(members, 2, dtype=dtype)).double()
            for dtype in (torch.float32, torch.float64)
        )
        squares.append(torch.where(norm.isinf(), wide, norm).square())
    return squares


def _by_device(gradients: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    return by_device


def _total(squares: list[Tensor]) -> Tensor:
    """The squared norm of gradients with these, each a scalar or one of each row: fp64."""
    return sum_in_order(_joined(squares))


def _joined(squares: list[Tensor]) -> Tensor:
    """All of them: fp64 `[n]`."""
    device = squares[0].device
    return torch.cat([square.to(device).view(-1) for square in squares])


def _total_norm(squares: list[Tensor]) -> Tensor:
    """The norm of all: fp32."""
    return _total(squares).sqrt().float()


def _is_finite(squares: list[Tensor]) -> bool:
    return not squares or bool(_total(squares).isfinite())


def _are_finite(parameters: list[Parameter], run_part: RunPart = run_directly) -> bool:
    """Whether all gradients are, found with one transfer to the host."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    tensors = [g.witness if isinstance(g, Int8Gradient) else g for g in gradients]
    if not tensors:
        return True

    def largest() -> Tensor:
        """Magnitude of all: NaN and infinity come through."""
        return torch.nn.utils.get_total_norm(tensors, norm_type=float("inf"))

    return bool(run_part("largest", largest).isfinite())


def check_settings(
    gradient: str,
    nonfinite: str,
    accumulation: str,
    clipping: str | None,
    max_grad_norm: float | None,
) -> None:
    """Raise for settings that do not exist or cannot be honoured together.

    Raises:
        ValueError: The text names the choices.
    """
    for name, value, choices in (
        ("gradient", gradient, GRADIENTS),
        ("nonfinite", nonfinite, NONFINITE),
        ("accumulation", accumulation, ACCUMULATIONS),
        ("clipping", clipping, (None, *CLIPPINGS)),
    ):
        if value not in choices:
            wanted = " or ".join(map(repr, choices))
            raise ValueError(f"{name} must be {wanted}, got {value!r}.")
    if gradient == "stack":
        if clipping is not None or max_grad_norm is not None:
            raise ValueError(
                "clipping and max_grad_norm are for gradient='release'. Gradients that wait for "
                "the step are clipped between backward and step: torch.nn.utils.clip_grad_norm_, "
                "or the Trainer's max_grad_norm."
            )
        return
    if nonfinite == "skip":
        raise ValueError(
            "nonfinite='skip' needs all gradients before the first update, which "
            "gradient='release' does not have. Use nonfinite='raise', or gradient='stack'."
        )
    if max_grad_norm is not None and not 0 < max_grad_norm < float("inf"):
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}.")
    if (clipping is None) != (max_grad_norm is None):
        raise ValueError(
            "gradient='release' updates weights during backward, before the global norm is known, "
            f"so max_grad_norm={max_grad_norm} needs a choice and clipping={clipping!r} a norm. "
            "Set both: clipping='exact' (a second backward finds the norm), 'previous' (the norm "
            "of the step before) or 'tensor' (each gradient by its own norm); or "
            "max_grad_norm=0 in TrainingArguments (None in the optimizer); or use "
            "gradient='stack', which clips exactly at no cost."
        )
