"""`GradientRelease`: each gradient is used and freed the moment backward has completed it.

Source:
    Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources"
    (LOMO), section 3.2 (arXiv:2306.09782). There gradients of micro-batches are used one by one,
    clipping runs backward twice or not at all, and there is no momentum; here results are those of
    gradients that wait for the step, and what cannot be so raises.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..quant import Int8Gradient

logger = logging.getLogger(__name__)

CLIPPINGS = ("exact", "previous", "tensor")
ACCUMULATIONS = ("keep", "forbid")

ACCUMULATION_IS_FORBIDDEN = (
    "Gradient accumulation keeps an INT8 gradient of every weight between micro-batches, and "
    "accumulation='forbid' was set. Set gradient_accumulation_steps=1, or accumulation='keep'."
)


class Released(NamedTuple):
    """A gradient to be used now.

    Attributes:
        gradient: It is nowhere else.
        factor: What it has to be multiplied by yet: fp32 scalar or None.
    """

    gradient: Tensor
    factor: Tensor | None = None


class GradientRelease:
    """Decides for each finished gradient: use it now, or keep it for the step.

    Kernels that take a gradient in float leave alone what is not finite, so nobody has to look
    before they run, and a GPU need not wait for the host: `finish` looks at all norms at once. A
    gradient that is INT8 by then costs one transfer to the host: those of embeddings, sums over
    micro-batches, and all of them without momentum or with `clipping="tensor"`.

    Args:
        accumulation: `"keep"`: the gradients of all micro-batches but the last wait in `.grad`, in
            INT8. `"forbid"`: a backward pass that is not the last of its step raises.
        clipping: How `max_grad_norm` is honoured although the first weight is updated before the
            last gradient exists; None: not at all. `"exact"`: by the norm that a first backward
            pass under `measure_norm` has found; accumulated gradients wait for the step and need
            none. `"previous"`: by the global norm of the step before (the first step is not
            clipped). `"tensor"`: each gradient by its own norm.
        max_grad_norm: The norm that `clipping` clips to.
        is_accumulating: Asked for each gradient: whether more micro-batches of the step follow.
    """

    def __init__(
        self,
        *,
        accumulation: str,
        clipping: str | None,
        max_grad_norm: float | None,
        is_accumulating: Callable[[], bool],
    ) -> None:
        self.accumulation = accumulation
        self.clipping = clipping
        self.max_grad_norm = max_grad_norm
        self.previous_norm: Tensor | None = None  # of all gradients of the last step
        self.released_norm: Tensor | None = None  # of those that it released
        self._measured: Tensor | None = None  # of the step to come, by `measure_norm`
        self._squares: list[Tensor] = []  # fp64 scalars, of this step's gradients
        self._used: set[int] = set()  # parameters updated in this step
        self._is_measuring = False
        self._is_accumulating = is_accumulating
        self._is_inside_accumulate = False
        self._keeps = False  # whether gradients have been kept for a later micro-batch, ever

    @property
    def n_used(self) -> int:
        """Parameters updated in this step."""
        return len(self._used)

    def take(self, parameter: Parameter) -> Released | None:
        """Free a finished gradient and return it, to be used now; or None: it waits.

        A deferred gradient comes with the factor that clips it: `note` has to follow its use.

        Raises:
            FloatingPointError: It is INT8 and has a NaN or infinity.
            RuntimeError: The parameter was updated in this step already, or the norm that exact
                clipping needs was not measured.
            ValueError: It belongs to an earlier micro-batch, and `accumulation` is `"forbid"`.
        """
        if self._is_measuring:
            if parameter.grad is not None:
                self._squares.append(_squared_norm(parameter.grad))
            parameter.grad = None
            return None
        if self._is_inside_accumulate or self._is_accumulating():
            if self.accumulation == "forbid":
                raise ValueError(ACCUMULATION_IS_FORBIDDEN)
            self._keeps = True
            _quantize(parameter)
            return None
        if self.clipping == "exact" and self._measured is None:
            # A run that accumulates has room for all gradients: a last window of one micro-batch
            # may wait for the step as the others do.
            if not self._keeps:
                raise RuntimeError(
                    "clipping='exact' needs the global norm before the first update. Run backward "
                    "once under optimizer.measure_norm() and once more as usual, as QFTTrainer "
                    "does, or set clipping='previous' or 'tensor'."
                )
            _quantize(parameter)
            return None
        return self._release(parameter)

    def _release(self, parameter: Parameter) -> Released | None:
        if id(parameter) in self._used:
            raise RuntimeError(
                "A second gradient arrived for a weight that this step has updated already, one of "
                f"{self.n_used}. If a backward pass failed half-way, the model is between two "
                "steps: reload a checkpoint, or call optimizer.zero_grad() to go on from here. To "
                "accumulate, run the earlier backward passes under optimizer.accumulate(). If "
                "layers share the weight under checkpointing, set use_reentrant=False."
            )
        gradient = parameter.grad
        if gradient is None:
            return None
        if _is_deferred(gradient) and self.clipping != "tensor":
            parameter.grad = None
            self._used.add(id(parameter))
            return Released(gradient, self._factor(self._norm_of_all(), gradient.device))
        square = _squared_norm(gradient)
        must_look = isinstance(gradient, Int8Gradient) or self.clipping == "tensor"
        if must_look and not bool(square.isfinite()):
            raise self.nonfinite_error()
        parameter.grad = None
        self._used.add(id(parameter))
        self._clip_(gradient, square)
        self.note(square)
        return Released(gradient)

    def note(self, square: Tensor) -> None:
        """Count the squared norm of a gradient that was used: fp64 scalar."""
        self._squares.append(square)

    def nonfinite_error(self) -> FloatingPointError:
        """What to raise for a gradient with a NaN or infinity."""
        return FloatingPointError(
            f"A gradient is NaN or infinite, and {self.n_used} weights had been handed theirs in "
            "this step when that was known: these are updated but for rows whose gradient is not "
            "finite, the others are unchanged. Reload a checkpoint, or call optimizer.zero_grad() "
            "to go on from here; gradient='stack' checks all gradients before the first update."
        )

    def finish(self, waiting: list[Parameter]) -> bool:
        """End the step: clip the gradients that wait for it, note its norm, forget the rest.

        Gradients wait after exact accumulation, where the Trainer has clipped them by now; where
        the last micro-batch had none for a weight; and where hooks were lost.

        Returns:
            Whether hooks were lost: gradients wait and no accumulation has kept any.

        Raises:
            FloatingPointError: A gradient that was released has a NaN or infinity. Gradients that
                wait were not used.
        """
        released = _total_norm(self._squares) if self._squares else None
        if released is not None and not bool(released.isfinite()):
            raise self.nonfinite_error()
        squares = []
        if self.clipping is not None:
            gradients = [p.grad for p in waiting if p.grad is not None]
            squares = [_squared_norm(gradient) for gradient in gradients]
            self._clip_waiting(gradients, squares)
        self.released_norm = released
        if self._squares or squares:
            self.previous_norm = _total_norm(self._squares + squares)
        self.clear()
        if waiting and not self._keeps:
            logger.warning(
                "%d gradients waited for the step although they were to be released: moving a "
                "model with .to() cuts its hooks, which are connected again now",
                len(waiting),
            )
            return True
        return False

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
        return {"exact": self._measured, "previous": self.previous_norm}.get(self.clipping or "")

    @contextmanager
    def measure_norm(self) -> Iterator[None]:
        """Within, gradients are measured and dropped; afterwards exact clipping knows the norm.

        Raises:
            FloatingPointError: A gradient has a NaN or infinity. Nothing was updated.
        """
        self._is_measuring = True
        try:
            yield
            total = _total_norm(self._squares)
        finally:
            self._is_measuring = False
            self._squares = []
        if not bool(total.isfinite()):
            raise FloatingPointError(
                "A gradient is NaN or infinite; nothing was updated. Lower the learning rate or "
                "look at the batch, and run the next one."
            )
        self._measured = total

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within, gradients are kept for the backward pass that follows outside."""
        self._is_inside_accumulate = True
        try:
            yield
        finally:
            self._is_inside_accumulate = False

    def restart(self, *, previous_norm: Tensor | None) -> None:
        """Go on from a checkpoint, whatever state a failed step has left."""
        self.clear()
        self.previous_norm = previous_norm
        self.released_norm = None

    def clear(self) -> None:
        """Forget a step that was begun."""
        self._measured = None
        self._squares, self._used = [], set()


def _squared_norm(gradient: Tensor) -> Tensor:
    """Sum of squares of a gradient: fp64 scalar."""
    if isinstance(gradient, Int8Gradient):
        return gradient.squared_norm()
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()


def _is_deferred(gradient: Tensor) -> bool:
    return isinstance(gradient, Int8Gradient) and gradient.tiles is not None


def _quantize(parameter: Parameter) -> None:
    """See to it that a gradient which waits is INT8."""
    if isinstance(parameter.grad, Int8Gradient):
        parameter.grad.fields()


def _total_norm(squares: list[Tensor]) -> Tensor:
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt().float()


def check_release(
    gradient: str, nonfinite: str, clipping: str | None, max_grad_norm: float | None
) -> None:
    """Raise for settings that cannot be honoured together.

    Raises:
        ValueError: The text names the choices.
    """
    if gradient == "stack":
        if clipping is not None or max_grad_norm is not None:
            raise ValueError(
                "clipping and max_grad_norm are for gradient='release'. Gradients on the stack are "
                "clipped between backward and step: torch.nn.utils.clip_grad_norm_, or the "
                "Trainer's max_grad_norm."
            )
        return
    if nonfinite == "skip":
        raise ValueError(
            "nonfinite='skip' needs all gradients before the first update, which "
            "gradient='release' does not have. Use nonfinite='raise', or gradient='stack'."
        )
    if max_grad_norm is not None and max_grad_norm <= 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}.")
    if (clipping is None) != (max_grad_norm is None):
        raise ValueError(
            "gradient='release' updates weights during backward, before the global norm is known, "
            f"so max_grad_norm={max_grad_norm} needs a choice and clipping={clipping!r} a norm. "
            "Set both: clipping='exact' (a second backward finds the norm), 'previous' (the norm "
            "of the step before) or 'tensor' (each gradient by its own norm); or "
            "max_grad_norm=0 in TrainingArguments (None in QFTLion); or use gradient='stack', "
            "which clips exactly at no cost."
        )
