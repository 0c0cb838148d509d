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
from .nibbles import load_nibbles, nibble_scale, store_nibbles
from .numerics import (
    INFINITY,
    QMAX,
    TINY,
    absmax_scale,
    inverse_scale,
    magnitude_bits,
    nearest,
    nearest_code,
    quantized,
    random_words,
    signed,
    weight_uniform,
)
from .quantization import finite_codes, load_tile, outlier_tile, scale_of_bits
from .tiling import group_max, over_units, tile_columns, tiling

RANGE_LOW: tl.constexpr = tl.constexpr(_RANGE_LOW)
PER_TARGET: tl.constexpr = tl.constexpr(1.0 / _RANGE_TARGET)


@triton.jit
def _load_gradient(gradient_codes_ptr, scale, gradient_sign, column, mask):
    """Load the signed gradient in fp32 from codes, or from floats rounded as codes would be."""
    g = tl.load(gradient_codes_ptr + column, mask=mask, other=0).to(tl.float32)
    if gradient_codes_ptr.dtype.element_ty != tl.int8:
        g = nearest(g * inverse_scale(scale))
    return g * (scale * gradient_sign)


@triton.jit
def _load_momentum(
    momentum_codes_ptr, momentum_scales_ptr, start, exists, column, mask,
    MOMENTUM_BITS: tl.constexpr, MOMENTUM_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Load the momentum of one tile in fp32."""
    scale = tl.load(momentum_scales_ptr + start // MOMENTUM_GROUP, mask=exists, other=1.0)
    if MOMENTUM_BITS == 4:
        m = load_nibbles(momentum_codes_ptr, start, exists, column, mask, COLUMNS, UNIT)
    else:
        m = tl.load(momentum_codes_ptr + column, mask=mask, other=0).to(tl.float32)
    return m * scale[:, None]


@triton.jit
def _store_momentum(
    momentum_codes_ptr, m, scale, start, exists, column, mask, row, seed, step, stream,
    MOMENTUM_BITS: tl.constexpr, STOCHASTIC: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Round and store a tile of momentum; `scale` `[n_units, 1]` is that of each unit."""
    inverse = inverse_scale(scale)
    if MOMENTUM_BITS == 4:
        store_nibbles(
            momentum_codes_ptr, m, inverse, start, exists, row, seed, step, stream,
            STOCHASTIC, COLUMNS, UNIT,
        )  # fmt: skip
    else:
        tl.store(momentum_codes_ptr + column, quantized(m, inverse), mask=mask)


@triton.jit
def _momentum_scale(absmax, MOMENTUM_BITS: tl.constexpr):
    if MOMENTUM_BITS == 4:
        scale = nibble_scale(absmax)
    else:
        scale = absmax_scale(absmax)
    return scale


@triton.jit
def _load_state(
    momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
    gradient_sign, start, exists, column, mask, MOMENTUM_BITS: tl.constexpr,
    MOMENTUM_GROUP: tl.constexpr, STATE_GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Load momentum and signed gradient of one tile in fp32; `start` and `exists` are per unit.

    Without momentum, load zeros and the given direction.
    """
    if MOMENTUM_BITS == 0:
        m = tl.zeros(column.shape, tl.float32)
        g = tl.load(gradient_codes_ptr + column, mask=mask, other=0.0)
    else:
        m = _load_momentum(
            momentum_codes_ptr, momentum_scales_ptr, start, exists, column, mask,
            MOMENTUM_BITS, MOMENTUM_GROUP, COLUMNS, UNIT,
        )  # fmt: skip
        g_scale = tl.load(gradient_scales_ptr + start // STATE_GROUP, mask=exists, other=1.0)
        g = _load_gradient(gradient_codes_ptr, g_scale[:, None], gradient_sign, column, mask)
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
    values_ptr, columns_ptr, momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr,
    gradient_scales_ptr, lr, shrink, beta1, one_minus_beta1, gradient_sign,
    MOMENTUM_BITS: tl.constexpr, MOMENTUM_GROUP: tl.constexpr, STATE_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr, N_OUTLIERS: tl.constexpr, OUTLIER_TILE: tl.constexpr,
):  # fmt: skip
    for tile in range((N_OUTLIERS + OUTLIER_TILE - 1) // OUTLIER_TILE):
        k = tile * OUTLIER_TILE + tl.arange(0, OUTLIER_TILE)
        exists = k < N_OUTLIERS
        start = tl.load(columns_ptr + k, mask=exists, other=0).to(tl.int32)
        m, g = _load_state(
            momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
            gradient_sign, start, exists, start[:, None], exists[:, None],
            MOMENTUM_BITS, MOMENTUM_GROUP, STATE_GROUP, COLUMNS, 1,
        )  # fmt: skip
        direction = tl.reshape(
            _direction(m, g, beta1, one_minus_beta1, MOMENTUM_BITS), (OUTLIER_TILE,)
        )
        value = tl.load(values_ptr + k, mask=exists, other=0.0)
        change = value * shrink + _step_by(lr, direction, MOMENTUM_BITS)
        tl.debug_barrier()  # several threads load an element that one of them stores
        tl.store(values_ptr + k, value - change, mask=exists)


@triton.jit
def _quantize_gradient(
    gradient_ptr, scales_ptr, square_ptr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, N_GROUPS: tl.constexpr, UNIT: tl.constexpr,
    UNITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_TILES: tl.constexpr,
    UNIT_TILES: tl.constexpr,
):  # fmt: skip
    """Store the scales of a float row, and the sum of squares of its quantized values.

    Returns:
        The bits of the row's largest magnitude.
    """
    largest_of_row = 0
    square = tl.zeros((GROUPS,), tl.float64)
    for group_tile in range(GROUP_TILES):
        first_group = group_tile * GROUPS
        x, _, _ = load_tile(gradient_ptr, first_group, 0, COLUMNS, GROUP, UNIT, UNITS, GROUPS)
        largest = group_max(magnitude_bits(x), UNITS, GROUPS)
        for unit_tile in range(1, UNIT_TILES):
            more, _, _ = load_tile(
                gradient_ptr, first_group, unit_tile * UNITS, COLUMNS, GROUP, UNIT, UNITS, GROUPS
            )
            largest = tl.maximum(largest, group_max(magnitude_bits(more), UNITS, GROUPS))
        scale, group_inverse = scale_of_bits(largest)
        inverse = over_units(group_inverse, UNITS, GROUPS)
        sums = _sum_of_squares(x, inverse, UNITS, GROUPS)
        for unit_tile in range(1, UNIT_TILES):
            more, _, _ = load_tile(
                gradient_ptr, first_group, unit_tile * UNITS, COLUMNS, GROUP, UNIT, UNITS, GROUPS
            )
            sums += _sum_of_squares(more, inverse, UNITS, GROUPS)
        group = first_group + tl.arange(0, GROUPS)
        tl.store(scales_ptr + group, scale, mask=group < N_GROUPS)
        wide_scale = scale.to(tl.float64)
        exact = sums.to(tl.float64) * (wide_scale * wide_scale)
        square += tl.where(group < N_GROUPS, exact, 0.0)
        largest_of_row = tl.maximum(largest_of_row, tl.max(largest, axis=0))
    tl.store(square_ptr, tl.sum(square, axis=0))
    return largest_of_row


@triton.jit
def _sum_of_squares(x, inverse, UNITS: tl.constexpr, GROUPS: tl.constexpr):
    code = finite_codes(x, inverse).to(tl.int32)
    of_units = tl.reshape(tl.sum(code * code, axis=1), (GROUPS, UNITS))
    return tl.sum(of_units.to(tl.int64), axis=1)


@triton.jit
def _new_momentum(
    momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
    beta2, one_minus_beta2, gradient_sign, first_group, first_unit,
    MOMENTUM_BITS: tl.constexpr, STATE_GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    start, exists, column, mask = tile_columns(
        first_group, first_unit, COLUMNS, GROUP, UNIT, UNITS, GROUPS
    )
    m, g = _load_state(
        momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
        gradient_sign, start, exists, column, mask,
        MOMENTUM_BITS, GROUP, STATE_GROUP, COLUMNS, UNIT,
    )  # fmt: skip
    return m * beta2 + g * one_minus_beta2, start, exists, column, mask


@triton.jit
def _update_momentum(
    momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
    beta2, one_minus_beta2, gradient_sign, row, seed, step, stream,
    MOMENTUM_BITS: tl.constexpr, STOCHASTIC: tl.constexpr, STATE_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, N_GROUPS: tl.constexpr, UNIT: tl.constexpr,
    UNITS: tl.constexpr, GROUPS: tl.constexpr, GROUP_TILES: tl.constexpr,
    UNIT_TILES: tl.constexpr,
):  # fmt: skip
    """Update the momentum of a row in its own pass: its groups and the weight's share no tiles."""
    for group_tile in range(GROUP_TILES):
        first_group = group_tile * GROUPS
        m, start, exists, column, mask = _new_momentum(
            momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
            beta2, one_minus_beta2, gradient_sign, first_group, 0,
            MOMENTUM_BITS, STATE_GROUP, COLUMNS, GROUP, UNIT, UNITS, GROUPS,
        )  # fmt: skip
        absmax = group_max(tl.abs(m), UNITS, GROUPS)
        for unit_tile in range(1, UNIT_TILES):
            more, _, _, _, _ = _new_momentum(
                momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
                beta2, one_minus_beta2, gradient_sign, first_group, unit_tile * UNITS,
                MOMENTUM_BITS, STATE_GROUP, COLUMNS, GROUP, UNIT, UNITS, GROUPS,
            )  # fmt: skip
            absmax = tl.maximum(absmax, group_max(tl.abs(more), UNITS, GROUPS))
        scale = _momentum_scale(absmax, MOMENTUM_BITS)
        unit_scale = over_units(scale, UNITS, GROUPS)
        tl.debug_barrier()
        _store_momentum(
            momentum_codes_ptr, m, unit_scale, start, exists, column, mask, row, seed, step,
            stream, MOMENTUM_BITS, STOCHASTIC, COLUMNS, UNIT,
        )  # fmt: skip
        for unit_tile in range(1, UNIT_TILES):
            more, start, exists, column, mask = _new_momentum(
                momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
                beta2, one_minus_beta2, gradient_sign, first_group, unit_tile * UNITS,
                MOMENTUM_BITS, STATE_GROUP, COLUMNS, GROUP, UNIT, UNITS, GROUPS,
            )  # fmt: skip
            tl.debug_barrier()
            _store_momentum(
                momentum_codes_ptr, more, unit_scale, start, exists, column, mask, row, seed, step,
                stream, MOMENTUM_BITS, STOCHASTIC, COLUMNS, UNIT,
            )  # fmt: skip
        group = first_group + tl.arange(0, GROUPS)
        tl.store(momentum_scales_ptr + group, scale, mask=group < N_GROUPS)


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
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    UNIT_TILES: tl.constexpr,
    STATE_GROUP: tl.constexpr,
    N_STATE_GROUPS: tl.constexpr,
    STATE_UNIT: tl.constexpr,  # from here on the tiling of a float gradient
    STATE_UNITS: tl.constexpr,
    STATE_GROUPS: tl.constexpr,
    STATE_GROUP_TILES: tl.constexpr,
    STATE_UNIT_TILES: tl.constexpr,
    MOMENTUM_BITS: tl.constexpr,  # 0: no momentum, and the direction is given
    MOMENTUM_WIDTH: tl.constexpr,  # bytes of a row
    MOMENTUM_GROUP: tl.constexpr,
    N_MOMENTUM_GROUPS: tl.constexpr,
    MOMENTUM_GROUP_IS_UNIT: tl.constexpr,  # the momentum of a tile can be rounded with the tile
    MOMENTUM_UNIT: tl.constexpr,  # from here on the tiling of momentum in a pass of its own
    MOMENTUM_UNITS: tl.constexpr,
    MOMENTUM_GROUPS: tl.constexpr,
    MOMENTUM_GROUP_TILES: tl.constexpr,
    MOMENTUM_UNIT_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    codes_ptr += row * COLUMNS
    momentum_codes_ptr += row * MOMENTUM_WIDTH
    gradient_codes_ptr += row * COLUMNS
    scales_ptr += row * N_GROUPS
    momentum_scales_ptr += row * N_MOMENTUM_GROUPS
    gradient_scales_ptr += row * N_STATE_GROUPS
    squares_ptr += row
    outlier_values_ptr += row * N_OUTLIERS
    outlier_columns_ptr += row * N_OUTLIERS
    row += first_row
    if live_ptr is not None:
        rate = tl.load(live_ptr)
        lr, shrink = rate.to(tl.float32), (rate * tl.load(live_ptr + 1)).to(tl.float32)
        step = tl.load(live_ptr + 2).to(tl.int64)
    first_counter = row * ((COLUMNS + 3) // 4)  # four columns share a counter

    if MOMENTUM_BITS > 0 and gradient_codes_ptr.dtype.element_ty != tl.int8:
        largest = _quantize_gradient(
            gradient_codes_ptr, gradient_scales_ptr, squares_ptr,
            COLUMNS, STATE_GROUP, N_STATE_GROUPS, STATE_UNIT, STATE_UNITS, STATE_GROUPS,
            STATE_GROUP_TILES, STATE_UNIT_TILES,
        )  # fmt: skip
        if factor_ptr is not None:
            gradient_sign *= tl.load(factor_ptr)
        if largest >= INFINITY:  # or NaN: the row stays as it is, and its square is NaN
            return
        tl.debug_barrier()  # every thread reads scales that others have written

    if N_OUTLIERS > 0:
        _update_outliers(
            outlier_values_ptr, outlier_columns_ptr, momentum_codes_ptr, momentum_scales_ptr,
            gradient_codes_ptr, gradient_scales_ptr, lr, shrink, beta1, one_minus_beta1,
            gradient_sign, MOMENTUM_BITS, MOMENTUM_GROUP, STATE_GROUP, COLUMNS,
            N_OUTLIERS, OUTLIER_TILE,
        )  # fmt: skip

    for group_tile in range(GROUP_TILES):
        group = group_tile * GROUPS + tl.arange(0, GROUPS)
        scale = tl.load(scales_ptr + group, mask=group < N_GROUPS, other=1.0)
        quanta = over_units(tl.div_rn(lr, scale), UNITS, GROUPS)  # lr in units of one code
        absmax = tl.zeros((GROUPS,), tl.float32)
        if UNIT_TILES > 1:
            for unit_tile in range(UNIT_TILES):
                start, exists, column, mask = tile_columns(
                    group_tile * GROUPS, unit_tile * UNITS, COLUMNS, GROUP, UNIT, UNITS, GROUPS
                )
                m, g = _load_state(
                    momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr,
                    gradient_scales_ptr, gradient_sign, start, exists, column, mask,
                    MOMENTUM_BITS, MOMENTUM_GROUP, STATE_GROUP, COLUMNS, UNIT,
                )  # fmt: skip
                code = tl.load(codes_ptr + column, mask=mask, other=0).to(tl.float32)
                direction = _direction(m, g, beta1, one_minus_beta1, MOMENTUM_BITS)
                target = code - (code * shrink + _step_by(quanta, direction, MOMENTUM_BITS))
                absmax = tl.maximum(absmax, group_max(tl.abs(target), UNITS, GROUPS))
        for unit_tile in range(UNIT_TILES):
            start, exists, column, mask = tile_columns(
                group_tile * GROUPS, unit_tile * UNITS, COLUMNS, GROUP, UNIT, UNITS, GROUPS
            )
            m, g = _load_state(
                momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
                gradient_sign, start, exists, column, mask,
                MOMENTUM_BITS, MOMENTUM_GROUP, STATE_GROUP, COLUMNS, UNIT,
            )  # fmt: skip
            code = tl.load(codes_ptr + column, mask=mask, other=0).to(tl.float32)
            tl.debug_barrier()  # every thread has read this tile before any thread overwrites it
            direction = _direction(m, g, beta1, one_minus_beta1, MOMENTUM_BITS)
            if MOMENTUM_GROUP_IS_UNIT:
                m = m * beta2 + g * one_minus_beta2
                m_scale = _momentum_scale(tl.max(tl.abs(m), axis=1), MOMENTUM_BITS)
                _store_momentum(
                    momentum_codes_ptr, m, m_scale[:, None], start, exists, column, mask, row,
                    seed, step, stream, MOMENTUM_BITS, STOCHASTIC, COLUMNS, UNIT,
                )  # fmt: skip
                tl.store(momentum_scales_ptr + start // MOMENTUM_GROUP, m_scale, mask=exists)

            decrease = code * shrink + _step_by(quanta, direction, MOMENTUM_BITS)
            target = code - decrease
            if UNIT_TILES == 1:
                absmax = group_max(tl.abs(target), UNITS, GROUPS)
            fits = (absmax <= QMAX) & ((absmax >= RANGE_LOW) | (absmax == 0))
            rescaled_scale = tl.maximum(scale * (absmax * PER_TARGET), TINY)
            new_scale = tl.where(fits, scale, rescaled_scale)
            if STOCHASTIC:
                words = random_words(first_counter, start, UNIT, seed, step, stream)
                uniform = weight_uniform(words)
            else:
                uniform = tl.full(code.shape, 0.5, tl.float32)
            # On GPUs, floor treats subnormals as 0; only updates below 1e-38 quanta are subnormal.
            new_code = code + tl.floor(uniform - decrease)
            if tl.min(fits.to(tl.int32), axis=0) == 0:  # rare: most scales do not change
                ratio = over_units(tl.div_rn(scale, new_scale), UNITS, GROUPS)
                rescaled = tl.floor(target * ratio + uniform)
                keeps = over_units(fits.to(tl.int32), UNITS, GROUPS) != 0
                new_code = tl.where(keeps, new_code, rescaled)
            new_code = nearest_code(tl.minimum(tl.maximum(new_code, -QMAX), QMAX))
            tl.store(codes_ptr + column, new_code, mask=mask)
            if unit_tile == UNIT_TILES - 1:
                tl.store(scales_ptr + group, new_scale, mask=group < N_GROUPS)

    if MOMENTUM_BITS > 0 and not MOMENTUM_GROUP_IS_UNIT:
        tl.debug_barrier()
        _update_momentum(
            momentum_codes_ptr, momentum_scales_ptr, gradient_codes_ptr, gradient_scales_ptr,
            beta2, one_minus_beta2, gradient_sign, row, seed, step, stream,
            MOMENTUM_BITS, STOCHASTIC, STATE_GROUP, COLUMNS, MOMENTUM_GROUP, N_MOMENTUM_GROUPS,
            MOMENTUM_UNIT, MOMENTUM_UNITS, MOMENTUM_GROUPS, MOMENTUM_GROUP_TILES,
            MOMENTUM_UNIT_TILES,
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
    tiles = tiling(columns, group_size, momentum_group_size)
    state, momentum = tiling(columns, state_group_size), tiling(columns, momentum_group_size)
    one_group = momentum.N_GROUPS == 1 and columns <= tiles.UNIT
    return Constants(
        STOCHASTIC=stochastic,
        N_OUTLIERS=n_outliers,
        OUTLIER_TILE=outlier_tile(n_outliers),
        **tiles.constants(),
        STATE_GROUP=state.GROUP,
        N_STATE_GROUPS=state.N_GROUPS,
        STATE_UNIT=state.UNIT,
        STATE_UNITS=state.UNITS,
        STATE_GROUPS=state.GROUPS,
        STATE_GROUP_TILES=state.GROUP_TILES,
        STATE_UNIT_TILES=state.UNIT_TILES,
        MOMENTUM_BITS=momentum_bits,
        MOMENTUM_WIDTH=-(-columns // 2) if momentum_bits == 4 else columns,
        MOMENTUM_GROUP=momentum.GROUP,
        N_MOMENTUM_GROUPS=momentum.N_GROUPS,
        MOMENTUM_GROUP_IS_UNIT=momentum_bits > 0
        and (tiles.UNIT == momentum_group_size or one_group),
        MOMENTUM_UNIT=momentum.UNIT,
        MOMENTUM_UNITS=momentum.UNITS,
        MOMENTUM_GROUPS=momentum.GROUPS,
        MOMENTUM_GROUP_TILES=momentum.GROUP_TILES,
        MOMENTUM_UNIT_TILES=momentum.UNIT_TILES,
        num_warps=tiles.n_warps,
        enable_fp_fusion=False,
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
