"""A step of an INT8 weight in a direction that an optimizer has chosen.

Weights are rounded stochastically (Philox) against the stored scale. All arithmetic of codes is in
units of a code, so that an element whose update is zero keeps its code.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_column_values, check_finite, check_live, check_matrix, check_same
from .groups import QMAX, TINY, group_absmax, scale_groups_, spread_groups
from .operators import operator
from .philox import weight_uniform
from .values import N_LIVE, Lion, Rounding, Weight, read_live

# A scale is sticky: it changes only when a value no longer fits the codes or when all codes of the
# group have shrunk below RANGE_LOW. It is then set so that the largest value gets code
# RANGE_TARGET, well inside both limits.
RANGE_TARGET = 120.0
RANGE_LOW = 60.0

CHUNK_ELEMENTS = 2**16  # updated at a time, so that temporaries stay in the cache

WRITES = ("weight.codes", "weight.scales", "weight.outlier_values")


@operator(writes=WRITES)
def step_weight_(
    weight: Weight,
    direction: Tensor,
    *,
    lr: float,
    weight_decay: float,
    rounding: Rounding,
) -> None:
    """Update a weight in place: `w <- SR(w - lr * (direction + weight_decay * w))`.

    SR rounds stochastically against the stored scale: the expectation of the stored weight is the
    exact update. Scales are sticky: one changes only when a value no longer fits its codes, or when
    the whole group has shrunk to less than half their range. As long as the scale stays, an element
    whose update is zero keeps its code. Outliers are FP32 and are not rounded to codes; the codes
    under them stay 0.

    An optimizer needs nothing else of the storage format: with the gradient as direction this is
    SGD.

    Args:
        weight: `[rows, columns]`, modified.
        direction: fp32 `[rows, columns]`, contiguous and finite; not modified.
        lr: Step size, in units of the weight for each unit of the direction.
        weight_decay: Decoupled: weights shrink by `lr * weight_decay` a step.
        rounding: The random numbers.

    Raises:
        TypeError: The direction is not fp32.
        ValueError: The direction does not fit the weight. On the CPU also: a scale is not positive
            and finite, an outlier column does not exist, or the direction is not finite. Nothing
            was written.

    Source:
        Li et al. 2023, "QFT", section 3 (arXiv:2310.07147), which rounds to nearest.
    """
    rule, rounding = read_live(Lion.without_momentum(lr, weight_decay), rounding)
    for rows in row_chunks(weight.codes):
        step_rows_(weight, direction[rows], rows, rule.lr, rule.weight_decay, rounding)


@step_weight_.checks
def _(weight: Weight, direction: Tensor, *, rounding: Rounding, **_: object) -> None:
    check_matrix("direction", direction, (torch.float32,))
    check_same("direction", direction, weight.codes)
    check_live(rounding.live, (N_LIVE,), weight.device)


@step_weight_.checks_values
def _(weight: Weight, direction: Tensor, **_: object) -> None:
    check_weight_values(weight)
    check_finite("direction", direction)


def check_weight_values(weight: Weight) -> None:
    """Raise for scales that are not positive and finite, and outlier columns that do not exist."""
    check_finite("weight scales", weight.scales, positive=True)
    check_column_values(weight.outlier_columns, weight.codes)


def row_chunks(codes: Tensor) -> Iterator[slice]:
    """Yield runs of rows of at most `CHUNK_ELEMENTS` elements, but at least one row."""
    n_rows, columns = codes.shape
    chunk = max(1, CHUNK_ELEMENTS // columns)
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
    """Step the rows `rows`; `direction` holds only these."""
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
        uniform = weight_uniform(rounding.words(rows, columns, codes.device))
    new_code = code.add_((uniform - decrease).floor_())
    if not bool(fits.all()):
        new_scale = (scale * (absmax * (1.0 / RANGE_TARGET))).clamp_min_(TINY)
        new_scale = torch.where(fits, scale, new_scale)
        rescaled = scale_groups_(target, scale / new_scale, group_size).add_(uniform).floor_()
        new_code = torch.where(spread_groups(fits, columns, group_size), new_code, rescaled)
        scales[rows] = new_scale
    new_code.clamp_(-QMAX, QMAX).scatter_(1, index, 0.0)
    codes[rows] = new_code.to(torch.int8)
