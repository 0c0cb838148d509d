"""A float gradient quantized and used for a Lion step at once: what gradient release does."""

from typing import Any

import torch
from torch import Tensor

from .checks import (
    check_column_values,
    check_finite,
    check_matrix,
    check_momentum,
    check_outliers,
    check_quantized,
    check_same,
)
from .operators import declare
from .quantize import FLOATS


def _check_values(
    codes: Tensor,
    scales: Tensor,
    outlier_values: Tensor,
    outlier_columns: Tensor,
    momentum_codes: Tensor,
    momentum_scales: Tensor,
    gradient: Tensor,
    **_: Any,
) -> None:
    check_finite("weight scales", scales, positive=True)
    check_finite("momentum scales", momentum_scales)
    check_column_values(outlier_columns, codes)


_quantize_and_lion_step_ = declare(
    "quantize_and_lion_step_",
    "(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) outlier_values, Tensor outlier_columns, "
    "Tensor(d!) momentum_codes, Tensor(e!) momentum_scales, Tensor gradient, *, "
    "Tensor? factor, int? group_size, int state_group_size, float lr, float beta1, float beta2, "
    "float weight_decay, bool maximize, bool stochastic, int seed, int step, int stream, "
    "int first_row) -> Tensor",
    fake=lambda codes, *_, **__: codes.new_empty((), dtype=torch.float64),
    check_values=_check_values,
)


def quantize_and_lion_step_(
    codes: Tensor,
    scales: Tensor,
    outlier_values: Tensor,
    outlier_columns: Tensor,
    momentum_codes: Tensor,
    momentum_scales: Tensor,
    gradient: Tensor,
    *,
    factor: Tensor | None = None,
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
    first_row: int = 0,
) -> Tensor:
    """`quantize` the gradient, take its `squared_norm` and step by `lion_step_`: the same bits.

    All tensors may be the same run of rows of larger matrices, given by its first: a step of a
    weight in parts has the bits of a step of the whole.

    On a GPU that is one launch, and the codes of the gradient are never in memory. A row of the
    gradient with a NaN or infinity leaves its row of weight and momentum as it was and makes the
    norm not finite; other rows have taken the step by the time anyone can know.

    Args:
        codes: int8 `[rows, columns]`, modified.
        scales: fp32 `[rows, n_groups]`, positive, modified.
        outlier_values: fp32 `[rows, n_outliers]`, modified.
        outlier_columns: int16 or int32 `[rows, n_outliers]`.
        momentum_codes: As `lion_step_` takes them, of 8 or 4 bits; modified.
        momentum_scales: Likewise, modified.
        gradient: fp32, bf16 or fp16 `[rows, columns]`, contiguous.
        factor: fp32 scalar that the quantized gradient is multiplied by, as clipping does; or None.
        group_size: As in `lion_step_`, with all that follows.
        state_group_size: Columns per scale of the quantized gradient, and of an 8-bit momentum.
        lr: Step size.
        beta1: Weight of the momentum in the direction.
        beta2: Decay of the momentum.
        weight_decay: Decoupled decay.
        maximize: Step along the gradient.
        stochastic: False rounds weights to nearest.
        seed: Key of the random numbers.
        step: Number of this step.
        stream: Number of this parameter.
        first_row: Number of the first row, which random numbers are counted from.

    Returns:
        Sum of squares of the quantized gradient, without `factor`: fp64 scalar; NaN or infinite if
        a row was left.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: What `lion_step_` refuses of weight and momentum. Nothing was written.
    """
    check_quantized("weight", codes, scales, group_size)
    check_momentum(momentum_codes, momentum_scales, codes, state_group_size)
    check_matrix("gradient", gradient, FLOATS)
    check_same("gradient", gradient, codes)
    check_outliers(outlier_values, outlier_columns, codes)
    if factor is not None and (
        factor.dtype != torch.float32 or factor.numel() != 1 or factor.device != codes.device
    ):
        raise ValueError(
            f"factor must be one float32 number on {codes.device}, got {factor.dtype} of shape "
            f"{tuple(factor.shape)} on {factor.device}."
        )
    norm: Tensor = _quantize_and_lion_step_(
        codes,
        scales,
        outlier_values,
        outlier_columns,
        momentum_codes,
        momentum_scales,
        gradient,
        factor=factor,
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
        first_row=first_row,
    )
    return norm
