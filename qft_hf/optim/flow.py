"""The flow of gradients from backward to the update, by an object that owns them on the way.

`Stack` (`stack.py`) leaves gradients in `.grad`, in INT8, until the step. `Release` (`release.py`)
uses and frees each one as soon as backward has completed it.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor
from torch.nn import Parameter

from ..quant import Int8Gradient, QFTWeight, TiledGradient, quantized

if TYPE_CHECKING:
    from .base import QFTOptimizer

Result = TypeVar("Result", bound=Tensor | None)
# Runs a part of a step that waits for no value, as `run_directly` does, or replays a graph instead.
RunPart = Callable[..., Any]

INTERRUPTED_STEP = (
    "An earlier step was interrupted after it had taken the gradients of {n} parameters: the model "
    "is between two steps. Reload a checkpoint, or call optimizer.zero_grad() to go on from here."
)


def run_directly(
    name: Hashable,
    part: Callable[[], Result],
    *,
    repeated: Callable[[], None] | None = None,
) -> Result:
    """Run a part of a step without capturing it; a `RunPart`.

    Args:
        name: Name of the part, the same at every step.
        part: Its work on the device depends only on the gradients in `.grad` and on values in
            memory.
        repeated: Does the part's work on the host after a graph was replayed in its place; None:
            there is none. A part with this argument updates parameters.

    Returns:
        The part's result: a tensor or None.
    """
    return part()


class PassResult(NamedTuple):
    """What a backward pass leaves on the host until the step."""

    updated: tuple[Parameter, ...] = ()  # parameters that the pass has updated
    squares: tuple[Tensor, ...] = ()  # squared norms of the gradients that the pass has measured
    # Small float gradients, which are used together in the step.
    floats: tuple[tuple[Parameter, Tensor], ...] = ()


class Flow(ABC):
    """Owns the gradients of one optimizer from the end of backward to the update.

    The flow is a hook on its parameters, called when a gradient is complete. A parameter has one
    flow, the one attached last: two would both use and free the same gradient. The flow does not
    keep its optimizer alive, and does nothing once the optimizer is gone.

    Args:
        optimizer: Makes the updates.
    """

    # Whether backward may hand over float tiles now; see `QFTWeight.wants_tiles`.
    wants_tiles = False
    run_part: RunPart = staticmethod(run_directly)
    # Norms of the last step before clipping: of the released gradients, and of all gradients.
    released_norm: Tensor | None = None
    previous_norm: Tensor | None = None

    def __init__(self, optimizer: "QFTOptimizer") -> None:
        self._optimizer = weakref.ref(optimizer)
        self._is_inside_accumulate = False
        self._n_updated = 0  # parameters updated by a step that has not ended
        self.is_attached = False

    @property
    def optimizer(self) -> "QFTOptimizer":
        """The optimizer, which is alive during a step; a hook has to check `_optimizer` first."""
        return self._optimizer()  # type: ignore[return-value]

    def __call__(self, parameter: Parameter) -> None:
        """Handle the complete gradient of `parameter`; called by autograd."""
        if self._optimizer() is not None:
            quantize_gradient_(parameter)
            self.complete(parameter)

    @abstractmethod
    def listens_to(self, parameter: Parameter) -> bool:
        """Return whether the flow is called when the gradient of this parameter is complete."""

    def complete(self, parameter: Parameter) -> None:  # noqa: B027 a gradient may wait in `.grad`
        """Handle a gradient that is complete in `.grad`."""

    @abstractmethod
    def step(self) -> bool:
        """Update parameters whose gradients wait; return False if the step was skipped."""

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within this context, backward passes keep their gradients for a pass outside of it."""
        before, self._is_inside_accumulate = self._is_inside_accumulate, True
        try:
            yield
        finally:
            self._is_inside_accumulate = before

    def _is_accumulating(self) -> bool:
        ask = self.optimizer.is_accumulating
        return self._is_inside_accumulate or (ask is not None and ask())

    def measure_norm(self) -> AbstractContextManager[None]:
        """Return a context in which backward only measures the norm for `clipping="exact"`."""
        raise RuntimeError(
            "measure_norm() is for gradient='release'. With gradient='stack', call "
            "torch.nn.utils.clip_grad_norm_ between backward and step."
        )

    def clear(self) -> None:
        """Give up a step that has begun."""
        self._n_updated = 0

    def restart(self, *, previous_norm: Tensor | None) -> None:
        """Continue from a checkpoint, whatever state a failed step has left."""
        self.clear()
        self.previous_norm = previous_norm
        self.released_norm = None

    @property
    def is_captured(self) -> bool:
        """Whether backward passes may be captured by a CUDA graph."""
        return self.run_part is not run_directly

    def pass_result(self) -> PassResult:
        """Return what a captured backward pass has left on the host."""
        return PassResult()

    def after_replay(self, result: PassResult) -> None:  # noqa: B027 most flows keep nothing
        """Bring the flow to its state after that pass, which the device has replayed."""

    def attach(self, parameters: Iterable[Parameter]) -> None:
        """Replace any other flow on these parameters; hooks that are no flows stay."""
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
            # `Module.to()` replaces the data of a parameter, which still lists its hooks then, but
            # autograd does not call them. Assigning the list again connects them.
            parameter._post_accumulate_grad_hooks = _hooks_of(parameter)

    def detach(self) -> None:
        """Remove the flow from all parameters."""
        self.is_attached = False
        for parameter in self.optimizer.parameters():
            hooks = _hooks_of(parameter)
            for key, hook in list(hooks.items()):
                if hook is self:
                    del hooks[key]

    def _waiting(self) -> list[Parameter]:
        """Return the parameters that have a gradient, after quantizing those of INT8 weights.

        Raises:
            TypeError: A gradient is sparse. Nothing was updated.
        """
        waiting = []
        for parameter in self.optimizer.parameters():
            if (gradient := parameter.grad) is None:
                continue
            if isinstance(gradient, TiledGradient):  # was requested but not used in backward
                parameter.grad = gradient.quantized()
            refuse_sparse(gradient)
            quantize_gradient_(parameter)  # set by hand, or while there was no hook
            waiting.append(parameter)
        return waiting

    @property
    def n_taken(self) -> int:
        """Number of parameters whose gradient was taken by a step that has not ended."""
        return self._n_updated

    def _refuse_interrupted_step(self) -> None:
        if n := self._n_interrupted():
            raise RuntimeError(INTERRUPTED_STEP.format(n=n))

    def _n_interrupted(self) -> int:
        """Return the number of parameters in an interrupted step; 0 if there is no such step."""
        return self._n_updated

    def _update_all(self, waiting: list[Parameter]) -> None:
        """Update parameters and free their gradients, newest first; float parameters together."""
        floats = []
        for number, parameter in enumerate(reversed(waiting), start=1):
            self._n_updated = number  # set first: an interrupt may come between any two lines
            gradient, parameter.grad = parameter.grad, None
            if isinstance(gradient, Int8Gradient):
                self._update(parameter, gradient)
            elif gradient is not None:  # norms and biases, small enough to update together
                floats.append((parameter, gradient))
        self.optimizer.update_floats(floats)
        self._settle()
        self._n_updated = 0

    def _update(self, parameter: Parameter, gradient: Tensor, factor: Tensor | None = None) -> Any:
        return self.optimizer.update(parameter, gradient, factor)

    def _settle(self) -> None:  # noqa: B027 there is nothing to wait for
        """Wait for transfers that updates have begun; on one process there are none."""


def refuse_sparse(gradient: Tensor) -> None:
    """Raise TypeError if a gradient is sparse: some versions of PyTorch compute with it by rows."""
    if type(gradient) is Tensor and gradient.is_sparse:
        raise TypeError(
            f"Optimizers of INT8 weights need dense gradients, got a sparse one of shape "
            f"{tuple(gradient.shape)}. Make its nn.Embedding with sparse=False."
        )


def quantize_gradient_(parameter: Parameter) -> None:
    """Quantize a weight's gradient if it is float, as after use outside of its module."""
    if not isinstance(parameter, QFTWeight):
        return
    gradient = parameter.grad
    if gradient is not None and not isinstance(gradient, Int8Gradient | TiledGradient):
        parameter.grad = quantized(gradient, parameter)


def _hooks_of(parameter: Parameter) -> dict[Any, Any]:
    return parameter._post_accumulate_grad_hooks or {}
