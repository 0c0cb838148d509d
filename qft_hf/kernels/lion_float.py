"""One Lion step on a float parameter: norms, biases, whatever is not quantized."""

import torch
from torch import Tensor

from .checks import check_same
from .operators import declare, nothing

FLOATS = (torch.float32, torch.bfloat16)

_lion_step_float_ = declare(
    "lion_step_float_",
    "(Tensor(a!) parameter, Tensor(b!) momentum, Tensor gradient, *, "
    "float lr, float beta1, float beta2, float weight_decay, "
    "bool maximize, bool stochastic, int seed, int step, int stream) -> ()",
    fake=nothing,
)


def lion_step_float_(
    parameter: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool = False,
    stochastic: bool = True,
    seed: int,
    step: int,
    stream: int,
) -> None:
    """Update a float parameter and its FP32 momentum in place; Lion with decoupled weight decay.

    A BF16 parameter is rounded stochastically: a usual step is far below half a unit of a norm
    weight near 1, and rounding to nearest would freeze it.

    Args:
        parameter: fp32 or bf16 of any shape, modified.
        momentum: fp32, same shape, modified.
        gradient: Any float dtype, same shape, finite.
        lr: Step size.
        beta1: Weight of the momentum in the direction.
        beta2: Decay of the momentum.
        weight_decay: Decoupled decay: values shrink by `lr * weight_decay` a step.
        maximize: Step along the gradient, not against it.
        stochastic: False rounds BF16 to nearest, for ablation.
        seed: Key of the random numbers, in [0, 2**63).
        step: Number of this step.
        stream: Number of this parameter.

    Raises:
        TypeError: `parameter` is neither fp32 nor bf16, or `momentum` is not fp32.
        ValueError: Shapes or devices differ. Nothing was written.

    Source:
        Chen et al. 2023, algorithm 2 (arXiv:2302.06675).
    """
    if parameter.dtype not in FLOATS:
        raise TypeError(
            f"QFTLion trains float32 and bfloat16 parameters, got {parameter.dtype} for a "
            f"parameter of shape {tuple(parameter.shape)}. Load the model with "
            "dtype=torch.bfloat16."
        )
    if momentum.dtype != torch.float32:
        raise TypeError(f"The momentum of a float parameter is float32, got {momentum.dtype}.")
    check_same("momentum", momentum, parameter)
    check_same("gradient", gradient, parameter)
    _lion_step_float_(
        parameter,
        momentum,
        gradient,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        maximize=maximize,
        stochastic=stochastic,
        seed=seed,
        step=step,
        stream=stream,
    )
