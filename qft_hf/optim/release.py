"""`Release`: gradients are used during backward and freed.

Source:
    Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources"
    (LOMO), section 3.2 (arXiv:2306.09782). LOMO uses gradients of micro-batches one by one, clips
    by a second backward pass or not at all, and has no momentum. Here results are those of
    gradients that wait for the step, unless `clipping` is "previous" or "tensor"; settings that
    cannot give them raise.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..quant import Int8Gradient, QFTWeight, TiledGradient
from .flow import Flow, PassResult, RunPart, refuse_sparse, run_directly
from .norms import (
    are_finite,
    by_device,
    clipping_factor,
    joined,
    squares_of,
    squares_of_floats,
    total_norm,
    total_square,
)

if TYPE_CHECKING:
    from .base import QFTOptimizer

logger = logging.getLogger(__name__)

# Gradients of float parameters with up to so many elements (norms, biases) wait for the step.
SMALL = 2**16

ACCUMULATION_IS_FORBIDDEN = (
    "Gradient accumulation keeps an INT8 gradient of every weight between micro-batches, and "
    "accumulation='forbid' was set. Set gradient_accumulation_steps=1, or accumulation='keep'; a "
    "loop of your own runs one backward pass a step."
)

NOT_FINITE = (
    "A gradient is NaN or infinite, which was detected after {n} weights were updated in this "
    "step: their updates used the finite part of the gradients, and other weights are unchanged. "
    "Reload a checkpoint, or call optimizer.zero_grad() to continue from here; gradient='stack' "
    "checks all gradients before the first update."
)


def options_of(optimizer: "QFTOptimizer") -> dict[str, Any]:
    """Return copies of what backward updates by: the options of all groups, and how it clips."""
    options = {
        f"{name} of parameter group {number}": value.clone() if isinstance(value, Tensor) else value
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name != "params"
    }
    return {"clipping": optimizer.clipping, "max_grad_norm": optimizer.max_grad_norm, **options}


class Release(Flow):
    """Each gradient is used and freed as soon as backward has completed it.

    No gradient is checked before it is used, so the host never waits for a GPU in backward. Kernels
    leave rows unchanged whose float gradient is not finite, non-finite groups of an INT8 gradient
    count as 0, and the step checks all norms at once. Norms and biases wait for the step, where
    they are updated together.

    The optimizer's `clipping` says how `max_grad_norm` is applied although the first weight is
    updated before the last gradient exists; None: not at all. `"exact"`: by the norm from a first
    backward pass under `measure_norm`; accumulated gradients wait for the step and need no such
    pass. `"previous"`: by the global norm of the previous step (the first step is not clipped).
    `"tensor"`: each gradient by its own norm.
    """

    def __init__(self, optimizer: "QFTOptimizer") -> None:
        super().__init__(optimizer)
        self._measured: Tensor | None = None  # norm of the next step, by `measure_norm`
        self._squares: list[Tensor] = []  # fp64, of this step's gradients; added up once
        self._used: set[int] = set()  # ids of parameters whose gradient this step has taken
        self._options: dict[str, Any] | None = None  # when the step began
        self._is_in_backward = False  # stays True after a pass that failed
        self._floats: list[tuple[Parameter, Tensor]] = []  # small ones, used together in the step
        self._is_measuring = False
        self._seen: set[int] = set()  # ids of parameters whose gradient `measure_norm` measured
        self._keeps = False  # whether gradients were ever kept for a later micro-batch
        self._has_warned = False  # of a gradient that was not measured

    def listens_to(self, parameter: Parameter) -> bool:
        """Return True: float gradients are released too."""
        return True

    @property
    def wants_tiles(self) -> bool:  # type: ignore[override]
        """Whether a gradient completed now is used at once, by a kernel that quantizes it."""
        optimizer = self._optimizer()
        return (
            optimizer is not None
            and optimizer.takes_tiles
            and optimizer.clipping != "tensor"
            and not self._is_measuring
            and not (optimizer.clipping == "exact" and self._measured is None)
            and not self._is_accumulating()
        )

    @property
    def n_taken(self) -> int:
        """Number of parameters whose gradient a step or its backward has taken before its end."""
        return max(self._n_updated, len(self._used))

    @property
    def n_used(self) -> int:
        """Number of parameters updated in this step."""
        return len(self._used) - len(self._floats)

    def complete(self, parameter: Parameter) -> None:
        """Use a gradient and free it, or let it wait.

        Raises:
            RuntimeError: The parameter was updated in this step already, or the norm that exact
                clipping needs was not measured.
            TypeError: The gradient is sparse; or a float parameter has become neither fp32 nor
                bf16, and nothing was updated.
            ValueError: The micro-batch is not the last one and `accumulation` is `"forbid"`; or an
                option of a group is out of range, and nothing was updated.
        """
        if self._is_measuring:
            self._measure(parameter)
        elif self._is_accumulating():
            if self.optimizer.accumulation == "forbid":
                raise ValueError(ACCUMULATION_IS_FORBIDDEN)
            self._keeps = True
        elif self.optimizer.clipping == "exact" and self._measured is None:
            # A run that accumulates has memory for all gradients, so those of a last step of one
            # micro-batch may wait for the step, as in other steps.
            if not self._keeps:
                raise RuntimeError(
                    "clipping='exact' needs the global norm before the first update. Run backward "
                    "once under optimizer.measure_norm() and once more as usual, as QFTTrainer "
                    "does, or set clipping='previous' or 'tensor'."
                )
        elif parameter.grad is not None:
            self._use(parameter)

    def _measure(self, parameter: Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if id(parameter) in self._seen:
            raise RuntimeError(
                "A second gradient arrived for a weight under measure_norm(), and the norm of "
                "their sum is not known from theirs; nothing was updated. Run one backward pass. "
                "If the loss itself runs several, set gradient='stack'."
            )
        self._seen.add(id(parameter))
        self._squares.append(squares_of(gradient))

    def _use(self, parameter: Parameter) -> None:
        if id(parameter) in self._used:
            raise RuntimeError(
                "A second gradient arrived for a weight that this step has updated already, one of "
                f"{self.n_used}. If a backward pass failed half-way, the model is between two "
                "steps: reload a checkpoint, or call optimizer.zero_grad() to go on from here. To "
                "accumulate, run the earlier backward passes under optimizer.accumulate(), or with "
                "Accelerate give the optimizer is_accumulating=qft_hf.hf.is_accumulating. If "
                "layers share the weight under checkpointing, set use_reentrant=False. If the loss "
                "itself runs several backward passes, set gradient='stack'."
            )
        gradient, optimizer = parameter.grad, self.optimizer
        if optimizer.clipping == "exact" and id(parameter) not in self._seen:
            self._warn_of_unmeasured(parameter)
        if not self._used:  # the first of this step
            optimizer.check_groups()
            self._options = options_of(optimizer)
        if isinstance(gradient, TiledGradient):
            self._take(parameter)
            factor = self._factor(self._norm_of_all(), gradient.device)
            self._squares.append(self._update(parameter, gradient, factor))
        elif isinstance(gradient, Int8Gradient):
            squares = squares_of(gradient)
            self._take(parameter)
            self._squares.append(squares)
            self._clip_(gradient, squares)
            gradient.drop_nonfinite_()
            self._update(parameter, gradient)
        elif gradient is not None:
            refuse_sparse(gradient)
            self._take(parameter)
            is_small = parameter.numel() <= SMALL
            if optimizer.clipping == "tensor" or not is_small:  # else `step` takes all norms
                squares = squares_of(gradient)
                self._squares.append(squares)
                self._clip_(gradient, squares)
            if is_small:
                self._floats.append((parameter, gradient))
            else:
                optimizer.update_floats([(parameter, gradient)])

    def _warn_of_unmeasured(self, parameter: Parameter) -> None:
        # No error: on a GPU, rounding may send a token to another expert in the second pass.
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "A gradient of shape %s is clipped by a norm that does not include it: it did not "
                "arrive under measure_norm(). Run backward of the same losses under measure_norm() "
                "and after it. This is said once",
                tuple(parameter.shape),
            )

    def _take(self, parameter: Parameter) -> None:
        """Free a gradient, before anything is written: an interrupt may come at any line."""
        if not self._is_in_backward:
            self._is_in_backward = True
            # Autograd calls it at the end of the pass, but not after an error or an interrupt.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self._used.add(id(parameter))
        parameter.grad = None

    def _end_backward(self) -> None:
        self._is_in_backward = False

    def _n_interrupted(self) -> int:
        """Return the number of parameters in an interrupted step or backward pass."""
        return self._n_updated or (len(self._used) if self._is_in_backward else 0)

    def step(self) -> bool:
        """End the step: clip and use the gradients that wait for it, and record its norm.

        Gradients wait after accumulation with exact clipping, when the Trainer has clipped them
        already; if the last micro-batch had none for a weight; and if hooks were lost.

        Raises:
            FloatingPointError: A gradient has a NaN or infinity. Waiting gradients were not used.
            RuntimeError: The previous step was interrupted half-way, or an option has changed since
                backward updated the first weight. Waiting gradients were not used.
        """
        self._refuse_interrupted_step()
        self._refuse_changed_options()
        self._drop_converted()
        waiting = self._waiting()
        # Waiting gradients may be from outside a captured pass; no graph covers them.
        run_part = run_directly if waiting else self.run_part
        released = self._released_squares(run_part)
        total = total_square(released) if released else None
        if not are_finite(waiting) or (total is not None and not bool(total.isfinite())):
            raise FloatingPointError(NOT_FINITE.format(n=self.n_used))
        self._update_together(run_part)
        squares = self._clip_waiting([p.grad for p in waiting if p.grad is not None])
        self.released_norm = None if total is None else total.sqrt().float()
        if released or squares:
            self._remember(total_norm(released + squares) if squares else self.released_norm)
        self._update_all(waiting)
        self._forget()
        if waiting and not self._keeps:
            logger.warning(
                "%d gradients waited for the step instead of being released: .to() and copying a "
                "model disconnect its hooks, eval() and the end of a Trainer's run remove them, "
                "and frozen parameters have none. The hooks are connected again now",
                len(waiting),
            )
            self.attach(self.optimizer.parameters())
        return True

    def _refuse_changed_options(self) -> None:
        if self._options is None:
            return
        now = options_of(self.optimizer)
        for name, before in self._options.items():
            if before != now.get(name, before):
                raise RuntimeError(
                    f"{name} was {before} when backward updated the {self.n_used} "
                    f"weights of this step, and is {now[name]} now. With gradient='release' set it "
                    "before backward, as a scheduler does that steps after the optimizer; or use "
                    "gradient='stack'. Reload a checkpoint, or call optimizer.zero_grad() to go on "
                    "from here."
                )

    def _drop_converted(self) -> None:
        """Drop gradients of parameters that have become INT8, as a conversion drops `.grad`."""
        converted = {id(pair[0]) for pair in self._floats if isinstance(pair[0], QFTWeight)}
        self._used -= converted
        self._floats = [pair for pair in self._floats if id(pair[0]) not in converted]

    def _unmeasured(self) -> list[Tensor]:
        """Return the small float gradients, if they have been neither measured nor clipped."""
        if self.optimizer.clipping == "tensor":
            return []
        return [gradient for _, gradient in self._floats]

    def _released_squares(self, run_part: RunPart) -> list[Tensor]:
        """Return the squared norms of all released gradients: one tensor, or an empty list."""
        floats = self._unmeasured()
        if not self._squares and not floats:
            return []
        return [run_part("squares", lambda: joined(self._squares + squares_of_floats(floats)))]

    def _update_together(self, run_part: RunPart) -> None:
        """Clip and use the small float gradients, which are finite."""
        floats = self._unmeasured()
        self._n_updated = len(self._used)  # set first: an interrupt may come between any two lines
        together, self._floats = self._floats, []

        def update() -> None:
            for device, members in by_device(floats).items():
                if (factor := self._factor(self._norm_of_all(), device)) is not None:
                    torch._foreach_mul_(members, factor)
            self.optimizer.update_floats(together)

        parameters = [parameter for parameter, _ in together]
        run_part("update", update, repeated=lambda: self.optimizer.updated(parameters))
        self._n_updated = 0

    def _remember(self, norm: Tensor | None) -> None:
        """Keep the norm for `clipping="previous"`, always in the same memory if captured."""
        if norm is None or not self.is_captured:
            self.previous_norm = norm
        elif self.previous_norm is None:
            self.previous_norm = norm.clone()
        else:
            self.previous_norm.copy_(norm)

    def _clip_waiting(self, gradients: list[Tensor]) -> list[Tensor]:
        """Clip gradients that waited for the step; return their squared norms before clipping."""
        clipping, largest = self.optimizer.clipping, self.optimizer.max_grad_norm
        if clipping is None or largest is None or not gradients:
            return []
        squares = [squares_of(gradient) for gradient in gradients]
        if clipping == "exact":
            total = total_norm(squares)
            if total <= largest * (1 + 1e-5):
                return squares  # clipped already, up to rounding
            self._measured = total
        for gradient, of_it in zip(gradients, squares, strict=True):
            self._clip_(gradient, of_it)
        return squares

    def _clip_(self, gradient: Tensor, squares: Tensor) -> None:
        """Clip a gradient with these squared norms, in place."""
        clipping = self.optimizer.clipping
        if clipping is None:
            return
        norm = total_norm([squares]) if clipping == "tensor" else self._norm_of_all()
        if (factor := self._factor(norm, gradient.device)) is not None:
            gradient.mul_(factor)

    def _factor(self, norm: Tensor | None, device: torch.device) -> Tensor | None:
        """Return the factor that clips a gradient by this norm; None if nothing is clipped."""
        largest = self.optimizer.max_grad_norm
        if norm is None or largest is None:
            return None
        return clipping_factor(norm, largest).to(device)

    def _norm_of_all(self) -> Tensor | None:
        """Return the norm that all gradients of the step are clipped by, if it is known."""
        clipping = self.optimizer.clipping
        if clipping == "exact":
            return self._measured
        return self.previous_norm if clipping == "previous" else None

    def measure_norm(self) -> AbstractContextManager[None]:
        """Return a context that measures and drops gradients, to get the norm for exact clipping.

        Raises:
            FloatingPointError: A gradient has a NaN or infinity. Nothing was updated.
            RuntimeError: Gradients wait for the step, backward has updated weights for it, or a
                weight got two gradients. Nothing was updated in this context.
        """
        if self.n_used:
            raise RuntimeError(
                f"measure_norm() was called after backward had updated {self.n_used} weights of "
                "this step: the norm must be that of all its gradients. Run it once, before the "
                "backward pass that updates; to begin another step, call optimizer.step() first."
            )
        if any(parameter.grad is not None for parameter in self.optimizer.parameters()):
            raise RuntimeError(
                "measure_norm() would drop the gradients that wait for the step. With "
                "clipping='exact' they are clipped there: run the last micro-batch without it."
            )
        return self._measuring()

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        self._is_measuring, self._seen = True, set()
        try:
            yield
            squares = self._squares
        finally:
            self._is_measuring = False
            self._squares = []
        if not squares:
            return  # no gradient came: the norm is not known
        total = total_square(squares)
        if not bool(total.isfinite()):
            raise FloatingPointError(
                "A gradient is NaN or infinite; nothing was updated. Lower the learning rate or "
                "look at the batch, and run the next one."
            )
        self._measured = total.sqrt().float()

    def clear(self) -> None:
        """Give up a step that has begun.

        A warning says if backward has updated weights for it, unless an error has said so.
        """
        if self.n_used and not self._n_interrupted():
            logger.warning(
                "backward has updated %d weights of the step that is given up, and they stay as "
                "they are. To skip a batch because of its loss, do so before backward, or use "
                "gradient='stack'",
                self.n_used,
            )
        super().clear()
        self._forget()

    def _forget(self) -> None:
        self._measured, self._seen = None, set()
        self._squares, self._used, self._floats = [], set(), []
        self._options = None
        self._is_in_backward = False

    def pass_result(self) -> PassResult:
        """Return norms, gradients that wait for the step, and parameters that were updated."""
        wait = {id(parameter) for parameter, _ in self._floats}
        updated = tuple(p for p in self.optimizer.parameters() if id(p) in self._used - wait)
        return PassResult(updated, tuple(self._squares), tuple(self._floats))

    def after_replay(self, result: PassResult) -> None:
        """Restore the norms and waiting gradients that the pass has left, in the same memory."""
        self._used = {id(p) for p in (*result.updated, *(p for p, _ in result.floats))}
        self._squares, self._floats = list(result.squares), list(result.floats)
        self._options = options_of(self.optimizer)  # the pass has read them
