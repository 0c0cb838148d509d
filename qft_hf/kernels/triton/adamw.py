"""The AdamW step on 8-bit state in Triton. Twin: `kernels/adamw.py`.

A step is two launches: one updates the moments and stores the direction, and `step_weight_` moves
the weight along it. So groups of weight and moments need not share tiles. Both draw random words.
"""

import triton
import triton.language as tl

from ...layout import row_tiles
from .. import adamw as operators
from ..adamw import GRADIENT_SCALE_MAX as _GRADIENT_SCALE_MAX
from ..adamw import RATIO_TINY as _RATIO_TINY
from ..adamw import ROOT_QMAX as _ROOT_QMAX
from ..adamw import ROOT_TINY as _ROOT_TINY
from ..adamw import UNIT as _UNIT
from ..values import AdamW, Moments, Quantized, Rounding, Weight
from .launch import Launcher
from .numerics import PER_QMAX, QMAX, ULP16, ULP24, inverse_scale, rounding_words
from .tiling import group_max, over_units, row_constants, tile_columns, tiling
from .weight import step_weight_

GRADIENT_UNIT: tl.constexpr = tl.constexpr(_UNIT)
GRADIENT_SCALE_MAX: tl.constexpr = tl.constexpr(_GRADIENT_SCALE_MAX)
RATIO_TINY: tl.constexpr = tl.constexpr(_RATIO_TINY)
ROOT_QMAX: tl.constexpr = tl.constexpr(float(_ROOT_QMAX))
PER_ROOT_QMAX: tl.constexpr = tl.constexpr(1.0 / (_ROOT_QMAX + 0.5))
ROOT_TINY: tl.constexpr = tl.constexpr(_ROOT_TINY)


@triton.jit
def _rounded(values, uniform, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Integer codes; a value is rounded up if its fraction plus `uniform` is at least 1."""
    whole = tl.floor(values)
    up = tl.where((values - whole) + uniform >= 1.0, 1.0, 0.0)
    return tl.minimum(tl.maximum(whole + up, LOW), HIGH).to(tl.int32)


@triton.jit(do_not_specialize=["seed", "step", "stream", "first_row"])
def _moments_kernel(
    ratio_codes_ptr,  # [rows, COLUMNS] int8, modified
    ratio_scales_ptr,  # [rows, N_GROUPS] fp32, modified
    root_codes_ptr,  # [rows, COLUMNS] uint8, modified
    root_scales_ptr,  # [rows, N_GROUPS] fp32, modified
    gradient_codes_ptr,  # [rows, COLUMNS] int8
    gradient_scales_ptr,  # [rows, N_GROUPS] fp32
    direction_ptr,  # [rows, COLUMNS] fp32, written
    live_ptr,  # [N_LIVE] fp64: after two others the number of the step and two corrections, which
    # replace those below; or None
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    of_momentum,
    of_root,
    eps,  # in units of 1 / GRADIENT_UNIT, like all arithmetic on v
    gradient_sign,
    seed,
    step,
    stream,
    first_row,  # number of row 0 in the counter of random numbers
    STOCHASTIC: tl.constexpr,
    TILING: tl.constexpr,
):
    tl.static_assert(TILING.UNIT_TILES == 1, "a group of moments must fit in one tile")
    row = tl.program_id(0).to(tl.int64)
    ratio_codes_ptr += row * TILING.COLUMNS
    root_codes_ptr += row * TILING.COLUMNS
    gradient_codes_ptr += row * TILING.COLUMNS
    direction_ptr += row * TILING.COLUMNS
    ratio_scales_ptr += row * TILING.N_GROUPS
    root_scales_ptr += row * TILING.N_GROUPS
    gradient_scales_ptr += row * TILING.N_GROUPS
    if live_ptr is not None:
        step = tl.load(live_ptr + 2).to(tl.int64)
        of_momentum = tl.load(live_ptr + 3).to(tl.float32)
        of_root = tl.load(live_ptr + 4).to(tl.float32)
    first_counter = (row + first_row) * ((TILING.COLUMNS + 3) // 4)  # four columns share a counter
    for group_tile in range(TILING.GROUP_TILES):
        start, exists, column, mask = tile_columns(group_tile * TILING.GROUPS, 0, TILING)
        g_scale = tl.load(gradient_scales_ptr + start // TILING.GROUP, mask=exists, other=1.0)
        g_scale = tl.minimum(g_scale * GRADIENT_UNIT, GRADIENT_SCALE_MAX) * gradient_sign
        r_scale = tl.load(ratio_scales_ptr + start // TILING.GROUP, mask=exists, other=1.0)
        s_scale = tl.load(root_scales_ptr + start // TILING.GROUP, mask=exists, other=1.0)
        g = tl.load(gradient_codes_ptr + column, mask=mask, other=0).to(tl.float32)
        r = tl.load(ratio_codes_ptr + column, mask=mask, other=0).to(tl.float32)
        eighth = tl.load(root_codes_ptr + column, mask=mask, other=0).to(tl.float32)
        tl.debug_barrier()  # every thread has read this tile before any thread overwrites it

        g *= g_scale[:, None]
        eighth = (eighth + 0.5) * s_scale[:, None]
        fourth = eighth * eighth
        root_v = fourth * fourth
        m = (r * r_scale[:, None]) * root_v * beta1 + g * one_minus_beta1
        root_v = tl.sqrt_rn(root_v * root_v * beta2 + g * g * one_minus_beta2)
        direction = tl.div_rn(m * of_momentum, root_v * of_root + eps)
        tl.store(direction_ptr + column, direction, mask=mask)

        ratio = tl.div_rn(m, root_v)
        # The roots of padding are not 0 and must not count in the maximum of their group.
        root = tl.where(mask, tl.sqrt_rn(tl.sqrt_rn(root_v)), 0.0)
        new_r_scale = tl.maximum(group_max(tl.abs(ratio), TILING) * PER_QMAX, RATIO_TINY)
        new_s_scale = tl.maximum(group_max(root, TILING) * PER_ROOT_QMAX, ROOT_TINY)
        if STOCHASTIC:
            words = rounding_words(first_counter, start, TILING.UNIT, seed, step, stream)
            root_uniform = (words & 0xFFFFFF).to(tl.float32) * ULP24
            ratio_uniform = (words & 0xFFFF).to(tl.float32) * ULP16
        else:
            root_uniform = tl.full(root.shape, 0.5, tl.float32)
            ratio_uniform = root_uniform
        inverse = over_units(inverse_scale(new_r_scale), TILING)
        code = _rounded(ratio * inverse, ratio_uniform, -QMAX, QMAX)
        tl.store(ratio_codes_ptr + column, code.to(tl.int8), mask=mask)
        inverse = over_units(inverse_scale(new_s_scale), TILING)
        code = _rounded(root * inverse - 0.5, root_uniform, 0.0, ROOT_QMAX)
        tl.store(root_codes_ptr + column, code.to(tl.uint8), mask=mask)
        group = group_tile * TILING.GROUPS + tl.arange(0, TILING.GROUPS)
        tl.store(ratio_scales_ptr + group, new_r_scale, mask=group < TILING.N_GROUPS)
        tl.store(root_scales_ptr + group, new_s_scale, mask=group < TILING.N_GROUPS)


_launch_moments = Launcher(_moments_kernel)


@operators.adamw_step_.register("triton")
def adamw_step_(
    weight: Weight,
    moments: Moments,
    gradient: Quantized,
    *,
    rule: AdamW,
    rounding: Rounding,
) -> None:
    n_rows, columns = weight.codes.shape
    if tiling(columns, moments.group_size).UNIT_TILES > 1:  # no optimizer has such long groups
        operators.adamw_step_.reference(weight, moments, gradient, rule=rule, rounding=rounding)
        return
    constants = row_constants(columns, moments.group_size, STOCHASTIC=rounding.stochastic)
    numbers = operators.moment_numbers(rule, rounding.step)
    state = (*moments.tensors, *gradient.tensors)
    for rows in row_tiles(n_rows, columns):
        is_whole = rows.stop - rows.start == n_rows
        part = rounding.of_rows(rows)
        direction = weight.scales.new_empty(rows.stop - rows.start, columns)
        _launch_moments(
            (len(direction),), constants, *(tensor[rows] for tensor in state), direction, part.live,
            *numbers, part.seed, part.step, part.stream, part.first_row,
        )  # fmt: skip
        step_weight_(
            weight if is_whole else weight.rows(rows), direction,
            lr=rule.lr, weight_decay=rule.weight_decay, rounding=part,
        )  # fmt: skip
        del direction  # before the next one is allocated
