"""A step of an INT8 weight in a direction that an optimizer has chosen.

Weights are rounded stochastically (Philox) against the scale that is stored. All of the weight's
arithmetic is in units of its code, so that an element whose update is zero keeps its code.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_column_values, check_finite, check_live, check_matrix, check_same
from .groups import QMAX, TINY, group_absmax, scale_groups_, spread_groups
from .operators import operator
from .philox import random_words, weight_uniform
from .values import Lion, Rounding, Weight, read_live

# A scale is sticky: it changes only when a value no longer fits the codes or when the whole group
# has shrunk below RANGE_LOW, and then it is set so that the largest value gets code RANGE_TARGET,
# well inside both limits.
RANGE_TARGET = 120.0
RANGE_LOW = 60.0

CHUNK_ELEMENTS = 2**16  # updated at a time: temporaries stay in the cache

WRITES = ("weight.codes", "weight.scales", "weight.outlier_values")


@operator(writes=WRITES)
def step_weight_(
    weight: Weight,
    direction: Tensor,
    *,
    lr: float,
    weight_decay: float,
    rounding: Rounding,
    live: Tensor | None = None,
) -> None:
    """Update a weight in place: `w <- SR(w - lr * (direction + weight_decay * w))`.

    SR rounds stochastically against the stored scale: the expectation of the stored weight is the
    exact update. Scales are sticky: one changes only when a value no longer fits its codes, or when
    the whole group has shrunk to less than half their range; an element whose update is zero keeps
    its code otherwise. Outliers are FP32 and updated without rounding to codes; the codes under
    them stay 0.

    This is all that an optimizer needs of the storage format: with g for the direction it is SGD.

    Args:
        weight: `[rows, columns]`, modified.
        direction: fp32 `[rows, columns]`, contiguous and finite; not modified.
        lr: Step size, in units of the weight for each unit of the direction.
        weight_decay: Decoupled: weights shrink by `lr * weight_decay` a step.
        rounding: The random numbers.
        live: fp64 `[3]` beside the weight, or None: `lr`, `weight_decay` and the number of the
            step, in the place of those that are given. The kernel reads them when it runs: a CUDA
            graph repeats numbers as they were when it was captured.

    Raises:
        TypeError: The direction is not fp32.
        ValueError: The direction does not fit the weight. On the CPU also: a scale is not positive
            and finite, an outlier column does not exist, or the direction is not finite. Nothing
            was written.

    Source:
        Li et al. 2023, "QFT", section 3 (arXiv:2310.07147), which rounds to nearest.
    """
    rule, rounding = read_live(live, Lion.without_momentum(lr, weight_decay), rounding)
    for rows in row_chunks(weight.codes):
        step_rows_(weight, direction[rows], rows, rule.lr, rule.weight_decay, rounding)


@step_weight_.checks
def _(weight: Weight, direction: Tensor, *, live: Tensor | None, **_: object) -> None:
    check_matrix("direction", direction, (torch.float32,))
    check_same("direction", direction, weight.codes)
    check_live(live, (3,), weight.device)


@step_weight_.checks_values
def _(weight: Weight, direction: Tensor, **_: object) -> None:
    check_weight_values(weight)
    check_finite("direction", direction)


def check_weight_values(weight: Weight) -> None:
    """Raise for scales that are not positive and finite, and for outlier columns that are none."""
    check_finite("weight scales", weight.scales, positive=True)
    check_column_values(weight.outlier_columns, weight.codes)


def row_chunks(codes: Tensor, *, elements: int | None = None) -> Iterator[slice]:
    """Rows of `codes` in runs of `CHUNK_ELEMENTS`, or of so many `elements`, or one by one."""
    n_rows, columns = codes.shape
    chunk = max(1, (elements or CHUNK_ELEMENTS) // columns)
    for start in range(0, n_rows, chunk):
        yield slice(start, min(start + chunk, n_rows))


def step_rows_(
    weight: Weight,
    direction: Tensor,
    rows: slice,
    lr: float,
    weight_decay: float,
    rounding: Rounding,
) -> None:
    """The step of some rows; `direction` is theirs."""
    codes, scales, outlier_values, outlier_columns = weight.tensors
    columns, group_size = codes.shape[1], weight.group_size
    shrink = lr * weight_decay

    index = outlier_columns[rows].long()
    value = outlier_values[rows]
    change = (value * shrink).add_(direction.gather(1, index) * lr)
    outlier_values[rows] = value.sub_(change)

    scale = scales[rows]
    quanta = torch.full_like(scale, lr) / scale  # lr in units of one code
    code = codes[rows].float()
    decrease = (code * shrink).add_(scale_groups_(direction.clone(), quanta, group_size))
    target = code - decrease
    absmax = group_absmax(target, group_size)
    fits = (absmax <= QMAX) & ((absmax >= RANGE_LOW) | (absmax == 0))

    uniform = torch.full_like(code, 0.5)
    if rounding.stochastic:
        counted = slice(rounding.first_row + rows.start, rounding.first_row + rows.stop)
        words = random_words(
            counted, columns, seed=rounding.seed, step=rounding.step, stream=rounding.stream,
            device=codes.device,
        )  # fmt: skip
        uniform = weight_uniform(words)
    new_code = code.add_((uniform - decrease).floor_())
    if not bool(fits.all()):
        new_scale = (scale * (absmax * (1.0 / RANGE_TARGET))).clamp_min_(TINY)
        new_scale = torch.where(fits, scale, new_scale)
        rescaled = scale_groups_(target, scale / new_scale, group_size).add_(uniform).floor_()
        new_code = torch.where(spread_groups(fits, columns, group_size), new_code, rescaled)
        scales[rows] = new_scale
    new_code.clamp_(-QMAX, QMAX).scatter_(1, index, 0.0)
    codes[rows] = new_code.to(torch.int8)
