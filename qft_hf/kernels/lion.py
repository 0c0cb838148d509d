"""One Lion step on an INT8 weight and its INT8 momentum, with an INT8 or a float gradient."""

import torch
from torch import Tensor

from ..layout import NIBBLE_GROUP_SIZE, STATE_GROUP_SIZE, momentum_shapes
from .checks import (
    FLOATS,
    check_bits,
    check_finite,
    check_group_size,
    check_live,
    check_matrix,
    check_same,
)
from .gradients import squared_norms
from .groups import expanded, quantized
from .nibbles import load_nibbles, round_to_nibbles
from .operators import operator
from .philox import MOMENTUM
from .quantization import quantize
from .values import N_LIVE, Lion, Quantized, Rounding, Weight, read_live
from .weight import WRITES, check_weight_values, row_chunks, step_rows_

LION_WRITES = (*WRITES, "momentum.codes", "momentum.scales")


@operator(writes=LION_WRITES)
def lion_step_(
    weight: Weight,
    momentum: Quantized,
    gradient: Quantized,
    *,
    rule: Lion,
    rounding: Rounding,
) -> None:
    """Update weight and momentum in place; Lion with decoupled weight decay.

    With g, m, w the dequantized gradient, momentum and weight:

        c = beta1 * m + (1 - beta1) * g
        w <- SR(w - lr * (sign(c) + weight_decay * w))
        m <- Q(beta2 * m + (1 - beta2) * g)

    SR, scales and outliers are those of `step_weight_`. Q rounds an 8-bit momentum to nearest with
    a fresh absmax scale. A 4-bit momentum gets a fresh absmax scale too. Its levels are closer
    together near zero, and it is rounded stochastically to a neighboring one: with rounding to
    nearest most steps would be lost.

    Args:
        weight: `[rows, columns]`, modified.
        momentum: Momentum of the same matrix: 8-bit in the groups of the gradient, or 4-bit;
            modified.
        gradient: `[rows, columns]` of 8 bits, with finite scales.
        rule: The numbers of the step.
        rounding: The random numbers; without `stochastic` a 4-bit momentum is rounded to nearest
            too.

    Raises:
        TypeError: Codes of the gradient are not of 8 bits.
        ValueError: Shapes, groups or devices do not fit. On the CPU also: a scale is not finite, a
            weight scale is not positive, or an outlier column does not exist. Nothing was written.
            On a GPU reading values would cost a transfer to the host, so the callers check them:
            the optimizer checks the gradients once a step, loading checks weights and momentum.

    Source:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2
        (arXiv:2302.06675); Li et al. 2023, "QFT", section 3 (arXiv:2310.07147), which rounds to
        nearest.
    """
    rule, rounding = read_live(rule, rounding)
    columns = weight.codes.shape[1]
    for rows in row_chunks(weight.codes):
        g = expanded(gradient.codes[rows], gradient.scales[rows], gradient.group_size)
        if rule.maximize:
            g.neg_()
        stored = momentum.codes[rows], momentum.scales[rows]
        if momentum.bits == 4:
            m = load_nibbles(*stored, columns)
        else:
            m = expanded(*stored, momentum.group_size)
        direction = (m * rule.beta1).add_(g * (1 - rule.beta1)).sign_()
        m = m.mul_(rule.beta2).add_(g.mul_(1 - rule.beta2))
        if momentum.bits == 4:
            words = None
            if rounding.stochastic:
                words = rounding.words(rows, stored[0].shape[1], m.device, MOMENTUM)
            stored = round_to_nibbles(m, words)
        else:
            stored = quantized(m, momentum.group_size)
        momentum.codes[rows], momentum.scales[rows] = stored
        step_rows_(weight, direction, rows, rule.lr, rule.weight_decay, rounding)


def _check_momentum(weight: Weight, momentum: Quantized, group_size: int | None) -> None:
    """Raise unless `momentum` fits `weight` and gradients in groups of `group_size` columns."""
    codes = momentum.codes
    if momentum.bits == 8:
        check_same("momentum codes", codes, weight.codes)
        if momentum.group_size != group_size:
            raise ValueError(
                f"An 8-bit momentum must have the gradient's groups, got {momentum.group_size} "
                f"columns for groups of {group_size}."
            )
        return
    if group_size is None or group_size % NIBBLE_GROUP_SIZE:
        raise ValueError(
            f"With a 4-bit momentum, gradient groups must be multiples of its {NIBBLE_GROUP_SIZE} "
            f"columns, got {group_size}. The usual value is {STATE_GROUP_SIZE}."
        )
    rows, columns = weight.codes.shape
    wanted, _ = momentum_shapes(rows, columns, 4)
    if codes.shape != wanted or codes.device != weight.device:
        raise ValueError(
            f"A 4-bit momentum of a {tuple(weight.codes.shape)} weight must have codes of shape "
            f"{wanted} on {weight.device}, got {tuple(codes.shape)} on {codes.device}."
        )


@lion_step_.checks
def _(
    weight: Weight, momentum: Quantized, gradient: Quantized, *, rounding: Rounding, **_: object
) -> None:
    check_bits("gradient", gradient.bits)
    check_same("gradient codes", gradient.codes, weight.codes)
    _check_momentum(weight, momentum, gradient.group_size)
    check_live(rounding.live, (N_LIVE,), weight.device)


@lion_step_.checks_values
def _(weight: Weight, momentum: Quantized, gradient: Quantized, **_: object) -> None:
    check_weight_values(weight)
    check_finite("momentum scales", momentum.scales)
    check_finite("gradient scales", gradient.scales)


@operator(
    fake=lambda weight, *_, **__: weight.codes.new_empty(
        weight.codes.shape[0], dtype=torch.float64
    ),
    writes=LION_WRITES,
    composed=True,
)
def quantize_and_lion_step_(
    weight: Weight,
    momentum: Quantized,
    gradient: Tensor,
    *,
    factor: Tensor | None = None,
    group_size: int,
    rule: Lion,
    rounding: Rounding,
) -> Tensor:
    """Do `quantize`, `squared_norms` and `lion_step_` with a float gradient: the same bits.

    On a GPU this is one launch, and the codes of the gradient are never in memory. If a row of the
    gradient has a NaN or infinity, that row of weight and momentum stays as it was, and its norm is
    not finite. The other rows take the step, before the caller can see the norm.

    Args:
        weight: `[rows, columns]`, modified.
        momentum: As `lion_step_` takes it; modified.
        gradient: fp32, bf16 or fp16 `[rows, columns]`, contiguous.
        factor: fp32 scalar that the quantized gradient is multiplied by, for clipping; or None.
        group_size: Columns per scale of the quantized gradient.
        rule: The numbers of the step.
        rounding: The random numbers.

    Returns:
        fp64 `[rows]`, the sums of squares of the quantized gradient, without `factor`: NaN or
        infinite for rows that did not step.

    Raises:
        TypeError: The gradient is not one of the three float dtypes.
        ValueError: `lion_step_` would refuse the weight or the momentum. Nothing was written.
    """
    codes, scales = quantize(gradient, group_size=group_size)
    coded = Quantized(codes, scales, group_size)
    norms = squared_norms(coded)
    if factor is not None:
        scales *= factor
    finite = scales.isfinite().all(dim=1)
    state = (*weight.tensors, *momentum.tensors)
    kept = [] if bool(finite.all()) else [tensor[~finite] for tensor in state]
    if kept:  # these rows step with a gradient of zero and are then restored
        scales[~finite] = 0.0
    lion_step_(weight, momentum, coded, rule=rule, rounding=rounding)
    for tensor, rows in zip(state, kept, strict=False):
        tensor[~finite] = rows
    return norms


@quantize_and_lion_step_.checks
def _(
    weight: Weight,
    momentum: Quantized,
    gradient: Tensor,
    *,
    factor: Tensor | None,
    group_size: int,
    rounding: Rounding,
    **_: object,
) -> None:
    check_matrix("gradient", gradient, FLOATS)
    check_group_size(group_size)
    check_same("gradient", gradient, weight.codes)
    _check_momentum(weight, momentum, group_size)
    if factor is not None and (
        factor.dtype != torch.float32 or factor.numel() != 1 or factor.device != weight.device
    ):
        raise ValueError(
            f"factor must be one float32 number on {weight.device}, got {factor.dtype} of shape "
            f"{tuple(factor.shape)} on {factor.device}."
        )
    check_live(rounding.live, (N_LIVE,), weight.device)
