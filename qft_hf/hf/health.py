"""Figures about the health of INT8 training, which the Trainer logs with the loss as `qft/...`.

INT8 weights can fail in ways that the loss shows late: codes never move because a step is too
small for the scale, codes pile up at the largest magnitude, scales and outliers run away, or
tensors are not trained at all. A sample of some rows of each weight shows all of this. It is copied
when training begins and twice on each logged step, which takes a few launches for the whole model.
A step that is not logged costs nothing.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..kernels.groups import QMAX, TINY
from ..optim import QFTSGD
from ..quant import QFTWeight
from .compatibility import unwrapped

SAMPLED = 4096  # elements of each tensor, in whole rows, with a minimum of one row
# In scales. The random number that rounds a code is a multiple of it (`kernels/philox.py`): a
# smaller step moves at most one code in 2**24.
SMALLEST_STEP = 2.0**-24
SPREAD = 0.618  # golden ratio: the sampled rows of successive weights are in different places


@dataclass(frozen=True, slots=True)
class Sample:
    """Copies of some rows of all weights, and of the beginning of each float parameter."""

    codes: Tensor  # int8 `[n]`, of the sampled rows
    scales: Tensor  # fp32 `[n_scales]`, of the same rows
    outliers: Tensor  # fp32 `[n_outliers]`, of the same rows
    floats: Tensor  # fp32 `[n_floats]`, values of the float parameters
    # Numbers of sampled codes and of sampled outliers of each weight, and of sampled values of each
    # float parameter.
    sizes: tuple[list[int], list[int], list[int]]


class Health(TrainerCallback):
    """Samples a model when training begins and around each logged step.

    Call `figures()` when such a step is logged.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.optimizer: Any = None
        self._trained: tuple[list[QFTWeight], list[Tensor]] = ([], [])
        self._first: Sample | None = None
        self._saved: dict[str, Any] | None = None  # from the checkpoint that training resumes
        self._before: Tensor | None = None  # codes before the step that will be logged
        self._rate = 0.0  # learning rate of that step
        self._moved: Tensor | None = None  # sign of each code's change in the last logged step

    def on_train_begin(self, *_: Any, model: Any = None, optimizer: Any = None, **__: Any) -> None:
        """Take the sample that all later ones are compared with, or that of the checkpoint."""
        self.model, self.optimizer = model, unwrapped(optimizer)
        self._before = self._moved = None
        if model is None:
            return
        self._trained = trained_tensors(model)  # fixed here: later, others may be frozen or trained
        self._first = sample(*self._trained)
        saved, self._saved = self._saved, None
        if saved is not None and saved["first"]["sizes"] == self._first.sizes:
            parts, device = saved["first"], self._first.codes.device
            self._first = Sample(
                **{k: v if k == "sizes" else v.to(device) for k, v in parts.items()}
            )
            self._moved = saved["moved"] if saved["moved"] is None else saved["moved"].to(device)

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Copy the sampled codes if this step will be logged."""
        if self.model is not None and _will_log(args, state):
            self._before = _codes(self._trained[0])
            # By the time this step is logged, the scheduler has set the rate of the next one.
            self._rate = max(group["lr"] for group in self.optimizer.param_groups)

    def save(self, path: Path) -> None:
        """Write the first sample into a checkpoint, for the run that resumes from it."""
        if self._first is not None:
            torch.save({"first": asdict(self._first), "moved": self._moved}, path)

    def load(self, path: Path | None) -> None:
        """Read what `save` wrote, before training resumes; without it, a new sample is taken."""
        self._saved = torch.load(path, "cpu") if path is not None and path.is_file() else None

    def figures(self) -> dict[str, float]:
        """Return figures about the step that has just ended; empty if it was not sampled.

        Returns:
            By name. Shares in [0, 1]:
            `codes_moved`: codes that this step changed.
            `sign_flips`: of the codes moved by both this logged step and the previous logged one,
            those moved in opposite directions.
            `codes_saturated`: codes of magnitude 127.
            `parameters_changed`: values that differ from those at the start of training.
            `updates_too_small`: groups whose scale is so large relative to the learning rate that
            rounding moves none of their codes, unless the scale grows and its codes are rounded
            again. Left out for SGD, whose step size depends on the gradients.
            Other figures:
            `tensors_unchanged`: number of tensors without a sampled value that changed since the
            start; `scale_growth`: mean ratio of scales to their first values, without groups that
            were all zero, such as a padding token's; `outlier_drift`: norm of the change of the
            outliers, relative to the norm of their first values.
        """
        if self.model is None or self._first is None or self._before is None:
            return {}
        if not len(self._before):  # a side network in float
            return {}
        now, first = sample(*self._trained), self._first
        moved = torch.sign(now.codes.short() - self._before)  # short: a difference has 9 bits
        changed = torch.cat(
            [now.codes != first.codes, now.outliers != first.outliers, now.floats != first.floats]
        )
        found = {
            "codes_moved": (moved != 0).float().mean(),
            "codes_saturated": (now.codes.abs() == QMAX).float().mean(),
            "parameters_changed": changed.sum() / (len(now.codes) + len(now.floats)),
            "tensors_unchanged": _unchanged(changed, now.sizes),
            "scale_growth": _growth(now.scales, first.scales),
        }
        if len(first.outliers):
            drift = torch.linalg.vector_norm(now.outliers - first.outliers)
            found["outlier_drift"] = drift / torch.linalg.vector_norm(first.outliers)
        if not isinstance(self.optimizer, QFTSGD):
            too_small = self._rate < SMALLEST_STEP * now.scales
            found["updates_too_small"] = too_small.float().mean()
        if self._moved is not None:
            both = (moved * self._moved != 0).sum()
            found["sign_flips"] = (moved * self._moved < 0).sum() / both.clamp(min=1)
        self._moved, self._before = moved.to(torch.int8), None
        # One transfer from the device for all figures.
        return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))

    def sample_changes(self) -> dict[str, Any]:
        """Return how the sample has changed since training began; empty if it has not begun.

        Returns:
            `codes_before` and `codes_after`: number of codes of each value from -127 to 127;
            `changed`: for each weight, the share of sampled codes that differ from the first ones.
        """
        if self.model is None or self._first is None:
            return {}
        codes, first = _codes(self._trained[0]), self._first.codes
        if not len(first):  # a side network in float
            return {}
        weights = {id(weight) for weight in self._trained[0]}
        named = [name for name, p in self.model.named_parameters() if id(p) in weights]
        moved = [part.float().mean() for part in (codes != first).split(self._first.sizes[0])]
        return {
            "codes_before": _histogram(first),
            "codes_after": _histogram(codes),
            "changed": dict(zip(named, torch.stack(moved).tolist(), strict=True)),
        }


def sample(weights: list[QFTWeight], floats: list[Tensor]) -> Sample:
    """Copy some rows of each weight, and the beginning of each float parameter."""
    pairs = [(weight, _rows(weight, number)) for number, weight in enumerate(weights)]
    codes = [weight.codes[rows] for weight, rows in pairs]
    outliers = [weight.outlier_values[rows] for weight, rows in pairs]
    beginnings = [parameter.detach().flatten()[:SAMPLED].float() for parameter in floats]
    return Sample(
        codes=_joined(codes),
        scales=_joined(weight.scales[rows] for weight, rows in pairs),
        outliers=_joined(outliers),
        floats=_joined(beginnings),
        sizes=(_sizes(codes), _sizes(outliers), _sizes(beginnings)),
    )


def _sizes(parts: list[Tensor]) -> list[int]:
    return [part.numel() for part in parts]


def _unchanged(changed: Tensor, sizes: tuple[list[int], list[int], list[int]]) -> Tensor:
    """Return the number of tensors without a sampled value that changed, an fp32 scalar."""
    ends = torch.tensor([0, *chain(*sizes)]).cumsum(0)
    counts = torch.cat([changed.new_zeros(1, dtype=torch.int64), changed.cumsum(0)])
    of_each = counts[ends[1:].to(counts.device)] - counts[ends[:-1].to(counts.device)]
    codes, outliers, floats = of_each.split([len(of_kind) for of_kind in sizes])
    return ((codes + outliers == 0).sum() + (floats == 0).sum()).float()


def _growth(now: Tensor, first: Tensor) -> Tensor:
    """Return the mean ratio of scales to their first values; 1 if all groups were zero."""
    counts = first > TINY
    return (torch.where(counts, now / first - 1, 0).sum() / counts.sum().clamp(min=1)) + 1


def _codes(weights: list[QFTWeight]) -> Tensor:
    return _joined(weight.codes[_rows(weight, n)] for n, weight in enumerate(weights))


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Join contiguous tensors of one dtype into a one-dimensional tensor, in one launch."""
    flat = [part.reshape(-1) for part in parts]
    return torch.cat(flat) if flat else torch.empty(0)


def trained_tensors(model: nn.Module) -> tuple[list[QFTWeight], list[Tensor]]:
    """Return the weights and the float parameters that are trained."""
    trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if isinstance(p, QFTWeight)]
    return weights, [p for p in trained if not isinstance(p, QFTWeight)]


def _histogram(codes: Tensor) -> list[int]:
    counts: list[int] = torch.bincount(codes.int() + QMAX, minlength=2 * QMAX + 1).tolist()
    return counts


def _rows(weight: QFTWeight, number: int) -> slice:
    """Return consecutive rows with about `SAMPLED` elements: indexing by a slice gives a view."""
    rows, columns = weight.codes.shape
    n_rows = min(rows, max(1, SAMPLED // columns))
    start = int((number * SPREAD % 1.0) * (rows - n_rows + 1))
    return slice(start, start + n_rows)


def _will_log(args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether the Trainer will log the step that begins."""
    step = state.global_step + 1
    if args.logging_first_step and step == 1:
        return True
    if args.logging_strategy == IntervalStrategy.EPOCH:
        return step % ceil(state.max_steps / state.num_train_epochs) == 0
    return args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0
