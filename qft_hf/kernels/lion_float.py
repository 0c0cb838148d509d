"""One Lion step on float parameters: norms, biases, whatever is not quantized."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_finite, check_same
from .operators import declare, nothing
from .quantize import FLOATS as GRADIENT_FLOATS

FLOATS = (torch.float32, torch.bfloat16)


def _check_values(
    parameters: list[Tensor], momenta: list[Tensor], gradients: list[Tensor], **_: Any
) -> None:
    for momentum in momenta:
        check_finite("momentum", momentum)


_lion_step_floats_ = declare(
    "lion_step_floats_",
    "(Tensor(a!)[] parameters, Tensor(b!)[] momenta, Tensor[] gradients, *, "
    "float lr, float beta1, float beta2, float weight_decay, "
    "bool maximize, bool stochastic, int seed, int[] steps, int[] streams) -> ()",
    fake=nothing,
    check_values=_check_values,
)


def lion_step_floats_(
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool = False,
    stochastic: bool = True,
    seed: int,
    steps: Sequence[int],
    streams: Sequence[int],
) -> None:
    """Update float parameters and their FP32 momenta in place; Lion with decoupled weight decay.

    All sequences have one entry for each parameter. On a GPU all parameters of one dtype are
    updated by one launch: there are hundreds of them and each is tiny.

    A BF16 parameter is rounded stochastically: a usual step is far below half a unit of a norm
    weight near 1, and rounding to nearest would freeze it.

    Args:
        parameters: fp32 or bf16 of any shape, on one device, modified. None may share memory with
            another.
        momenta: fp32, each of the shape of its parameter, modified.
        gradients: fp32, bf16 or fp16, each of the shape of its parameter. An element whose gradient
            is NaN or infinite stays as it is.
        lr: Step size.
        beta1: Weight of the momentum in the direction.
        beta2: Decay of the momentum.
        weight_decay: Decoupled decay: values shrink by `lr * weight_decay` a step.
        maximize: Step along the gradient, not against it.
        stochastic: False rounds BF16 to nearest, for ablation.
        seed: Key of the random numbers, in [0, 2**63).
        steps: Number of this step of each parameter; with the stream and the element's position it
            counts the random numbers.
        streams: Number of each parameter.

    Raises:
        TypeError: A parameter is neither fp32 nor bf16, a momentum is not fp32, or a gradient is of
            another dtype.
        ValueError: Shapes, devices or numbers of entries differ, or a parameter comes twice. On the
            CPU also: a momentum is not finite; on a GPU the caller has looked. Nothing was
            written.

    Source:
        Chen et al. 2023, algorithm 2 (arXiv:2302.06675).
    """
    if len(momenta) != len(parameters):
        raise ValueError(
            f"A Lion step needs a momentum for each float parameter, got {len(parameters)} "
            f"parameters and {len(momenta)} momenta."
        )
    check_floats(parameters, gradients, steps, streams)
    for parameter, momentum in zip(parameters, momenta, strict=True):
        if momentum.dtype != torch.float32:
            raise TypeError(f"The momentum of a float parameter is float32, got {momentum.dtype}.")
        check_same("momentum", momentum, parameter)
    if not parameters:
        return
    _lion_step_floats_(
        list(parameters),
        list(momenta),
        list(gradients),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        maximize=maximize,
        stochastic=stochastic,
        seed=seed,
        steps=list(steps),
        streams=list(streams),
    )


def check_floats(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    steps: Sequence[int],
    streams: Sequence[int],
) -> None:
    """Raise unless these are float parameters of one device, and a gradient, step and stream each.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes, devices or numbers of entries differ, or a parameter comes twice.
    """
    lengths = [len(x) for x in (parameters, gradients, steps, streams)]
    if len(set(lengths)) > 1:
        raise ValueError(
            "A step needs a gradient, a step number and a stream for each float parameter, got "
            f"{lengths} parameters, gradients, steps and streams."
        )
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError(
            "A parameter comes twice, and one step would write it twice at the same time. Add its "
            "gradients and pass it once."
        )
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.dtype not in FLOATS:
            raise TypeError(
                f"QFTLion trains float32 and bfloat16 parameters, got {parameter.dtype} for a "
                f"parameter of shape {tuple(parameter.shape)}. Load the model with "
                "dtype=torch.bfloat16."
            )
        if gradient.dtype not in GRADIENT_FLOATS:
            raise TypeError(
                "The gradient of a float parameter is float32, bfloat16 or float16, got "
                f"{gradient.dtype}. Call .float() first."
            )
        check_same("gradient", gradient, parameter)
        if parameter.device != parameters[0].device:
            raise ValueError(
                "The parameters of one call are on one device, got "
                f"{parameters[0].device} and {parameter.device}. Make one call for each device."
            )
