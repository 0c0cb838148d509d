"""One SGD step on float parameters: what is not quantized where weights have no momentum."""

from collections.abc import Sequence

from torch import Tensor

from .lion_float import check_floats
from .operators import declare, nothing

_sgd_step_floats_ = declare(
    "sgd_step_floats_",
    "(Tensor(a!)[] parameters, Tensor[] gradients, *, float lr, float weight_decay, "
    "bool maximize, bool stochastic, int seed, int[] steps, int[] streams) -> ()",
    fake=nothing,
)


def sgd_step_floats_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    maximize: bool = False,
    stochastic: bool = True,
    seed: int,
    steps: Sequence[int],
    streams: Sequence[int],
) -> None:
    """Update float parameters in place: `w <- w - lr * (g + weight_decay * w)`.

    As `lion_step_floats_`: all of one dtype in one launch, BF16 rounded stochastically.

    Args:
        parameters: fp32 or bf16 of any shape, on one device, modified. None may share memory with
            another.
        gradients: fp32, bf16 or fp16, each of the shape of its parameter. An element whose gradient
            is NaN or infinite stays as it is.
        lr: Step size.
        weight_decay: Values shrink by `lr * weight_decay` a step.
        maximize: Step along the gradient, not against it.
        stochastic: False rounds BF16 to nearest, for ablation.
        seed: Key of the random numbers, in [0, 2**63).
        steps: Number of this step of each parameter.
        streams: Number of each parameter.

    Raises:
        TypeError: A parameter is neither fp32 nor bf16, or a gradient is of another dtype.
        ValueError: Shapes, devices or numbers of entries differ, or a parameter comes twice.
            Nothing was written.
    """
    check_floats(parameters, gradients, steps, streams)
    if not parameters:
        return
    _sgd_step_floats_(
        list(parameters),
        list(gradients),
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        stochastic=stochastic,
        seed=seed,
        steps=list(steps),
        streams=list(streams),
    )
