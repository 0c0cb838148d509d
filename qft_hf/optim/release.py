"""`GradientRelease`: each gradient is used and freed the moment backward has completed it.

Source:
    Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources"
    (LOMO), section 3.2 (arXiv:2306.09782). There gradients of micro-batches are used one by one,
    clipping runs backward twice or not at all, and there is no momentum; here results are those of
    gradients that wait for the step, and what cannot be so raises.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

CLIPPINGS = ("exact", "previous", "tensor")
ACCUMULATIONS = ("keep", "forbid")


class GradientRelease:
    """What backward hands finished gradients to, in the place of a `GradientStack`.

    On a GPU, each gradient costs one transfer to the host: whether it is finite has to be known
    before it is used.

    Args:
        update: Updates a parameter with its gradient.
        accumulation: `"keep"`: the gradients of all micro-batches but the last wait in `.grad`, in
            INT8. `"forbid"`: a backward pass that is not the last of its step raises.
        clipping: How `max_grad_norm` is honoured although the first weight is updated before the
            last gradient exists; None: not at all. `"exact"`: by the norm that a first backward
            pass under `measure_norm` has found. `"previous"`: by the global norm of the step before
            (the first step is not clipped). `"tensor"`: each gradient by its own norm.
        max_grad_norm: The norm that `clipping` clips to.
        is_accumulating: Asked for each gradient: whether more micro-batches of the step follow.
    """

    def __init__(
        self,
        update: Callable[[Parameter, Tensor], None],
        *,
        accumulation: str,
        clipping: str | None,
        max_grad_norm: float | None,
        is_accumulating: Callable[[], bool],
    ) -> None:
        self._update = update
        self.accumulation = accumulation
        self.clipping = clipping
        self.max_grad_norm = max_grad_norm
        self.norm: Tensor | None = None  # of the last finished step, before clipping
        self._measured: Tensor | None = None  # of the step to come, by `measure_norm`
        self._squares: list[Tensor] = []  # fp64 scalars, of this step's gradients
        self._used: set[int] = set()  # parameters updated in this step
        self._is_measuring = False
        self._is_accumulating = is_accumulating
        self._is_inside_accumulate = False
        self._has_kept = False  # gradients of earlier micro-batches

    def push(self, parameter: Parameter) -> None:
        """Take a finished gradient: keep it for the next micro-batch, measure it, or use it.

        Raises:
            FloatingPointError: It has a NaN or infinity.
            RuntimeError: The parameter was updated in this step already, or the norm that exact
                clipping needs was not measured.
            ValueError: It belongs to an earlier micro-batch, and `accumulation` is `"forbid"`.
        """
        if self._is_measuring:
            self._squares.append(_squared_norm(parameter))
            parameter.grad = None
        elif self._is_inside_accumulate or self._is_accumulating():
            if self.accumulation == "forbid":
                raise ValueError(
                    "Gradient accumulation keeps an INT8 gradient of every weight between "
                    "micro-batches, and accumulation='forbid' was set. Set "
                    "gradient_accumulation_steps=1, or accumulation='keep'."
                )
            self._has_kept = True
        elif self.clipping == "exact" and self._measured is None:
            # All gradients are alive already, so that waiting for the step costs nothing more.
            if not self._has_kept:
                raise RuntimeError(
                    "clipping='exact' needs the global norm before the first update. Run backward "
                    "once under optimizer.measure_norm() and once more as usual, as QFTTrainer "
                    "does, or set clipping='previous' or 'tensor'."
                )
        else:
            self.use(parameter)

    def use(self, parameter: Parameter) -> None:
        """Update a parameter with its gradient, and free the gradient.

        Raises:
            FloatingPointError: The gradient has a NaN or infinity.
            RuntimeError: The parameter was updated in this step already.
        """
        if id(parameter) in self._used:
            raise RuntimeError(
                "A second gradient arrived for a weight that this step has updated already, one of "
                f"{len(self._used)}. If a backward pass failed half-way, the model is between two "
                "steps: reload a checkpoint, or call optimizer.zero_grad() to go on from here. To "
                "accumulate, run the earlier backward passes under optimizer.accumulate()."
            )
        square = _squared_norm(parameter)
        if not math.isfinite(square.item()):
            raise FloatingPointError(
                f"A gradient is NaN or infinite after {len(self._used)} weights were updated in "
                "this step; the others are unchanged. Reload a checkpoint, or call "
                "optimizer.zero_grad() to go on from here; gradient='stack' checks all gradients "
                "before the first update."
            )
        gradient = parameter.grad
        parameter.grad = None
        if gradient is None:
            return
        self._clip_(gradient, self._norm_to_clip_by(square))
        self._squares.append(square)
        self._used.add(id(parameter))
        self._update(parameter, gradient)

    def clip_waiting(self, parameters: list[Parameter]) -> None:
        """Clip gradients that wait for the step although they could have been used.

        They do so after exact accumulation, where the Trainer has clipped them by now, and where
        hooks were lost.
        """
        if self.clipping is None or self.max_grad_norm is None or not parameters:
            return
        squares = [_squared_norm(parameter) for parameter in parameters]
        total = _total_norm(squares)
        if self.clipping == "exact" and total <= self.max_grad_norm * (1 + 1e-5):
            return  # clipped already, up to rounding
        for parameter, square in zip(parameters, squares, strict=True):
            if parameter.grad is not None:
                exact = self.clipping == "exact"
                self._clip_(parameter.grad, total if exact else self._norm_to_clip_by(square))

    def _clip_(self, gradient: Tensor, norm: Tensor | None) -> None:
        """Scale a gradient in place by the formula of torch.nn.utils.clip_grad_norm_."""
        if norm is not None and self.max_grad_norm is not None:
            gradient.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).to(gradient.device))

    def _norm_to_clip_by(self, square: Tensor) -> Tensor | None:
        if self.clipping == "tensor":
            return square.sqrt().float()
        return self._measured if self.clipping == "exact" else self.norm if self.clipping else None

    @contextmanager
    def measure_norm(self) -> Iterator[None]:
        """Within, gradients are measured and dropped; afterwards exact clipping knows the norm."""
        self._is_measuring = True
        try:
            yield
            self._measured = _total_norm(self._squares)
        finally:
            self._is_measuring = False
            self._squares = []

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within, gradients are kept for the backward pass that follows outside."""
        self._is_inside_accumulate = True
        try:
            yield
        finally:
            self._is_inside_accumulate = False

    def finish(self) -> None:
        """End the step: note its norm and be ready for the next."""
        if self._squares:
            self.norm = _total_norm(self._squares)
        self.clear()

    def clear(self) -> None:
        """Forget a step that was begun."""
        self._measured, self._has_kept = None, False
        self._squares, self._used = [], set()


def _squared_norm(parameter: Parameter) -> Tensor:
    """Sum of squares of a gradient, of its norm as waiting gradients have it: fp64 scalar."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device=parameter.device)
    return torch.linalg.vector_norm(gradient).double().square()


def _total_norm(squares: list[Tensor]) -> Tensor:
    return torch.stack([square.cpu() for square in squares]).sum().sqrt().float()


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
            "max_grad_norm=None; or use gradient='stack', which clips exactly."
        )
