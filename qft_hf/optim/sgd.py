"""`QFTSGD`: stateless SGD on INT8 weights and gradients, which is LOMO's update."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .. import kernels
from ..layout import row_tiles
from .base import QFTOptimizer
from .state import StateFormat


class QFTSGD(QFTOptimizer):
    """`w <- w - lr * (g + weight_decay * w)`; weights are rounded stochastically.

    Use 10 to 1000 times Lion's learning rate, and clip gradients: steps are proportional to them.
    The optimizer learns as much as FP32 SGD, which in `scripts/studies/momentum_bits.py` was a
    sixth of what Lion learned.

    Args:
        params: Parameters or parameter groups.
        lr: Step size, in units of the weight per unit of gradient.
        weight_decay: Each step shrinks weights by a fraction `lr * weight_decay`.
        **settings: Arguments of `QFTOptimizer`.

    Raises:
        ValueError: An argument is out of its range.

    Source:
        Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited
        Resources" (LOMO), section 3 (arXiv:2306.09782), which trains float weights.
    """

    reads_live = True
    description = "SGD without state (LOMO, arXiv:2306.09782)"

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.0, **settings: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, **settings)

    def state_format(self, parameter: Tensor) -> StateFormat:
        """Return no tensors: SGD keeps no state."""
        return {}

    def step_weight(
        self,
        weight: kernels.Weight,
        gradient: kernels.Quantized,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: kernels.Rounding,
    ) -> None:
        """Move the weight against its gradient."""
        n_rows, columns = weight.codes.shape
        for rows in row_tiles(n_rows, columns):
            direction = kernels.dequantize(kernels.Weight.dense(gradient.rows(rows)))
            kernels.step_weight_(
                weight if rows.stop - rows.start == n_rows else weight.rows(rows),
                direction.neg_() if group["maximize"] else direction,
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                rounding=rounding.of_rows(rows),
            )
            del direction  # before the next one is expanded

    def step_floats(
        self,
        parameters: list[Parameter],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
        roundings: kernels.Roundings,
    ) -> None:
        """Move float parameters against their gradients."""
        kernels.step_floats_(
            parameters,
            [-gradient for gradient in gradients] if group["maximize"] else gradients,
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            roundings=roundings,
        )
