"""Steps of float parameters: norms, biases and everything else that is not quantized.

A BF16 parameter is rounded stochastically: for a norm weight near 1 a usual step is far below half
a unit in the last place, and rounding to nearest would freeze it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import FLOATS, check_finite, check_live, check_same
from .operators import operator
from .values import N_LIVE, Lion, Rounding, Roundings, read_live

PARAMETER_DTYPES = (torch.float32, torch.bfloat16)


@operator(writes=("parameters",))
def step_floats_(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    roundings: Roundings,
) -> None:
    """Update float parameters in place: `w <- w - lr * (direction + weight_decay * w)`.

    There is a direction and a rounding for each parameter. On a GPU all parameters of one dtype are
    updated by one launch: there are hundreds of them and each is tiny.

    Args:
        parameters: fp32 or bf16 of any shape, on one device, modified. No two may share memory.
        directions: fp32, bf16 or fp16, each of the shape of its parameter. An element whose
            direction is NaN or infinite stays as it is.
        lr: Step size.
        weight_decay: Values shrink by `lr * weight_decay` a step.
        roundings: The random numbers of each; FP32 is not rounded.

    Raises:
        TypeError: A parameter is neither fp32 nor bf16, or a direction is of another dtype.
        ValueError: Shapes, devices or numbers of entries differ, or a parameter is passed twice.
            Nothing was written.
    """
    rule, of_each = Lion.without_momentum(lr, weight_decay), roundings.of_each()
    for parameter, given, rounding in zip(parameters, directions, of_each, strict=True):
        direction = given.float()
        _step_(parameter, direction, direction.isfinite(), *read_live(rule, rounding))


@operator(writes=("parameters", "momenta"))
def lion_step_floats_(
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    rule: Lion,
    roundings: Roundings,
) -> None:
    """Update float parameters and their FP32 momenta in place; Lion with decoupled weight decay.

    Args:
        parameters: As `step_floats_` takes them, modified.
        momenta: fp32, each of the shape of its parameter, modified.
        gradients: fp32, bf16 or fp16, each of the shape of its parameter. An element whose gradient
            is NaN or infinite stays as it is.
        rule: The numbers of the step.
        roundings: As in `step_floats_`.

    Raises:
        TypeError: What `step_floats_` refuses, or a momentum is not fp32.
        ValueError: What `step_floats_` refuses. On the CPU also: a momentum is not finite; for a
            GPU the caller checks that. Nothing was written.

    Source:
        Chen et al. 2023, algorithm 2 (arXiv:2302.06675).
    """
    for parameter, momentum, given, rounding in zip(
        parameters, momenta, gradients, roundings.of_each(), strict=True
    ):
        gradient = given.float().neg() if rule.maximize else given.float()
        direction = (momentum * rule.beta1).add_(gradient * (1 - rule.beta1)).sign_()
        new_momentum = (momentum * rule.beta2).add_(gradient * (1 - rule.beta2))
        is_finite = gradient.isfinite()
        momentum.copy_(torch.where(is_finite, new_momentum, momentum))
        _step_(parameter, direction, is_finite, *read_live(rule, rounding))


def _step_(
    parameter: Tensor,
    direction: Tensor,
    is_finite: Tensor,
    rule: Lion,
    rounding: Rounding,
) -> None:
    """Step the elements of one parameter that `is_finite` marks; BF16 rounds stochastically."""
    value = parameter.float()
    lr, shrink = rule.numbers[:2]
    change = (value * shrink).add_(direction * lr)
    value = value - change
    if parameter.dtype == torch.bfloat16 and rounding.stochastic:
        words = rounding.words(slice(0, 1), value.numel(), value.device)
        value = _round_to_bfloat16(value, words.view(value.shape))
        # An element whose change is 0 keeps its bits, whatever the random number.
        value = torch.where(change == 0, parameter.float(), value)
    parameter.copy_(torch.where(is_finite, value, parameter.float()))


def _round_to_bfloat16(value: Tensor, words: Tensor) -> Tensor:
    """Round FP32 to one of its two BF16 neighbors, the nearer with the higher probability.

    BF16 is FP32 without its low 16 bits. A sum with 16 random bits carries into the high half with
    a probability equal to the fraction that is then cut off.
    """
    bits = value.contiguous().view(torch.int32)
    random = (words >> 16).to(torch.int32)
    return ((bits + random) & ~0xFFFF).view(torch.float32)


@step_floats_.checks
def _check(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    roundings: Roundings,
    **_: object,
) -> None:
    lengths = [len(x) for x in (parameters, directions, roundings.steps, roundings.streams)]
    if len(set(lengths)) > 1:
        raise ValueError(
            "A step needs a gradient, a step number and a stream for each float parameter, got "
            f"{lengths} parameters, gradients, steps and streams."
        )
    if roundings.live is not None and len(parameters):
        n_rows = max(len(roundings.live), 1 + max(roundings.streams, default=0))
        check_live(roundings.live, (n_rows, N_LIVE), parameters[0].device)
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError(
            "A parameter was passed twice, and one step would write it twice at the same time. Add "
            "up its gradients and pass it once."
        )
    for parameter, direction in zip(parameters, directions, strict=True):
        if parameter.dtype not in PARAMETER_DTYPES:
            raise TypeError(
                "Float parameters trained with INT8 weights must be float32 or bfloat16, "
                f"got {parameter.dtype} for a parameter of shape {tuple(parameter.shape)}. Load "
                "the model with dtype=torch.bfloat16."
            )
        if direction.dtype not in FLOATS:
            raise TypeError(
                "The gradient of a float parameter must be float32, bfloat16 or float16, got "
                f"{direction.dtype}. Call .float() first."
            )
        check_same("gradient", direction, parameter)
        if parameter.device != parameters[0].device:
            raise ValueError(
                "The parameters of one call must be on one device, got "
                f"{parameters[0].device} and {parameter.device}. Make one call for each device."
            )


@lion_step_floats_.checks
def _(
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    **options: object,
) -> None:
    if len(momenta) != len(parameters):
        raise ValueError(
            f"A Lion step needs a momentum for each float parameter, got {len(parameters)} "
            f"parameters and {len(momenta)} momenta."
        )
    _check(parameters, gradients, **options)
    for parameter, momentum in zip(parameters, momenta, strict=True):
        if momentum.dtype != torch.float32:
            raise TypeError(f"A float parameter's momentum must be float32, got {momentum.dtype}.")
        check_same("momentum", momentum, parameter)


@lion_step_floats_.checks_values
def _(parameters: object, momenta: Sequence[Tensor], *_: object, **__: object) -> None:
    for momentum in momenta:
        check_finite("momentum", momentum)
