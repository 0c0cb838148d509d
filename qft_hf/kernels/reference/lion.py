"""The Lion step on INT8 weights, momentum and gradients, in plain PyTorch: the specification.

Weights are rounded stochastically (Philox) against the scale that is stored. All of the weight's
arithmetic is in units of its code, so that an element whose update is zero keeps its code.
"""

from typing import Any

import torch
from torch import Tensor

from .groups import group_absmax, scale_groups_, spread_groups
from .philox import random_words, weight_uniform
from .quantize import QMAX, TINY, dequantize, quantize

# A scale is sticky: it changes only when a value no longer fits the codes or when the whole group
# has shrunk below RANGE_LOW, and then it is set so that the largest value gets code RANGE_TARGET,
# well inside both limits.
RANGE_TARGET = 120.0
RANGE_LOW = 60.0

CHUNK_ELEMENTS = 2**16  # updated at a time: temporaries stay in the cache


def lion_step_(codes: Tensor, *state: Tensor, **arguments: Any) -> None:
    """See `qft_hf.kernels.lion.lion_step_`. Rows are independent and go in chunks."""
    n_rows, columns = codes.shape
    chunk = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        _lion_rows_(codes, *state, rows=rows, **arguments)


def _lion_rows_(
    codes: Tensor,
    scales: Tensor,
    outlier_values: Tensor,
    outlier_columns: Tensor,
    momentum_codes: Tensor,
    momentum_scales: Tensor,
    gradient_codes: Tensor,
    gradient_scales: Tensor,
    *,
    rows: slice,
    group_size: int | None,
    state_group_size: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
    stochastic: bool,
    seed: int,
    step: int,
    stream: int,
) -> None:
    columns = codes.shape[1]
    shrink = lr * weight_decay

    gradient = dequantize(gradient_codes[rows], gradient_scales[rows], state_group_size)
    if maximize:
        gradient.neg_()
    momentum = dequantize(momentum_codes[rows], momentum_scales[rows], state_group_size)
    direction = (momentum * beta1).add_(gradient * (1 - beta1)).sign_()
    momentum = momentum.mul_(beta2).add_(gradient.mul_(1 - beta2))
    momentum_codes[rows], momentum_scales[rows] = quantize(momentum, state_group_size)

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
            rows, columns, seed=seed, step=step, stream=stream, device=codes.device
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
