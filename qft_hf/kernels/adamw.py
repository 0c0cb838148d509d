"""One AdamW step on an INT8 weight, 8-bit moments and an INT8 gradient.

Both moments are relative:

* **root**: the second moment v as its eighth root, on 256 evenly spaced levels
  `(code + 1/2) * scale`. The highest level of a group is 511 times the lowest, which for sqrt(v) is
  a factor of 511**4 = 7e10; neighboring values of sqrt(v) differ by 1.6 % at the top and by 17 % at
  1/13,000 of it. No code means 0, so the divisor of a step is never 0 and keeps its proportion.
* **ratio**: the first moment m as m / sqrt(v), on evenly spaced levels. The weight moves by this
  ratio, so the error is the same small part of a step even for elements whose gradients are a
  thousand times smaller than their neighbors'; a code of m itself would be 0 or 1 for them. The
  ratio is computed with v before rounding: if v is rounded down, the stored m shrinks with it, and
  no step is longer than the longest of exact AdamW,
  `(1 - beta1) / sqrt((1 - beta2) * (1 - beta1^2 / beta2))` times the learning rate.

Both are rounded stochastically. A step changes v by a thousandth, which is a thirtieth of a code:
with rounding to nearest, root codes would freeze, and a ratio would never decay below code 5 and
would move the weight of a dead input forever.

All arithmetic of v is in units of `1 / UNIT`, a power of two. In these units gradients from 1e-12
to 2e9 use all levels, and no bit depends on how a device treats subnormal numbers.
"""

import torch
from torch import Tensor

from .checks import check_finite, check_live, check_same
from .groups import (
    absmax_scale,
    expanded,
    group_absmax,
    inverse,
    rounded_up_or_down,
    scale_groups_,
    stochastic_codes,
)
from .operators import operator
from .values import N_LIVE, AdamW, Moments, Quantized, Rounding, Weight, read_live
from .weight import WRITES, check_weight_values, row_chunks, step_weight_

ROOT_QMAX = 255  # unsigned: a root has no sign
# The least root scale, used for v = 0. Its lowest code stands for v = 2**-96. A squared gradient
# that is subnormal, and 0 on some devices, is less than half of the last bit of that v.
ROOT_TINY = 2.0**-11
# Above every root scale: the largest is the fourth root of the largest gradient, over 255.5.
ROOT_LIMIT = 2.0**8
# The least ratio scale: its code 127 is a step of 1e-10 times the learning rate. With ROOT_TINY,
# it keeps every stored m a normal number.
RATIO_TINY = 2.0**-40
UNIT = 2.0**32
# Largest gradient scale, in units: gradients are clamped to 127 times it, 2e9, whose square fits
# FP32.
GRADIENT_SCALE_MAX = 2.0**56

MOMENTS = (
    "moments.ratio_codes",
    "moments.ratio_scales",
    "moments.root_codes",
    "moments.root_scales",
)


@operator(writes=(*WRITES, *MOMENTS))
def adamw_step_(
    weight: Weight,
    moments: Moments,
    gradient: Quantized,
    *,
    rule: AdamW,
    rounding: Rounding,
) -> None:
    """Update weight and moments in place; AdamW with decoupled weight decay.

    With g, r, s, w the stored gradient, ratio, sqrt(v) and weight, and t the number of the step:

        m = beta1 * (r * s) + (1 - beta1) * g
        s' = sqrt(beta2 * s^2 + (1 - beta2) * g^2)
        d = (m * c1) / (s' * c2 + eps)        c1 = 1 / (1 - beta1^t), c2 = 1 / sqrt(1 - beta2^t)
        s <- Q(s')
        r <- Q(m / s')
        w <- SR(w - lr * (d + weight_decay * w))

    SR, scales and outliers are those of `step_weight_`. The step uses the moments before they are
    rounded. Q rounds stochastically against a fresh absmax scale. One random word serves all three,
    as a second would double the cost: its high 24 bits round the weight, its low 24 the root, and
    its low 16 the ratio. Each is uniform to its last bit and independent of earlier steps, so each
    rounding is unbiased. The leading 8 bits of each are other bits of the word, and decide its
    rounding 255 times in 256; only otherwise do two roundings depend on each other.

    Args:
        weight: `[rows, columns]`, modified.
        moments: Moments of the same matrix, in the groups of the gradient; modified.
        gradient: `[rows, columns]` of 8 bits, with finite scales, which are clamped to 1.7e7.
        rule: The numbers of the step.
        rounding: The random numbers; its `step` counts from 1 and corrects the moments' start.
            Without `stochastic` the moments are rounded to nearest too. After the number of the
            step, its `live` has the corrections c1 and c2 of that step.

    Raises:
        ValueError: Shapes, groups or devices do not fit. On the CPU also: a scale is not finite, a
            weight scale is not positive, a root scale is larger than any gradient can make it, or
            an outlier column does not exist. Nothing was written.

    Source:
        Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101).
    """
    rule, rounding = read_live(rule, rounding)
    for rows in row_chunks(weight.codes):
        part = rounding.of_rows(rows)
        direction = _step_moments_(moments, gradient, rows, rule, part)
        step_weight_(
            weight.rows(rows), direction, lr=rule.lr, weight_decay=rule.weight_decay, rounding=part
        )


def _step_moments_(
    moments: Moments, gradient: Quantized, rows: slice, rule: AdamW, rounding: Rounding
) -> Tensor:
    """Update the moments of `rows` and return their direction; `rounding` is that of these rows."""
    ratio_codes, ratio_scales, root_codes, root_scales = moments.tensors
    group_size = moments.group_size
    unit_scales = (gradient.scales[rows] * UNIT).clamp_max_(GRADIENT_SCALE_MAX)
    g = expanded(gradient.codes[rows], unit_scales, group_size)
    if rule.maximize:
        g.neg_()
    root_v = stored_root(root_codes[rows], root_scales[rows], group_size)
    m = expanded(ratio_codes[rows], ratio_scales[rows], group_size).mul_(root_v)
    m = m.mul_(rule.beta1).add_(g * (1 - rule.beta1))
    v = root_v.square_().mul_(rule.beta2).add_(g.square_().mul_(1 - rule.beta2))
    root_v = exact_sqrt(v)

    of_m, of_root = rule.corrections(rounding.step)
    direction = (m * of_m).div_((root_v * of_root).add_(rule.eps * UNIT))

    root_uniform, ratio_uniform = _moment_uniforms(m, rounding)
    ratio_codes[rows], ratio_scales[rows] = _quantized_ratio(
        m.div_(root_v), ratio_uniform, group_size
    )
    root_codes[rows], root_scales[rows] = _quantized_root(root_v, root_uniform, group_size)
    return direction


def moment_numbers(rule: AdamW, step: int) -> tuple[float, ...]:
    """The numbers that kernels update moments with, each to be rounded to FP32 once.

    They are `beta1`, `1 - beta1`, `beta2`, `1 - beta2`, both corrections, `eps` in units, and the
    sign of the gradient.
    """
    betas = rule.beta1, 1 - rule.beta1, rule.beta2, 1 - rule.beta2
    sign = -1.0 if rule.maximize else 1.0
    return *betas, *rule.corrections(step), rule.eps * UNIT, sign


def exact_sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded FP32 square root, which `Tensor.sqrt` does not.

    On a CPU PyTorch uses MKL, a fifth of whose FP32 results are off by their last bit. Via FP64 all
    are right: the root of a 24-bit number is at least 4 units of FP64's last place from any
    midpoint of two 24-bit numbers, and MKL's FP64 root is off by one at most.
    """
    return x.double().sqrt_().float()


def stored_root(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """sqrt(v) in units, positive: fp32 `[rows, columns]`."""
    root = scale_groups_(codes.float().add_(0.5), scales, group_size)
    return root.square_().square_()


def _quantized_root(root_v: Tensor, uniform: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of the fourth root of sqrt(v)."""
    root = exact_sqrt(exact_sqrt(root_v))
    scales = (group_absmax(root, group_size) * (1.0 / (ROOT_QMAX + 0.5))).clamp_min_(ROOT_TINY)
    values = scale_groups_(root, inverse(scales), group_size).sub_(0.5)
    codes = rounded_up_or_down(values, uniform)
    # A value below the lowest level gets the lowest.
    return codes.clamp_(0, ROOT_QMAX).to(torch.uint8), scales


def _quantized_ratio(ratio: Tensor, uniform: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of m / sqrt(v), which is modified; 0 has code 0 for any random number."""
    scales = absmax_scale(group_absmax(ratio, group_size)).clamp_min_(RATIO_TINY)
    values = scale_groups_(ratio, inverse(scales), group_size)
    return stochastic_codes(values, uniform), scales


def _moment_uniforms(like: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Uniforms in [0, 1) that round root and ratio; all 0.5 to round to nearest."""
    if not rounding.stochastic:
        half = torch.full_like(like, 0.5)
        return half, half
    n_rows, columns = like.shape
    # `step_weight_` draws the same words again; a kernel draws them once.
    words = rounding.words(slice(0, n_rows), columns, like.device)
    return (words & 0xFFFFFF).float().mul_(2.0**-24), (words & 0xFFFF).float().mul_(2.0**-16)


@adamw_step_.checks
def _(
    weight: Weight, moments: Moments, gradient: Quantized, *, rounding: Rounding, **_: object
) -> None:
    check_live(rounding.live, (N_LIVE,), weight.device)
    check_same("gradient codes", gradient.codes, weight.codes)
    check_same("ratio codes", moments.ratio_codes, weight.codes)
    if moments.group_size != gradient.group_size:
        raise ValueError(
            f"AdamW's moments must have the gradient's groups, got {moments.group_size} columns "
            f"for groups of {gradient.group_size}."
        )


@adamw_step_.checks_values
def _(weight: Weight, moments: Moments, gradient: Quantized, **_: object) -> None:
    check_weight_values(weight)
    check_finite("ratio scales", moments.ratio_scales)
    check_finite("root scales", moments.root_scales)
    largest = float(moments.root_scales.abs().max())
    if largest > ROOT_LIMIT:
        raise ValueError(
            f"root scales must be at most {ROOT_LIMIT:g}, got {largest}. Nothing was written: "
            "reload the optimizer state."
        )
    check_finite("gradient scales", gradient.scales)
