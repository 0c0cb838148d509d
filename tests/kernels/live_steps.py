"""Each step operator, with its numbers as arguments or in memory, where a CUDA graph reads them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qft_hf.kernels import AdamW
from qft_hf.kernels.values import N_LIVE
from tests.kernels.states import (
    ROUNDING,
    RULE,
    arguments,
    float_arguments,
    make_state,
    random,
    step_arguments,
    step_float_arguments,
)
from tests.kernels.test_adamw import coded, make_moments

# A learning rate and decay whose product differs if FP32 multiplies them, and a step beyond int32.
NUMBERS = [
    {"lr": 0.0123, "weight_decay": 0.13, "step": 2**40 + 3},
    {"lr": 0.05, "weight_decay": 0.013, "step": 2},
]
_lr, _decay = np.float32(NUMBERS[0]["lr"]), np.float32(NUMBERS[0]["weight_decay"])
assert _lr * _decay != np.float32(NUMBERS[0]["lr"] * NUMBERS[0]["weight_decay"])
OTHERS = {"lr": 7.0, "weight_decay": 0.5, "step": 1}  # not to be used

# The modified tensors, and a function that runs a step with given numbers or those in memory.
Step = tuple[list[Tensor], Callable[..., Any]]

SHAPE = 3, 600
STREAMS = [3, 8, 13]  # of `float_arguments`


def lion_step(momentum_bits: int, device: str | torch.device) -> Step:
    state = make_state(
        SHAPE, group_size=None, momentum_bits=momentum_bits, outlier_fraction=0.02
    ).to(device)

    def run(package: Any, **numbers: Any) -> None:
        package.lion_step_(*state.arguments(), **arguments(**numbers))

    return list(state.tensors().values()), run


def quantize_and_lion_step(momentum_bits: int, device: str | torch.device) -> Step:
    state = make_state(
        SHAPE, group_size=None, momentum_bits=momentum_bits, outlier_fraction=0.02
    ).to(device)
    gradient = (random(SHAPE, None) * 1e-3).to(device, torch.bfloat16)

    def run(package: Any, **numbers: Any) -> None:
        package.quantize_and_lion_step_(
            state.weight,
            state.momentum,
            gradient,
            group_size=256,
            **arguments(**numbers),
        )

    return list(state.tensors().values()), run


def step_weight(device: str | torch.device) -> Step:
    state = make_state(SHAPE, group_size=32, outlier_fraction=0.02).to(device)
    direction = random(SHAPE, None).to(device)

    def run(package: Any, **numbers: Any) -> None:
        package.step_weight_(state.weight, direction, **step_arguments(**numbers))

    return list(state.tensors().values()), run


def adamw_step(device: str | torch.device) -> Step:
    weight = make_state(SHAPE, group_size=32, outlier_fraction=0.02).to(device).weight
    moments = make_moments(SHAPE)
    tensors = [tensor.to(device) for tensor in moments.tensors]
    moments = type(moments)(*tensors, moments.group_size)
    gradient = coded((random(SHAPE, None) * 1e-3).to(device))

    def run(package: Any, *, lr: float, weight_decay: float, **counted: Any) -> None:
        rule, rounding = AdamW(lr, 0.9, 0.99, 1e-8, weight_decay), ROUNDING._replace(**counted)
        package.adamw_step_(weight, moments, gradient, rule=rule, rounding=rounding)

    return [*weight.tensors, *tensors], run


def float_steps(*, has_momentum: bool, device: str | torch.device) -> Step:
    """Step a scalar, more than a block, and one of another dtype, each with its own step number."""
    shapes = [((), torch.bfloat16), ((2, 701), torch.bfloat16), ((1500,), torch.float32)]
    parameters = [random((1, 1402), None).flatten()[: torch.Size(s).numel()] for s, _ in shapes[:2]]
    parameters.append(random((1, 1500), None))
    parameters = [
        values.reshape(shape).to(device, dtype)
        for values, (shape, dtype) in zip(parameters, shapes, strict=True)
    ]
    gradients = [parameter.flip(0) if parameter.ndim else -parameter for parameter in parameters]
    momenta = [0.1 * parameter.float() for parameter in parameters]

    def run(package: Any, **numbers: Any) -> None:
        if has_momentum:
            package.lion_step_floats_(
                parameters, momenta, gradients, **float_arguments(3, **numbers)
            )
        else:
            package.step_floats_(parameters, gradients, **step_float_arguments(3, **numbers))

    return [*parameters, *momenta], run


STEPS: dict[str, Callable[[str | torch.device], Step]] = {
    "lion": lambda device: lion_step(8, device),
    "lion, 4-bit": lambda device: lion_step(4, device),
    "quantize and lion": lambda device: quantize_and_lion_step(8, device),
    "quantize and lion, 4-bit": lambda device: quantize_and_lion_step(4, device),
    "weight": step_weight,
    "adamw": adamw_step,
    "lion, floats": lambda device: float_steps(has_momentum=True, device=device),
    "floats": lambda device: float_steps(has_momentum=False, device=device),
}


def in_memory(name: str, numbers: dict[str, Any], device: str | torch.device) -> Tensor:
    """Return the numbers in the form in which this operator reads them from memory."""
    values = [*numbers.values()]
    assert list(numbers) == ["lr", "weight_decay", "step"]
    if name == "adamw":
        rule = AdamW(RULE.lr, 0.9, 0.99, 1e-8, 0.1)
        values += rule.corrections(numbers["step"])
    rows = torch.full((STREAMS[-1] + 1, N_LIVE), torch.nan, dtype=torch.float64)
    if "floats" not in name:
        rows[0, : len(values)] = torch.tensor(values, dtype=torch.float64)
        return rows[0].to(device)
    for i, stream in enumerate(STREAMS):  # the steps of `float_arguments`
        rows[stream, :3] = torch.tensor([*values[:2], values[2] + 2 * i], dtype=torch.float64)
    return rows.to(device)
