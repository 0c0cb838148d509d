"""The Lion step on float parameters with FP32 momentum, in plain PyTorch: the specification."""

from typing import Any

import torch
from torch import Tensor

from .philox import random_words


def lion_step_floats_(
    parameters: list[Tensor],
    momenta: list[Tensor],
    gradients: list[Tensor],
    *,
    steps: list[int],
    streams: list[int],
    **arguments: Any,
) -> None:
    """See `qft_hf.kernels.lion_float.lion_step_floats_`. Parameters are independent."""
    for parameter, momentum, gradient, step, stream in zip(
        parameters, momenta, gradients, steps, streams, strict=True
    ):
        _lion_step_(parameter, momentum, gradient, step=step, stream=stream, **arguments)


def _lion_step_(
    parameter: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    *,
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
    gradient = gradient.float().neg() if maximize else gradient.float()
    direction = (momentum * beta1).add_(gradient * (1 - beta1)).sign_()
    new_momentum = (momentum * beta2).add_(gradient * (1 - beta2))
    is_finite = gradient.isfinite()
    momentum.copy_(torch.where(is_finite, new_momentum, momentum))
    step_float_(
        parameter,
        direction,
        is_finite,
        lr=lr,
        weight_decay=weight_decay,
        stochastic=stochastic,
        seed=seed,
        step=step,
        stream=stream,
    )


def step_float_(
    parameter: Tensor,
    direction: Tensor,
    is_finite: Tensor,
    *,
    lr: float,
    weight_decay: float,
    stochastic: bool,
    seed: int,
    step: int,
    stream: int,
) -> None:
    """`w <- w - lr * (direction + weight_decay * w)` where `is_finite`, stochastically to BF16."""
    value = parameter.float()
    change = (value * (lr * weight_decay)).add_(direction * lr)
    value = value - change
    if parameter.dtype == torch.bfloat16 and stochastic:
        words = random_words(
            slice(0, 1),
            value.numel(),
            seed=seed,
            step=step,
            stream=stream,
            device=value.device,
        ).view(value.shape)
        value = _round_to_bfloat16(value, words)
        # An element that no update touched keeps its bits, whatever the random number.
        value = torch.where(change == 0, parameter.float(), value)
    parameter.copy_(torch.where(is_finite, value, parameter.float()))


def _round_to_bfloat16(value: Tensor, words: Tensor) -> Tensor:
    """Round FP32 to one of its two BF16 neighbours, the nearer with the higher probability.

    BF16 is FP32 without its low 16 bits: adding 16 random bits and cutting carries into the kept
    half with exactly the probability of the part that is cut.
    """
    bits = value.contiguous().view(torch.int32)
    random = (words >> 16).to(torch.int32)
    return ((bits + random) & ~0xFFFF).view(torch.float32)
