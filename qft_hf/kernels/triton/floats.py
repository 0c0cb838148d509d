"""Steps of float parameters in Triton. Twin: `kernels/floats.py`."""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import floats as operators
from ..values import N_LIVE as _N_LIVE
from ..values import Lion, Roundings
from .launch import Constants, Launcher
from .numerics import INFINITY, magnitude_bits, read_live, rounding_words, signed

# Parameter, momentum, gradient, step and stream, for each parameter.
Members = list[tuple[Tensor, Tensor, Tensor, int, int]]

BLOCK = 1024
N_WARPS = 4

# Numbers in a row of the table: addresses of parameter, momentum and gradient, number of elements,
# step, stream, and the first program that works on the parameter. Without momentum, the address of
# the parameter takes its place.
FIELDS: tl.constexpr = tl.constexpr(7)
N_LIVE: tl.constexpr = tl.constexpr(_N_LIVE)


@triton.jit(do_not_specialize=["seed"])
def _lion_floats_kernel(
    table_ptr,  # [n_tensors, FIELDS] int64; parameters and momenta at its addresses are modified
    owners_ptr,  # [n_programs] int64: the row of the table that a program works on
    live_ptr,  # [n_streams, N_LIVE] fp64: lr, weight_decay and step of each stream, which replace
    # those below and the step in the table; or None
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
    HAS_MOMENTUM: tl.constexpr,  # if false, the gradient is the direction
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
    if live_ptr is not None:
        live_ptr += stream * N_LIVE
    lr, shrink, step = read_live(live_ptr, lr, shrink, step)

    start = (program - tl.load(row + 6)) * BLOCK + tl.zeros((1,), tl.int64)
    index = start[:, None] + tl.arange(0, BLOCK)[None, :]
    mask = index < n
    g = tl.load(gradient_ptr + index, mask=mask, other=0.0).to(tl.float32) * gradient_sign
    mask &= magnitude_bits(g) < INFINITY  # elements with inf or NaN stay as they are
    old = tl.load(parameter_ptr + index, mask=mask, other=0.0).to(tl.float32)
    if HAS_MOMENTUM:
        m = tl.load(momentum_ptr + index, mask=mask, other=0.0)
        direction = signed(1.0, m * beta1 + g * one_minus_beta1)
        tl.store(momentum_ptr + index, m * beta2 + g * one_minus_beta2, mask=mask)
    else:
        direction = g
    change = old * shrink + direction * lr
    value = old - change
    if STOCHASTIC:
        # BF16 is FP32 without its low 16 bits: adding 16 random bits carries into the high half
        # with exactly the probability that the bits to be cut off stand for.
        words = rounding_words(tl.zeros((1, 1), tl.int64), start, BLOCK, seed, step, stream)
        bits = value.to(tl.int32, bitcast=True) + (words >> 16).to(tl.int32)
        rounded = (bits & -65536).to(tl.float32, bitcast=True)
        value = tl.where(change == 0, old, rounded)
    tl.store(parameter_ptr + index, value.to(PARAMETER), mask=mask)


@triton.jit(
    do_not_specialize=[
        "row", "n_programs", "parameter", "momentum", "gradient", "n", "step", "stream",
        "first_program",
    ]
)  # fmt: skip
def _row_kernel(
    rows_ptr,  # [n_tensors, FIELDS] int64; one row is written
    owners_ptr,  # [n_programs] int64; the entries of this row's programs are written
    row,
    n_programs,
    parameter,
    momentum,
    gradient,
    n,
    step,
    stream,
    first_program,
    BLOCK: tl.constexpr,
):
    row_ptr = rows_ptr + row * FIELDS
    tl.store(row_ptr, parameter)
    tl.store(row_ptr + 1, momentum)
    tl.store(row_ptr + 2, gradient)
    tl.store(row_ptr + 3, n)
    tl.store(row_ptr + 4, step)
    tl.store(row_ptr + 5, stream)
    tl.store(row_ptr + 6, first_program)
    for start in range(0, n_programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        owned = tl.zeros((BLOCK,), tl.int64) + row
        tl.store(owners_ptr + first_program + program, owned, mask=program < n_programs)


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
    )


_ROW = Constants(BLOCK=BLOCK, num_warps=N_WARPS)
_launch_lion_floats = Launcher(_lion_floats_kernel)
_launch_row = Launcher(_row_kernel)


@operators.lion_step_floats_.register("triton")
def lion_step_floats_(
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    gradients: Sequence[Tensor],
    *,
    rule: Lion,
    roundings: Roundings,
) -> None:
    # One launch for each pair of dtypes. Without momenta, it steps along the gradients.
    # The kernel works on flat memory; non-contiguous parameters are rare and are copied.
    written = [*parameters, *(momenta or [])]
    flat = [tensor.contiguous() for tensor in written]
    members = zip(
        flat[: len(parameters)],
        flat[-len(parameters) :],
        [gradient.contiguous() for gradient in gradients],
        roundings.steps,
        roundings.streams,
        strict=True,
    )
    launches: dict[tuple[torch.dtype, torch.dtype], Members] = {}
    for member in members:
        launches.setdefault((member[0].dtype, member[2].dtype), []).append(member)
    for (dtype, gradient_dtype), tensors in launches.items():
        table, owners = _table(tensors, by_launches=roundings.live is not None)
        if not len(owners):
            continue  # all tensors are empty
        constants = _constants(
            dtype,
            gradient_dtype,
            has_momentum=momenta is not None,
            stochastic=roundings.stochastic,
        )
        _launch_lion_floats(
            (len(owners),), constants, table, owners, roundings.live, *rule.numbers, roundings.seed
        )
    for tensor, result in zip(written, flat, strict=True):
        if result is not tensor:
            tensor.copy_(result)
    # Autograd must notice the change, in case an earlier forward pass saved one of these tensors.
    torch.autograd.graph.increment_version(written)


@operators.step_floats_.register("triton")
def step_floats_(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    roundings: Roundings,
) -> None:
    rule = Lion.without_momentum(lr, weight_decay)
    lion_step_floats_(parameters, None, directions, rule=rule, roundings=roundings)


def _table(tensors: Members, *, by_launches: bool) -> tuple[Tensor, Tensor]:
    """Return the kernel's table and owners, copied to the device without waiting for the copy.

    With `by_launches`, kernels write them: a CUDA graph keeps the arguments of launches, but would
    repeat a copy from host memory that has other contents by then.
    """
    rows: list[tuple[int, ...]] = []
    owners: list[int] = []
    for row, (parameter, momentum, gradient, step, stream) in enumerate(tensors):
        addresses = (tensor.data_ptr() for tensor in (parameter, momentum, gradient))
        rows.append((*addresses, parameter.numel(), step, stream, len(owners)))
        owners += [row] * -(-parameter.numel() // BLOCK)
    n_numbers, device = len(rows) * FIELDS.value, tensors[0][0].device
    if not by_launches:
        flat = [number for numbers in rows for number in numbers]
        buffer = torch.tensor(flat + owners, device="cpu").to(device, non_blocking=True)
        return buffer[:n_numbers], buffer[n_numbers:]
    table = torch.empty(n_numbers, dtype=torch.int64, device=device)
    of_programs = torch.empty(len(owners), dtype=torch.int64, device=device)
    for row, numbers in enumerate(rows):
        n_programs = -(-numbers[3] // BLOCK)
        _launch_row((1,), _ROW, table, of_programs, row, n_programs, *numbers)
    return table, of_programs
