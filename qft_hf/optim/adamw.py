"""`QFTAdamW`: AdamW on INT8 weights and gradients and 8-bit moments."""

from collections.abc import Iterable
from math import inf, nan
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import kernels
from ..kernels.adamw import ROOT_TINY, exact_sqrt
from ..layout import STATE_GROUP_SIZE, n_groups
from ..quant import QFTWeight
from .base import QFTOptimizer
from .settings import check_betas
from .state import StateFormat, StateTensor

ADAMW_BETAS = (0.9, 0.999)


class QFTAdamW(QFTOptimizer):
    """AdamW with decoupled weight decay; both moments of a quantized weight have 8 bits.

    A `QFTWeight` keeps 2.03 bytes of moments per parameter, twice as many as with `QFTLion`, in the
    form of `kernels.adamw_step_`, and is rounded stochastically. Any other parameter, fp32 or bf16,
    gets ordinary AdamW with FP32 moments.

    Args:
        params: Parameters or parameter groups.
        lr: Step size, as for AdamW on float weights.
        betas: Decay rates of the mean of gradients and of the mean of their squares. The second
            must be above the square of the first.
        eps: Added to the square root of the mean of squares.
        weight_decay: Decoupled: each step shrinks weights by a fraction `lr * weight_decay`.
        **settings: Arguments of `QFTOptimizer`: gradient mode, clipping, rounding.

    Raises:
        ValueError: An argument is out of its range.

    Source:
        Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101).
    """

    reads_live = True
    description = "AdamW (arXiv:1711.05101) with both moments in 8 bits"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = ADAMW_BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> None:
        betas = tuple(betas) if isinstance(betas, list) else betas
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **settings)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise if the rate, weight decay, betas or eps are out of range."""
        super().check_group(group)
        check_betas(group["betas"], ADAMW_BETAS)
        beta1, beta2 = group["betas"]
        if beta1**2 >= beta2:
            raise ValueError(
                "The second of betas must be above the square of the first, got "
                f"{group['betas']}: otherwise steps grow without bound when gradients become zero. "
                f"The usual ones are {ADAMW_BETAS}."
            )
        eps = group["eps"]
        if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 < eps < inf:
            raise ValueError(
                f"eps must be positive and finite, got {eps}: the update of an element without "
                "gradients is divided by it. The usual value is 1e-8."
            )

    def state_format(self, parameter: Tensor) -> StateFormat:
        """Return 8-bit ratio and root for a weight, two FP32 moments for a float parameter."""
        if not isinstance(parameter, QFTWeight):
            shape = tuple(parameter.shape)
            return {
                "momentum": StateTensor(torch.float32, shape),
                "second_moment": StateTensor(torch.float32, shape, is_signed=False),
            }
        shape = rows, columns = parameter.arrangement.matrix_shape
        groups = (rows, n_groups(columns, STATE_GROUP_SIZE))
        return {
            "ratio_codes": StateTensor(torch.int8, shape),
            "ratio_scales": StateTensor(torch.float32, groups, fill=1.0, is_signed=False),
            "root_codes": StateTensor(torch.uint8, shape),
            "root_scales": StateTensor(torch.float32, groups, fill=ROOT_TINY, is_signed=False),
        }

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """Return rate, weight decay, step and Adam's bias corrections at that step."""
        return (*super().numbers(group, step), *_rule(group).corrections(step))

    def step_weight(
        self,
        weight: kernels.Weight,
        gradient: kernels.Quantized,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: kernels.Rounding,
    ) -> None:
        """Update a weight and its moments by one call of `kernels.adamw_step_`."""
        codes, scales = state["ratio_codes"], state["ratio_scales"]
        moments = self.kept(
            codes,
            lambda: kernels.Moments(
                codes, scales, state["root_codes"], state["root_scales"], STATE_GROUP_SIZE
            ),
        )
        kernels.adamw_step_(weight, moments, gradient, rule=_rule(group), rounding=rounding)

    def step_floats(
        self,
        parameters: list[Parameter],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
        roundings: kernels.Roundings,
    ) -> None:
        """Update float parameters by AdamW with FP32 moments."""
        rule = _rule(group)
        directions = [
            _float_direction(
                gradient.float(), state["momentum"], state["second_moment"], rule,
                rule.corrections(own.step) if own.live is None else own.live[3:5].float(),
            )
            for gradient, state, own in zip(gradients, states, roundings.of_each(), strict=True)
        ]  # fmt: skip
        kernels.step_floats_(
            parameters,
            directions,
            lr=rule.lr,
            weight_decay=rule.weight_decay,
            roundings=roundings,
        )


def _float_direction(
    gradient: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    rule: kernels.AdamW,
    corrections: tuple[float, float] | Tensor,
) -> Tensor:
    """Update FP32 moments and return the direction.

    Where the gradient or its square is not finite, moments stay and the direction is NaN.
    """
    if rule.maximize:
        gradient = -gradient
    m = (momentum * rule.beta1).add_(gradient * (1 - rule.beta1))
    v = (second_moment * rule.beta2).add_(gradient.square().mul_(1 - rule.beta2))
    is_finite = v.isfinite()
    momentum.copy_(torch.where(is_finite, m, momentum))
    second_moment.copy_(torch.where(is_finite, v, second_moment))
    of_m, of_root = corrections
    direction = (m * of_m).div_(exact_sqrt(v).mul_(of_root).add_(rule.eps))
    return direction.masked_fill_(~is_finite, nan)


def _rule(group: dict[str, Any]) -> kernels.AdamW:
    beta1, beta2 = group["betas"]
    return kernels.AdamW(
        float(group["lr"]),
        beta1,
        beta2,
        float(group["eps"]),
        float(group["weight_decay"]),
        group["maximize"],
    )
