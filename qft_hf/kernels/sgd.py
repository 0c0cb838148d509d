"""One SGD step on an INT8 weight and its INT8 gradient: LOMO's update, without state."""

from typing import Any

from torch import Tensor

from .checks import (
    check_column_values,
    check_finite,
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
    gradient_codes: Tensor,
    gradient_scales: Tensor,
    **_: Any,
) -> None:
    check_finite("weight scales", scales, positive=True)
    check_finite("gradient scales", gradient_scales)
    check_column_values(outlier_columns, codes)


_sgd_step_ = declare(
    "sgd_step_",
    "(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) outlier_values, Tensor outlier_columns, "
    "Tensor gradient_codes, Tensor gradient_scales, *, "
    "int? group_size, int state_group_size, float lr, float weight_decay, "
    "bool maximize, bool stochastic, int seed, int step, int stream) -> ()",
    fake=nothing,
    check_values=_check_values,
)


def sgd_step_(
    codes: Tensor,
    scales: Tensor,
    outlier_values: Tensor,
    outlier_columns: Tensor,
    gradient_codes: Tensor,
    gradient_scales: Tensor,
    *,
    group_size: int | None,
    state_group_size: int,
    lr: float,
    weight_decay: float,
    maximize: bool = False,
    stochastic: bool = True,
    seed: int,
    step: int,
    stream: int,
) -> None:
    """Update a weight in place: `w <- SR(w - lr * (g + weight_decay * w))`.

    SR, scales and critical values are those of `lion_step_`; g is the dequantized gradient.

    Args:
        codes: int8 `[rows, columns]`, modified.
        scales: fp32 `[rows, n_groups]`, positive, modified.
        outlier_values: fp32 `[rows, n_outliers]`, modified.
        outlier_columns: int16 or int32 `[rows, n_outliers]`.
        gradient_codes: int8 `[rows, columns]`.
        gradient_scales: fp32 `[rows, n_state_groups]`, finite.
        group_size: Columns per weight scale; None: whole rows.
        state_group_size: Columns per gradient scale.
        lr: Step size, in units of the weight for each unit of gradient.
        weight_decay: Weights shrink by `lr * weight_decay` a step.
        maximize: Step along the gradient, not against it.
        stochastic: False rounds weights to nearest, for ablation: that does not train.
        seed: Key of the random numbers, in [0, 2**63).
        step: Number of this step.
        stream: Number of this parameter.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes or devices do not fit; on the CPU also what `lion_step_` refuses of
            values. Nothing was written.

    Source:
        Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited
        Resources" (LOMO), section 3 (arXiv:2306.09782), on float weights there.
    """
    check_quantized("weight", codes, scales, group_size)
    check_quantized("gradient", gradient_codes, gradient_scales, state_group_size)
    check_same("gradient codes", gradient_codes, codes)
    check_outliers(outlier_values, outlier_columns, codes)
    _sgd_step_(
        codes,
        scales,
        outlier_values,
        outlier_columns,
        gradient_codes,
        gradient_scales,
        group_size=group_size,
        state_group_size=state_group_size,
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        stochastic=stochastic,
        seed=seed,
        step=step,
        stream=stream,
    )
