"""Steps of float parameters in Triton. Twin: `kernels/floats.py`."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import floats as operators
from ..values import Lion
from .launch import Constants, Launcher
from .numerics import INFINITY, magnitude_bits, random_words, sign

BLOCK = 1024
N_WARPS = 4

# What a row of the table holds: addresses of parameter, momentum and gradient, the number of
# elements, step and stream, and the first of the programs that work on it. Without momentum the
# address of the parameter stands in its place.
FIELDS: tl.constexpr = tl.constexpr(7)


@triton.jit(do_not_specialize=["seed"])
def _lion_floats_kernel(
    table_ptr,  # [n_tensors, FIELDS] int64; what the addresses of parameter and momentum tell is
    # modified
    owners_ptr,  # [n_programs] int64: the row of the table that a program works on
    lr,
    shrink,  # lr * weight_decay
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    gradient_sign,
    seed,
    PARAMETER: tl.constexpr,  # fp32 or bf16
    GRADIENT: tl.constexpr,  # fp32, bf16 or fp16
    HAS_MOMENTUM: tl.constexpr,  # else the gradient is the direction
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = table_ptr + tl.load(owners_ptr + program) * FIELDS
    parameter_ptr = tl.load(row).to(tl.pointer_type(PARAMETER))
    momentum_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    gradient_ptr = tl.load(row + 2).to(tl.pointer_type(GRADIENT))
    n = tl.load(row + 3)
    step, stream = tl.load(row + 4), tl.load(row + 5)

    start = (program - tl.load(row + 6)) * BLOCK + tl.zeros((1,), tl.int64)
    index = start[:, None] + tl.arange(0, BLOCK)[None, :]
    mask = index < n
    g = tl.load(gradient_ptr + index, mask=mask, other=0.0).to(tl.float32) * gradient_sign
    mask &= magnitude_bits(g) < INFINITY  # NaN is not: such elements stay
    old = tl.load(parameter_ptr + index, mask=mask, other=0.0).to(tl.float32)
    if HAS_MOMENTUM:
        m = tl.load(momentum_ptr + index, mask=mask, other=0.0)
        direction = sign(m * beta1 + g * one_minus_beta1)
        tl.store(momentum_ptr + index, m * beta2 + g * one_minus_beta2, mask=mask)
    else:
        direction = g
    change = old * shrink + direction * lr
    value = old - change
    if STOCHASTIC:
        # BF16 is FP32 without its low 16 bits: the sum carries into the kept half with exactly the
        # probability of the part that is cut.
        words = random_words(tl.zeros((1, 1), tl.int64), start, BLOCK, seed, step, stream)
        bits = value.to(tl.int32, bitcast=True) + (words >> 16).to(tl.int32)
        rounded = (bits & -65536).to(tl.float32, bitcast=True)
        value = tl.where(change == 0, old, rounded)
    tl.store(parameter_ptr + index, value.to(PARAMETER), mask=mask)


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@cache
def _constants(
    dtype: torch.dtype, gradient_dtype: torch.dtype, *, has_momentum: bool, stochastic: bool
) -> Constants:
    return Constants(
        PARAMETER=TRITON_DTYPES[dtype],
        GRADIENT=TRITON_DTYPES[gradient_dtype],
        HAS_MOMENTUM=has_momentum,
        STOCHASTIC=stochastic and dtype == torch.bfloat16,
        BLOCK=BLOCK,
        num_warps=N_WARPS,
        enable_fp_fusion=False,
    )


_launch_lion_floats = Launcher(_lion_floats_kernel)


def launch(
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    gradients: Sequence[Tensor],
    *,
    rule: Lion,
    seed: int,
    stochastic: bool,
    steps: Sequence[int],
    streams: Sequence[int],
) -> None:
    """Run the kernel once for each pair of dtypes; without momenta along the gradients."""
    # The kernel sees flat memory; a parameter in another order is rare and takes a copy.
    written = [*parameters, *(momenta or [])]
    flat = [tensor.contiguous() for tensor in written]
    members = zip(
        flat[: len(parameters)],
        flat[-len(parameters) :],
        [gradient.contiguous() for gradient in gradients],
        steps,
        streams,
        strict=True,
    )
    launches: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor, Tensor, int, int]]]
    launches = {}
    for member in members:
        launches.setdefault((member[0].dtype, member[2].dtype), []).append(member)
    for (dtype, gradient_dtype), tensors in launches.items():
        table, owners = _table(tensors)
        if not len(owners):
            continue  # nothing but empty tensors
        constants = _constants(
            dtype, gradient_dtype, has_momentum=momenta is not None, stochastic=stochastic
        )
        _launch_lion_floats(
            (len(owners),), constants, table, owners,
            *rule.numbers, seed,
        )  # fmt: skip
    for tensor, result in zip(written, flat, strict=True):
        if result is not tensor:
            tensor.copy_(result)
    # Autograd must see that a value changed which an earlier forward pass may have saved.
    torch.autograd.graph.increment_version(written)


@operators.lion_step_floats_.register("triton")
def lion_step_floats_(
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    **arguments: Any,
) -> None:
    launch(parameters, momenta, gradients, **arguments)


@operators.step_floats_.register("triton")
def step_floats_(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    **arguments: Any,
) -> None:
    rule = Lion(lr=lr, beta1=0.0, beta2=0.0, weight_decay=weight_decay)
    launch(parameters, None, directions, rule=rule, **arguments)


def _table(tensors: list[tuple[Tensor, Tensor, Tensor, int, int]]) -> tuple[Tensor, Tensor]:
    """The kernel's table and owners, in one transfer to the device, which nobody waits for."""
    numbers: list[int] = []
    owners: list[int] = []
    for row, (parameter, momentum, gradient, step, stream) in enumerate(tensors):
        addresses = [tensor.data_ptr() for tensor in (parameter, momentum, gradient)]
        numbers += [*addresses, parameter.numel(), step, stream, len(owners)]
        owners += [row] * -(-parameter.numel() // BLOCK)
    buffer = torch.tensor(numbers + owners).to(tensors[0][0].device, non_blocking=True)
    return buffer[: len(numbers)], buffer[len(numbers) :]
