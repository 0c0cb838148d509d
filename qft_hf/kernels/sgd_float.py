"""One SGD step on a float parameter: what is not quantized where weights have no momentum."""

from torch import Tensor

from .checks import check_same
from .lion_float import FLOATS
from .operators import declare, nothing

_sgd_step_float_ = declare(
    "sgd_step_float_",
    "(Tensor(a!) parameter, Tensor gradient, *, float lr, float weight_decay, "
    "bool maximize, bool stochastic, int seed, int step, int stream) -> ()",
    fake=nothing,
)


def sgd_step_float_(
    parameter: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    weight_decay: float,
    maximize: bool = False,
    stochastic: bool = True,
    seed: int,
    step: int,
    stream: int,
) -> None:
    """Update a float parameter in place: `w <- w - lr * (g + weight_decay * w)`.

    Args:
        parameter: fp32, or bf16, which is rounded stochastically; of any shape, modified.
        gradient: Any float dtype, same shape, finite.
        lr: Step size.
        weight_decay: Values shrink by `lr * weight_decay` a step.
        maximize: Step along the gradient, not against it.
        stochastic: False rounds BF16 to nearest, for ablation.
        seed: Key of the random numbers, in [0, 2**63).
        step: Number of this step.
        stream: Number of this parameter.

    Raises:
        TypeError: `parameter` is neither fp32 nor bf16.
        ValueError: Shapes or devices differ. Nothing was written.
    """
    if parameter.dtype not in FLOATS:
        raise TypeError(
            f"QFTLion trains float32 and bfloat16 parameters, got {parameter.dtype} for a "
            f"parameter of shape {tuple(parameter.shape)}. Load the model with "
            "dtype=torch.bfloat16."
        )
    check_same("gradient", gradient, parameter)
    _sgd_step_float_(
        parameter,
        gradient,
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        stochastic=stochastic,
        seed=seed,
        step=step,
        stream=stream,
    )
