"""The Lion step on INT8 weights, momentum and gradients, in plain PyTorch: the specification."""

from typing import Any

import torch
from torch import Tensor

from .nibbles import load_nibbles, round_to_nibbles
from .philox import MOMENTUM, random_words
from .quantize import dequantize, quantize
from .weight import row_chunks, step_weight_


def lion_step_(codes: Tensor, *state: Tensor, **arguments: Any) -> None:
    """See `qft_hf.kernels.lion.lion_step_`. Rows are independent and go in chunks.

    `first_row`, where given, is the number of the first row in the counter of random numbers.
    """
    for rows in row_chunks(codes):
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
    state_group_size: int,
    beta1: float,
    beta2: float,
    maximize: bool,
    stochastic: bool,
    seed: int,
    step: int,
    stream: int,
    first_row: int = 0,
    **arguments: Any,
) -> None:
    counter = {"seed": seed, "step": step, "stream": stream}
    counted = slice(first_row + rows.start, first_row + rows.stop)
    is_packed = momentum_codes.dtype == torch.uint8
    gradient = dequantize(gradient_codes[rows], gradient_scales[rows], state_group_size)
    if maximize:
        gradient.neg_()
    stored = momentum_codes[rows], momentum_scales[rows]
    if is_packed:
        momentum = load_nibbles(*stored, codes.shape[1])
    else:
        momentum = dequantize(*stored, state_group_size)
    direction = (momentum * beta1).add_(gradient * (1 - beta1)).sign_()
    momentum = momentum.mul_(beta2).add_(gradient.mul_(1 - beta2))
    if is_packed:
        words = None
        if stochastic:
            words = random_words(
                counted, stored[0].shape[1], **counter, purpose=MOMENTUM, device=codes.device
            )
        momentum_codes[rows], momentum_scales[rows] = round_to_nibbles(momentum, words)
    else:
        momentum_codes[rows], momentum_scales[rows] = quantize(momentum, state_group_size)
    step_weight_(
        codes, scales, outlier_values, outlier_columns, direction,
        rows=rows, counted=counted, stochastic=stochastic, **counter, **arguments,
    )  # fmt: skip
