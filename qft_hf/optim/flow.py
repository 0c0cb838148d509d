"""From backward to the update: who owns each gradient once it is complete.

`Stack` (`stack.py`) leaves gradients in `.grad`, in INT8, until the step. `Release` (`release.py`)
uses each one the moment backward has completed it and frees it.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor
from torch.nn import Parameter

from ..quant import Int8Gradient, Int8Tensor, QFTWeight, TiledGradient, quantized
from .processes import Processes

Result = TypeVar("Result", bound=Tensor | None)

HALF_A_STEP = (
    "An earlier step was interrupted after it had taken the gradients of {n} parameters: the model "
    "is between two steps. Reload a checkpoint, or call optimizer.zero_grad() to go on from here."
)


class Updates(Protocol):
    """The optimizer that a flow works for, with the settings that the flow goes by."""

    nonfinite: str
    accumulation: str
    clipping: str | None
    max_grad_norm: float | None
    is_accumulating: Callable[[], bool] | None
    processes: Processes | None

    takes_tiles: bool  # whether `update` takes a `TiledGradient`
    reads_live: bool  # whether a graph may repeat updates

    def parameters(self) -> Iterator[Parameter]:
        """All that the flow is attached to, in the order of their numbers."""
        ...

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

    def updated(self, parameters: Sequence[Parameter]) -> None:
        """Do what updates do on the host, after a graph has repeated them on the device."""
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
        """Run a part.

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
    """Run a part of a step, and capture nothing; a `RunPart`."""
    return part()


class Left(NamedTuple):
    """What a backward pass leaves on the host until the step.

    Attributes:
        updated: Parameters that it has updated.
        squares: Squared norms of all gradients that it has taken but `floats`.
        floats: Gradients that wait for each other.
    """

    updated: tuple[Parameter, ...] = ()
    squares: tuple[Tensor, ...] = ()
    floats: tuple[tuple[Parameter, Tensor], ...] = ()


class Flow(ABC):
    """Owns the gradients of one optimizer from the end of backward to the update.

    As a hook on its parameters it is told when a gradient is complete. A parameter obeys one flow,
    the one that was attached last: two would both use, and free, one gradient. The flow does not
    keep its optimizer alive; once that is gone it does nothing.

    Args:
        optimizer: What makes the updates.
    """

    # Whether gradients may come in float tiles now; see `QFTWeight.wants_tiles`.
    wants_tiles = False
    # Whether backward passes may be captured by a CUDA graph.
    is_captured = False
    run_part: RunPart = staticmethod(run_directly)
    # Norms of the last step, before clipping: of the gradients that it released, and of all.
    released_norm: Tensor | None = None
    previous_norm: Tensor | None = None

    def __init__(self, optimizer: Updates) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._is_inside_accumulate = False
        self._n_updated = 0  # parameters, by a step that has begun and not ended
        self.is_attached = False

    @property
    def optimizer(self) -> Updates:
        """The optimizer, which is alive while it steps; a hook asks `_optimizer` whether it is."""
        return self._optimizer()  # type: ignore[return-value]

    def __call__(self, parameter: Parameter) -> None:
        """What autograd calls: the gradient of `parameter` is complete."""
        if self._optimizer() is not None:
            quantize_gradient_(parameter)
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
        ask = self.optimizer.is_accumulating
        return self._is_inside_accumulate or (ask is not None and ask())

    def measure_norm(self) -> AbstractContextManager[None]:
        """A backward pass within only finds the norm that `clipping="exact"` then clips by."""
        raise RuntimeError(
            "measure_norm() is for gradient='release'. With gradient='stack', call "
            "torch.nn.utils.clip_grad_norm_ between backward and step."
        )

    def clear(self) -> None:
        """Give up a step that was begun."""
        self._n_updated = 0

    def restart(self, *, previous_norm: Tensor | None) -> None:
        """Go on from a checkpoint, whatever state a failed step has left."""
        self.clear()
        self.previous_norm = previous_norm
        self.released_norm = None

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
        """The parameters that have a gradient; that of an INT8 weight is in INT8 from now on."""
        waiting = []
        for parameter in parameters:
            if (gradient := parameter.grad) is None:
                continue
            if isinstance(gradient, TiledGradient):  # whoever wanted tiles did not take them
                parameter.grad = gradient.quantized()
            quantize_gradient_(parameter)  # set by hand, or while no hook was there
            waiting.append(parameter)
        return waiting

    @property
    def n_taken(self) -> int:
        """Parameters whose gradient was taken by a step that has not ended."""
        return self._n_updated

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


def quantize_gradient_(parameter: Parameter) -> None:
    """Make the gradient of a weight INT8 that came in float, as by use outside of its module."""
    if not isinstance(parameter, QFTWeight):
        return
    gradient = parameter.grad
    if gradient is not None and not isinstance(gradient, Int8Tensor):
        parameter.grad = quantized(gradient, parameter)


def _hooks_of(parameter: Parameter) -> dict[Any, Any]:
    return parameter._post_accumulate_grad_hooks or {}
