"""A step of an INT8 weight in a given direction, in plain PyTorch: the specification.

Weights are rounded stochastically (Philox) against the scale that is stored. All of the weight's
arithmetic is in units of its code, so that an element whose update is zero keeps its code.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .groups import group_absmax, scale_groups_, spread_groups
from .philox import random_words, weight_uniform
from .quantize import QMAX, TINY

# A scale is sticky: it changes only when a value no longer fits the codes or when the whole group
# has shrunk below RANGE_LOW, and then it is set so that the largest value gets code RANGE_TARGET,
# well inside both limits.
RANGE_TARGET = 120.0
RANGE_LOW = 60.0

CHUNK_ELEMENTS = 2**16  # updated at a time: temporaries stay in the cache


def row_chunks(codes: Tensor) -> Iterator[slice]:
    """Rows of `codes` in runs of `CHUNK_ELEMENTS`, or one by one."""
    n_rows, columns = codes.shape
    chunk = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, n_rows, chunk):
        yield slice(start, min(start + chunk, n_rows))


def step_weight_(
    codes: Tensor,
    scales: Tensor,
    outlier_values: Tensor,
    outlier_columns: Tensor,
    direction: Tensor,
    *,
    rows: slice,
    counted: slice,
    group_size: int | None,
    lr: float,
    weight_decay: float,
    stochastic: bool,
    seed: int,
    step: int,
    stream: int,
) -> None:
    """`w <- SR(w - lr * (direction + weight_decay * w))` in some rows; `direction` is consumed.

    `counted` are the numbers of the rows in the counter of random numbers.
    """
    columns = codes.shape[1]
    shrink = lr * weight_decay

    if outlier_values.shape[1]:
        index = outlier_columns[rows].long()
        value = outlier_values[rows]
        change = (value * shrink).add_(direction.gather(1, index) * lr)
        outlier_values[rows] = value.sub_(change)

    scale = scales[rows]
    quanta = torch.full_like(scale, lr) / scale  # lr in units of one code
    code = codes[rows].float()
    decrease = (code * shrink).add_(scale_groups_(direction, quanta, group_size))
    target = code - decrease
    absmax = group_absmax(target, group_size)
    fits = (absmax <= QMAX) & ((absmax >= RANGE_LOW) | (absmax == 0))

    if stochastic:
        words = random_words(
            counted, columns, seed=seed, step=step, stream=stream, device=codes.device
        )
        uniform = weight_uniform(words)
    else:
        uniform = torch.full_like(code, 0.5)
    new_code = code.add_((uniform - decrease).floor_())
    if not bool(fits.all()):
        new_scale = (scale * (absmax * (1.0 / RANGE_TARGET))).clamp_min_(TINY)
        new_scale = torch.where(fits, scale, new_scale)
        rescaled = scale_groups_(target, scale / new_scale, group_size).add_(uniform).floor_()
        new_code = torch.where(spread_groups(fits, columns, group_size), new_code, rescaled)
        scales[rows] = new_scale
    new_code.clamp_(-QMAX, QMAX)
    if outlier_values.shape[1]:
        new_code.scatter_(1, index, 0.0)
    codes[rows] = new_code.to(torch.int8)
