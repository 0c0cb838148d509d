"""One Lion step on an INT8 weight, its INT8 momentum and its INT8 gradient."""

from typing import Any

from torch import Tensor

from .checks import (
    check_column_values,
    check_finite,
    check_momentum,
    check_outliers,
    check_quantized,
    check_same,
)
from .operators import declare, nothing


def _check_values(
    codes: Tensor,
    scales: Tensor,
    outlier_values: Tensor,
    outlier_columns: Tensor,
    momentum_codes: Tensor,
    momentum_scales: Tensor,
    gradient_codes: Tensor,
    gradient_scales: Tensor,
    **_: Any,
) -> None:
    check_finite("weight scales", scales, positive=True)
    check_finite("momentum scales", momentum_scales)
    check_finite("gradient scales", gradient_scales)
    check_column_values(outlier_columns, codes)


_lion_step_ = declare(
    "lion_step_",
    "(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) outlier_values, Tensor outlier_columns, "
    "Tensor(d!) momentum_codes, Tensor(e!) momentum_scales, "
    "Tensor gradient_codes, Tensor gradient_scales, *, "
    "int? group_size, int state_group_size, float lr, float beta1, float beta2, "
    "float weight_decay, bool maximize, bool stochastic, int seed, int step, int stream) -> ()",
    fake=nothing,
    check_values=_check_values,
)


def lion_step_(
    codes: Tensor,
    scales: Tensor,
    outlier_values: Tensor,
    outlier_columns: Tensor,
    momentum_codes: Tensor,
    momentum_scales: Tensor,
    gradient_codes: Tensor,
    gradient_scales: Tensor,
    *,
    group_size: int | None,
    state_group_size: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool = False,
    stochastic: bool = True,
    seed: int,
    step: int,
    stream: int,
) -> None:
    """Update weight and momentum in place; Lion with decoupled weight decay.

    With g, m, w the dequantized gradient, momentum and weight:

        c = beta1 * m + (1 - beta1) * g
        w <- SR(w - lr * (sign(c) + weight_decay * w))
        m <- Q(beta2 * m + (1 - beta2) * g)

    SR rounds stochastically against the stored scale: the expectation of the stored weight is the
    exact update. Scales are sticky: one changes only when a value no longer fits its codes, or when
    the whole group has shrunk to less than half their range; an element whose update is zero keeps
    its code otherwise. Critical values are FP32 and updated without rounding to codes; the codes
    under them stay 0.

    Q rounds an 8-bit momentum to nearest with a fresh absmax scale. A 4-bit momentum has a fresh
    absmax scale too, on levels that lie closer near zero, and is rounded stochastically between
    neighbouring ones: to nearest, most steps would be lost.

    Args:
        codes: int8 `[rows, columns]`, modified.
        scales: fp32 `[rows, n_groups]`, positive, modified.
        outlier_values: fp32 `[rows, n_outliers]`, modified.
        outlier_columns: int16 or int32 `[rows, n_outliers]`.
        momentum_codes: int8 `[rows, columns]`, or 4-bit codes as uint8 `[rows, ceil(columns / 2)]`,
            of columns 2k (low half) and 2k + 1 in byte k; modified.
        momentum_scales: fp32 `[rows, n_state_groups]`, or of 4-bit codes one per 64 columns:
            `[rows, ceil(columns / 64)]`; modified.
        gradient_codes: int8 `[rows, columns]`.
        gradient_scales: fp32 `[rows, n_state_groups]`, finite.
        group_size: Columns per weight scale; None: whole rows.
        state_group_size: Columns per gradient scale, and per scale of an 8-bit momentum.
        lr: Step size, in units of the weight.
        beta1: Weight of the momentum in the direction.
        beta2: Decay of the momentum.
        weight_decay: Decoupled decay: weights shrink by `lr * weight_decay` a step.
        maximize: Step along the gradient, not against it.
        stochastic: False rounds weights, and a 4-bit momentum, to nearest, for ablation: that
            does not train.
        seed: Key of the random numbers, in [0, 2**63).
        step: Number of this step; with `stream` and the element's position it counts the random
            numbers.
        stream: Number of this parameter.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes or devices do not fit. On the CPU also: a scale is not finite, a weight
            scale is not positive, or an outlier column does not exist. On a GPU each look at values
            would cost a transfer to the host, so there the caller has looked: the optimizer at the
            gradients, once a step, loading at weights and momentum. Nothing was written.

    Source:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2
        (arXiv:2302.06675); Li et al. 2023, "QFT", section 3 (arXiv:2310.07147), which rounds to
        nearest.
    """
    check_quantized("weight", codes, scales, group_size)
    check_quantized("gradient", gradient_codes, gradient_scales, state_group_size)
    check_momentum(momentum_codes, momentum_scales, codes, state_group_size)
    check_same("gradient codes", gradient_codes, codes)
    check_outliers(outlier_values, outlier_columns, codes)
    _lion_step_(
        codes,
        scales,
        outlier_values,
        outlier_columns,
        momentum_codes,
        momentum_scales,
        gradient_codes,
        gradient_scales,
        group_size=group_size,
        state_group_size=state_group_size,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        maximize=maximize,
        stochastic=stochastic,
        seed=seed,
        step=step,
        stream=stream,
    )
