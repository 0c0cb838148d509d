"""The Lion step on INT8 state in Triton, one launch per weight. Twin: `kernels/lion.py`.

Without momentum the same kernel is `step_weight_` (`weight.py`), which moves the weight along a
given float direction instead of a sign.

A program owns a row, so no two programs touch the same element. Within a program, threads share
elements only at outliers: the threads that gather their old momentum and zero the codes under them
are not the ones that write the tile. In each tile all loads come before a barrier and all stores
after it, and the zeros are stored after one more barrier. That orders all accesses.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import NIBBLE_GROUP_SIZE
from .. import lion as operators
from ..values import Lion, Quantized, Rounding, Weight
from ..weight import RANGE_LOW as _RANGE_LOW
from ..weight import RANGE_TARGET as _RANGE_TARGET
from .launch import Constants, Launcher, Plan
from .nibbles import PER_TOP, load_nibbles, store_nibbles
from .numerics import (
    INFINITY,
    PER_QMAX,
    QMAX,
    TINY,
    absmax_scale,
    inverse_scale,
    magnitude_bits,
    nearest,
    nearest_code,
    quantized,
    read_live,
    rounding_words,
    signed,
    weight_uniform,
)
from .quantization import finite_codes, load_tile, outlier_tile, scale_of_bits
from .tiling import group_max, group_sum_of_squares, over_units, tile_columns, tiling

RANGE_LOW: tl.constexpr = tl.constexpr(_RANGE_LOW)
PER_TARGET: tl.constexpr = tl.constexpr(1.0 / _RANGE_TARGET)


@triton.jit
def _store_momentum(
    momentum_codes_ptr, m, scale, tile, row, seed, step, stream,
    MOMENTUM_BITS: tl.constexpr, STOCHASTIC: tl.constexpr, TILING: tl.constexpr,
):  # fmt: skip
    """Round and store a tile of momentum; `scale` `[n_units, 1]` is that of each unit."""
    start, exists, column, mask = tile
    inverse = inverse_scale(scale)
    if MOMENTUM_BITS == 4:
        store_nibbles(
            momentum_codes_ptr, m, inverse, start, exists, row, seed, step, stream,
            STOCHASTIC, TILING.COLUMNS, TILING.UNIT,
        )  # fmt: skip
    else:
        tl.store(momentum_codes_ptr + column, quantized(m, inverse), mask=mask)


@triton.jit
def _momentum_scale(absmax, MOMENTUM_BITS: tl.constexpr):
    return absmax_scale(absmax, PER_TOP if MOMENTUM_BITS == 4 else PER_QMAX)


@triton.jit
def _load_state(
    state, tile, MOMENTUM_BITS: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Load momentum and signed gradient of one tile in fp32; `state` is that of the row.

    Without momentum, load zeros and the given direction.
    """
    momentum_codes_ptr, momentum_scales_ptr, gradient_ptr, gradient_scales_ptr, gradient_sign = (
        state
    )
    start, exists, column, mask = tile
    if MOMENTUM_BITS == 0:
        m = tl.zeros(column.shape, tl.float32)
        g = tl.load(gradient_ptr + column, mask=mask, other=0.0)
    else:
        scale = tl.load(momentum_scales_ptr + start // MOMENTUM.GROUP, mask=exists, other=1.0)
        if MOMENTUM_BITS == 4:
            m = load_nibbles(momentum_codes_ptr, start, exists, column, mask, STATE.COLUMNS, UNIT)
        else:
            m = tl.load(momentum_codes_ptr + column, mask=mask, other=0).to(tl.float32)
        m *= scale[:, None]
        scale = tl.load(gradient_scales_ptr + start // STATE.GROUP, mask=exists, other=1.0)[:, None]
        g = tl.load(gradient_ptr + column, mask=mask, other=0).to(tl.float32)
        if gradient_ptr.dtype.element_ty != tl.int8:  # rounded as its codes would be
            g = nearest(g * inverse_scale(scale))
        g *= scale * gradient_sign
    return m, g


@triton.jit
def _direction(m, g, beta1, one_minus_beta1, MOMENTUM_BITS: tl.constexpr):
    """The direction of the step before its sign is taken; without momentum, the given one."""
    if MOMENTUM_BITS == 0:
        direction = g
    else:
        direction = m * beta1 + g * one_minus_beta1
    return direction


@triton.jit
def _step_by(size, direction, MOMENTUM_BITS: tl.constexpr):
    """`size * sign(direction)`; without momentum, `size * direction`."""
    if MOMENTUM_BITS == 0:
        by = direction * size
    else:
        by = signed(size, direction)
    return by


@triton.jit
def _update_outliers(
    values_ptr, columns_ptr, state, lr, shrink, beta1, one_minus_beta1,
    MOMENTUM_BITS: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr,
    N_OUTLIERS: tl.constexpr, OUTLIER_TILE: tl.constexpr,
):  # fmt: skip
    for tile in range((N_OUTLIERS + OUTLIER_TILE - 1) // OUTLIER_TILE):
        k = tile * OUTLIER_TILE + tl.arange(0, OUTLIER_TILE)
        exists = k < N_OUTLIERS
        start = tl.load(columns_ptr + k, mask=exists, other=0).to(tl.int32)
        tile_of_k = start, exists, start[:, None], exists[:, None]
        m, g = _load_state(state, tile_of_k, MOMENTUM_BITS, MOMENTUM, STATE, 1)
        direction = tl.reshape(
            _direction(m, g, beta1, one_minus_beta1, MOMENTUM_BITS), (OUTLIER_TILE,)
        )
        value = tl.load(values_ptr + k, mask=exists, other=0.0)
        change = value * shrink + _step_by(lr, direction, MOMENTUM_BITS)
        tl.debug_barrier()  # several threads load an element that one of them stores
        tl.store(values_ptr + k, value - change, mask=exists)


@triton.jit
def _quantize_gradient(gradient_ptr, scales_ptr, square_ptr, TILING: tl.constexpr):
    """Store the scales of a float row, and the sum of squares of its quantized values.

    Returns:
        The bits of the row's largest magnitude.
    """
    largest_of_row = 0
    GROUPS: tl.constexpr = TILING.GROUPS  # Triton 3.6 makes no shape of plain numbers
    square = tl.zeros((GROUPS,), tl.float64)
    for group_tile in range(TILING.GROUP_TILES):
        first_group = group_tile * TILING.GROUPS
        x, _, _ = load_tile(gradient_ptr, first_group, 0, TILING)
        largest = group_max(magnitude_bits(x), TILING)
        for unit_tile in range(1, TILING.UNIT_TILES):
            more, _, _ = load_tile(gradient_ptr, first_group, unit_tile * TILING.UNITS, TILING)
            largest = tl.maximum(largest, group_max(magnitude_bits(more), TILING))
        scale, group_inverse = scale_of_bits(largest)
        inverse = over_units(group_inverse, TILING)
        sums = group_sum_of_squares(finite_codes(x, inverse).to(tl.int32), TILING)
        for unit_tile in range(1, TILING.UNIT_TILES):
            more, _, _ = load_tile(gradient_ptr, first_group, unit_tile * TILING.UNITS, TILING)
            sums += group_sum_of_squares(finite_codes(more, inverse).to(tl.int32), TILING)
        group = first_group + tl.arange(0, TILING.GROUPS)
        tl.store(scales_ptr + group, scale, mask=group < TILING.N_GROUPS)
        wide_scale = scale.to(tl.float64)
        exact = sums.to(tl.float64) * (wide_scale * wide_scale)
        square += tl.where(group < TILING.N_GROUPS, exact, 0.0)
        largest_of_row = tl.maximum(largest_of_row, tl.max(largest, axis=0))
    tl.store(square_ptr, tl.sum(square, axis=0))
    return largest_of_row


@triton.jit
def _new_momentum(
    state, beta2, one_minus_beta2, first_group, first_unit,
    MOMENTUM_BITS: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    tile = tile_columns(first_group, first_unit, MOMENTUM)
    m, g = _load_state(state, tile, MOMENTUM_BITS, MOMENTUM, STATE, MOMENTUM.UNIT)
    return m * beta2 + g * one_minus_beta2, tile


@triton.jit
def _update_momentum(
    state, beta2, one_minus_beta2, row, seed, step, stream,
    MOMENTUM_BITS: tl.constexpr, STOCHASTIC: tl.constexpr, MOMENTUM: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """Update the momentum of a row in its own pass: its groups and the weight's share no tiles."""
    for group_tile in range(MOMENTUM.GROUP_TILES):
        first_group = group_tile * MOMENTUM.GROUPS
        m, tile = _new_momentum(
            state, beta2, one_minus_beta2, first_group, 0, MOMENTUM_BITS, MOMENTUM, STATE
        )
        absmax = group_max(tl.abs(m), MOMENTUM)
        for unit_tile in range(1, MOMENTUM.UNIT_TILES):
            more, _ = _new_momentum(
                state, beta2, one_minus_beta2, first_group, unit_tile * MOMENTUM.UNITS,
                MOMENTUM_BITS, MOMENTUM, STATE,
            )  # fmt: skip
            absmax = tl.maximum(absmax, group_max(tl.abs(more), MOMENTUM))
        scale = _momentum_scale(absmax, MOMENTUM_BITS)
        unit_scale = over_units(scale, MOMENTUM)
        tl.debug_barrier()
        _store_momentum(
            state[0], m, unit_scale, tile, row, seed, step, stream,
            MOMENTUM_BITS, STOCHASTIC, MOMENTUM,
        )  # fmt: skip
        for unit_tile in range(1, MOMENTUM.UNIT_TILES):
            more, tile_of_more = _new_momentum(
                state, beta2, one_minus_beta2, first_group, unit_tile * MOMENTUM.UNITS,
                MOMENTUM_BITS, MOMENTUM, STATE,
            )  # fmt: skip
            tl.debug_barrier()
            _store_momentum(
                state[0], more, unit_scale, tile_of_more, row, seed, step, stream,
                MOMENTUM_BITS, STOCHASTIC, MOMENTUM,
            )  # fmt: skip
        group = first_group + tl.arange(0, MOMENTUM.GROUPS)
        tl.store(state[1] + group, scale, mask=group < MOMENTUM.N_GROUPS)


@triton.jit(do_not_specialize=["seed", "step", "stream", "first_row"])
def _lion_kernel(
    codes_ptr,  # [rows, COLUMNS] int8, modified
    scales_ptr,  # [rows, N_GROUPS] fp32, modified
    outlier_values_ptr,  # [rows, N_OUTLIERS] fp32, modified
    outlier_columns_ptr,  # [rows, N_OUTLIERS] int16 or int32
    momentum_codes_ptr,  # [rows, MOMENTUM_WIDTH] int8, or uint8 with two columns per byte; modified
    momentum_scales_ptr,  # [rows, N_MOMENTUM_GROUPS] fp32, modified
    gradient_codes_ptr,  # [rows, COLUMNS] int8; or the gradient itself in fp32, bf16 or fp16; or
    # the direction in fp32
    gradient_scales_ptr,  # [rows, N_STATE_GROUPS] fp32; written if the gradient is float
    squares_ptr,  # [rows] fp64: sums of squares of the quantized gradient, written if it is float
    factor_ptr,  # one fp32 that multiplies the gradient; or None
    live_ptr,  # [N_LIVE] fp64: lr, weight_decay and step, which replace those below; or None
    lr,
    shrink,  # lr * weight_decay
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    gradient_sign,
    seed,
    step,
    stream,
    first_row,  # number of row 0 in the counter of random numbers
    STOCHASTIC: tl.constexpr,
    N_OUTLIERS: tl.constexpr,
    OUTLIER_TILE: tl.constexpr,
    TILING: tl.constexpr,
    STATE: tl.constexpr,  # tiling of the gradient; of its tiles if it is float
    MOMENTUM: tl.constexpr,  # tiling of the momentum; of its tiles if it has a pass of its own
    MOMENTUM_BITS: tl.constexpr,  # 0: no momentum, and the direction is given
    MOMENTUM_WIDTH: tl.constexpr,  # bytes of a row
    MOMENTUM_GROUP_IS_UNIT: tl.constexpr,  # the momentum of a tile can be rounded with the tile
):
    row = tl.program_id(0).to(tl.int64)
    codes_ptr += row * TILING.COLUMNS
    momentum_codes_ptr += row * MOMENTUM_WIDTH
    gradient_codes_ptr += row * TILING.COLUMNS
    scales_ptr += row * TILING.N_GROUPS
    momentum_scales_ptr += row * MOMENTUM.N_GROUPS
    gradient_scales_ptr += row * STATE.N_GROUPS
    squares_ptr += row
    outlier_values_ptr += row * N_OUTLIERS
    outlier_columns_ptr += row * N_OUTLIERS
    row += first_row
    lr, shrink, step = read_live(live_ptr, lr, shrink, step)
    first_counter = row * ((TILING.COLUMNS + 3) // 4)  # four columns share a counter

    if MOMENTUM_BITS > 0 and gradient_codes_ptr.dtype.element_ty != tl.int8:
        largest = _quantize_gradient(gradient_codes_ptr, gradient_scales_ptr, squares_ptr, STATE)
        if factor_ptr is not None:
            gradient_sign *= tl.load(factor_ptr)
        if largest >= INFINITY:  # or NaN: the row stays as it is, and its square is NaN
            return
        tl.debug_barrier()  # every thread reads scales that others have written

    state = (
        momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
        gradient_sign,
    )  # fmt: skip
    if N_OUTLIERS > 0:
        _update_outliers(
            outlier_values_ptr, outlier_columns_ptr, state, lr, shrink, beta1, one_minus_beta1,
            MOMENTUM_BITS, MOMENTUM, STATE, N_OUTLIERS, OUTLIER_TILE,
        )  # fmt: skip

    for group_tile in range(TILING.GROUP_TILES):
        group = group_tile * TILING.GROUPS + tl.arange(0, TILING.GROUPS)
        scale = tl.load(scales_ptr + group, mask=group < TILING.N_GROUPS, other=1.0)
        quanta = over_units(tl.div_rn(lr, scale), TILING)  # lr in units of one code
        absmax = tl.zeros_like(scale)
        if TILING.UNIT_TILES > 1:
            for unit_tile in range(TILING.UNIT_TILES):
                tile = tile_columns(group_tile * TILING.GROUPS, unit_tile * TILING.UNITS, TILING)
                m, g = _load_state(state, tile, MOMENTUM_BITS, MOMENTUM, STATE, TILING.UNIT)
                column, mask = tile[2], tile[3]
                code = tl.load(codes_ptr + column, mask=mask, other=0).to(tl.float32)
                direction = _direction(m, g, beta1, one_minus_beta1, MOMENTUM_BITS)
                target = code - (code * shrink + _step_by(quanta, direction, MOMENTUM_BITS))
                absmax = tl.maximum(absmax, group_max(tl.abs(target), TILING))
        for unit_tile in range(TILING.UNIT_TILES):
            tile = tile_columns(group_tile * TILING.GROUPS, unit_tile * TILING.UNITS, TILING)
            start, exists, column, mask = tile
            m, g = _load_state(state, tile, MOMENTUM_BITS, MOMENTUM, STATE, TILING.UNIT)
            code = tl.load(codes_ptr + column, mask=mask, other=0).to(tl.float32)
            tl.debug_barrier()  # every thread has read this tile before any thread overwrites it
            direction = _direction(m, g, beta1, one_minus_beta1, MOMENTUM_BITS)
            if MOMENTUM_GROUP_IS_UNIT:
                m = m * beta2 + g * one_minus_beta2
                m_scale = _momentum_scale(tl.max(tl.abs(m), axis=1), MOMENTUM_BITS)
                _store_momentum(
                    momentum_codes_ptr, m, m_scale[:, None], tile, row, seed, step, stream,
                    MOMENTUM_BITS, STOCHASTIC, TILING,
                )  # fmt: skip
                tl.store(momentum_scales_ptr + start // MOMENTUM.GROUP, m_scale, mask=exists)

            decrease = code * shrink + _step_by(quanta, direction, MOMENTUM_BITS)
            target = code - decrease
            if TILING.UNIT_TILES == 1:
                absmax = group_max(tl.abs(target), TILING)
            fits = (absmax <= QMAX) & ((absmax >= RANGE_LOW) | (absmax == 0))
            rescaled_scale = tl.maximum(scale * (absmax * PER_TARGET), TINY)
            new_scale = tl.where(fits, scale, rescaled_scale)
            if STOCHASTIC:
                words = rounding_words(first_counter, start, TILING.UNIT, seed, step, stream)
                uniform = weight_uniform(words)
            else:
                uniform = tl.full(code.shape, 0.5, tl.float32)
            # On GPUs, floor treats subnormals as 0; only updates below 1e-38 quanta are subnormal.
            new_code = code + tl.floor(uniform - decrease)
            if tl.min(fits.to(tl.int32), axis=0) == 0:  # rare: most scales do not change
                ratio = over_units(tl.div_rn(scale, new_scale), TILING)
                rescaled = tl.floor(target * ratio + uniform)
                keeps = over_units(fits.to(tl.int32), TILING) != 0
                new_code = tl.where(keeps, new_code, rescaled)
            new_code = nearest_code(tl.minimum(tl.maximum(new_code, -QMAX), QMAX))
            tl.store(codes_ptr + column, new_code, mask=mask)
            if unit_tile == TILING.UNIT_TILES - 1:
                tl.store(scales_ptr + group, new_scale, mask=group < TILING.N_GROUPS)

    if MOMENTUM_BITS > 0 and not MOMENTUM_GROUP_IS_UNIT:
        tl.debug_barrier()
        _update_momentum(
            state, beta2, one_minus_beta2, row, seed, step, stream,
            MOMENTUM_BITS, STOCHASTIC, MOMENTUM, STATE,
        )  # fmt: skip
    if N_OUTLIERS > 0:
        tl.debug_barrier()
        for tile in range((N_OUTLIERS + OUTLIER_TILE - 1) // OUTLIER_TILE):
            k = tile * OUTLIER_TILE + tl.arange(0, OUTLIER_TILE)
            column = tl.load(outlier_columns_ptr + k, mask=k < N_OUTLIERS, other=0).to(tl.int32)
            zero = tl.zeros((OUTLIER_TILE,), tl.int8)
            tl.store(codes_ptr + column, zero, mask=k < N_OUTLIERS)


@cache
def lion_constants(
    columns: int,
    n_outliers: int,
    group_size: int | None,
    state_group_size: int | None,
    momentum_bits: int,
    *,
    stochastic: bool,
) -> Constants:
    momentum_group_size = NIBBLE_GROUP_SIZE if momentum_bits == 4 else state_group_size
    of_weight = tiling(columns, group_size, momentum_group_size)
    momentum = tiling(columns, momentum_group_size)
    one_group = momentum.N_GROUPS == 1 and columns <= of_weight.UNIT
    return Constants(
        STOCHASTIC=stochastic,
        N_OUTLIERS=n_outliers,
        OUTLIER_TILE=outlier_tile(n_outliers),
        TILING=of_weight,
        STATE=tiling(columns, state_group_size),
        MOMENTUM=momentum,
        MOMENTUM_BITS=momentum_bits,
        MOMENTUM_WIDTH=-(-columns // 2) if momentum_bits == 4 else columns,
        MOMENTUM_GROUP_IS_UNIT=momentum_bits > 0
        and (of_weight.UNIT == momentum_group_size or one_group),
        num_warps=of_weight.n_warps,
    )


_launch_lion = Launcher(_lion_kernel)
# Arguments that differ between steps or do not belong to the weight: momentum and gradient with
# their scales, squares, factor, `live`, and eleven numbers.
OPEN_ARGUMENTS = (...,) * 18


def launch(
    weight: Weight,
    momentum: Quantized | None,
    gradient: tuple[Tensor, Tensor],
    squares: Tensor,
    factor: Tensor | None,
    *,
    group_size: int | None,
    rule: Lion,
    rounding: Rounding,
) -> None:
    """Run the kernel; `group_size` is that of the gradient."""
    bits = 0 if momentum is None else momentum.bits
    key = "lion", bits, group_size, rounding.stochastic
    plan = weight.plans.get(key)
    if plan is None:
        rows, columns = weight.codes.shape
        n_outliers = weight.outlier_values.shape[1]
        constants = lion_constants(
            columns, n_outliers, weight.group_size, group_size, bits, stochastic=rounding.stochastic
        )
        plan = weight.plans[key] = Plan(
            _launch_lion, (rows,), constants, *weight.tensors, *OPEN_ARGUMENTS
        )
    # Without momentum the kernel never accesses its tensors; the weight's scales are placeholders.
    state = (weight.scales, weight.scales) if momentum is None else momentum.tensors
    plan(
        *state, *gradient, squares, factor, rounding.live,
        *rule.numbers,
        rounding.seed, rounding.step, rounding.stream, rounding.first_row,
    )  # fmt: skip


@operators.lion_step_.register("triton")
def lion_step_(
    weight: Weight,
    momentum: Quantized,
    gradient: Quantized,
    *,
    rule: Lion,
    rounding: Rounding,
) -> None:
    # Squares of an INT8 gradient are not written; its scales are a placeholder for them.
    launch(
        weight, momentum, gradient.tensors, gradient.scales, None,
        group_size=gradient.group_size, rule=rule, rounding=rounding,
    )  # fmt: skip


@operators.quantize_and_lion_step_.register("triton")
def quantize_and_lion_step_(
    weight: Weight,
    momentum: Quantized,
    gradient: Tensor,
    *,
    factor: Tensor | None,
    group_size: int,
    rule: Lion,
    rounding: Rounding,
) -> Tensor:
    # Given a float gradient, the kernel of the step quantizes it first. Only the scales of the
    # quantized gradient are stored.
    rows, columns = gradient.shape
    n_groups = tiling(columns, group_size).N_GROUPS
    scales = gradient.new_empty(rows, n_groups, dtype=torch.float32)
    squares = gradient.new_empty(rows, dtype=torch.float64)
    launch(
        weight, momentum, (gradient, scales), squares, factor,
        group_size=group_size, rule=rule, rounding=rounding,
    )  # fmt: skip
    return squares
