"""`QFTLion`: Lion on INT8 weights, gradients and momentum, and on the float parameters as well."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import kernels
from ..config import check_choice
from ..layout import NIBBLE_GROUP_SIZE, STATE_GROUP_SIZE, momentum_shapes
from ..quant import QFTWeight, TiledGradient
from .base import QFTOptimizer
from .settings import check_betas
from .state import StateFormat, StateTensor

LION_BETAS = (0.9, 0.99)
MOMENTUM_BITS = (8, 4)


class QFTLion(QFTOptimizer):
    """Lion with decoupled weight decay; every state of a quantized weight is INT8.

    A `QFTWeight` keeps INT8 momentum (1.02 bytes per parameter) and is rounded stochastically. Any
    other parameter, fp32 or bf16, gets ordinary Lion with FP32 momentum.

    Args:
        params: Parameters or parameter groups.
        lr: Step size. Lion needs 1/3 to 1/10 of an AdamW rate.
        betas: Weight of the momentum in the direction, and decay rate of the momentum.
        weight_decay: Decoupled: each step shrinks weights by a fraction `lr * weight_decay`.
        momentum_bits: Bits per momentum value of a quantized weight: 8 or 4. 4 is experimental:
            uneven levels in groups of 64 columns, rounded stochastically (0.56 bytes per
            parameter). A small Llama learned 96 % of what it learned with FP32 momentum
            (`scripts/studies/momentum_bits.py`). For no momentum, use `QFTSGD`.
        **settings: Arguments of `QFTOptimizer`: gradient mode, clipping, rounding.

    Raises:
        ValueError: An argument is out of its range.

    Source:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675); Li et
        al. 2023, "QFT" (arXiv:2310.07147).
    """

    SETTINGS = (*QFTOptimizer.SETTINGS, "momentum_bits")

    takes_tiles = True
    reads_live = True

    @property
    def description(self) -> str:
        """The rule and how its state is stored, for a model card."""
        stored = "as INT8" if self.momentum_bits == 8 else f"in {self.momentum_bits} bits"
        return f"Lion (arXiv:2302.06675) with momentum {stored}"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = LION_BETAS,
        weight_decay: float = 0.0,
        *,
        momentum_bits: int = 8,
        **settings: Any,
    ) -> None:
        if momentum_bits == 0:
            raise ValueError(
                "momentum_bits=0 is not Lion but SGD: use QFTSGD, which is optim='qft_sgd' in "
                "TrainingArguments."
            )
        check_choice("momentum_bits", momentum_bits, MOMENTUM_BITS)
        self.momentum_bits = momentum_bits
        betas = tuple(betas) if isinstance(betas, list) else betas
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, **settings)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise if the rate, weight decay or betas are out of range."""
        super().check_group(group)
        check_betas(group["betas"], LION_BETAS)

    def state_format(self, parameter: Tensor) -> StateFormat:
        """Return INT8 or 4-bit momentum for a weight, FP32 momentum for a float parameter."""
        return _state_format(parameter, self.momentum_bits)

    def state_hint(self, parameter: Tensor, state: dict[str, Any]) -> str | None:
        """Return an error text if the state fits another `momentum_bits`, otherwise None."""
        if not isinstance(parameter, QFTWeight):
            return None  # its state does not depend on `momentum_bits`
        for bits in MOMENTUM_BITS:
            wanted = _state_format(parameter, bits)
            fits = wanted.keys() <= state.keys() and all(
                getattr(state[name], "dtype", None) == form.dtype for name, form in wanted.items()
            )
            if bits != self.momentum_bits and fits:
                return (
                    f"it was saved with momentum_bits={bits}, and this optimizer has "
                    f"momentum_bits={self.momentum_bits}. Continue with momentum_bits={bits}, or "
                    "start a new run from the weights of the checkpoint."
                )
        return None

    def step_weight(
        self,
        weight: kernels.Weight,
        gradient: kernels.Quantized,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: kernels.Rounding,
    ) -> None:
        """Update a weight and its momentum by one launch on a GPU."""
        kernels.lion_step_(
            weight,
            self._momentum(state),
            gradient,
            rule=_rule(group),
            rounding=rounding,
        )

    def step_tiles(
        self,
        weight: kernels.Weight,
        gradient: TiledGradient,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: kernels.Rounding,
        factor: Tensor | None,
    ) -> Tensor:
        """Quantize each tile and update its rows in the same launch."""
        momentum, rule = self._momentum(state), _rule(group)
        is_whole = len(gradient.rows) == 1
        squares = [
            kernels.quantize_and_lion_step_(
                weight if is_whole else weight.rows(rows),
                momentum if is_whole else momentum.rows(rows),
                gradient.tile_of(rows),
                factor=factor,
                group_size=STATE_GROUP_SIZE,
                rule=rule,
                rounding=rounding.of_rows(rows),
            )
            for rows in gradient.rows
        ]
        return squares[0] if is_whole else torch.cat(squares)

    def step_floats(
        self,
        parameters: list[Parameter],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
        roundings: kernels.Roundings,
    ) -> None:
        """Update float parameters by Lion with FP32 momentum, in one launch on a GPU."""
        kernels.lion_step_floats_(
            parameters,
            [state["momentum"] for state in states],
            gradients,
            rule=_rule(group),
            roundings=roundings,
        )

    def _momentum(self, state: dict[str, Tensor]) -> kernels.Quantized:
        group_size = NIBBLE_GROUP_SIZE if self.momentum_bits == 4 else STATE_GROUP_SIZE
        return self.quantized(state, "momentum", group_size, self.momentum_bits)


def _state_format(parameter: Tensor, bits: int) -> StateFormat:
    if not isinstance(parameter, QFTWeight):
        return {"momentum": StateTensor(torch.float32, tuple(parameter.shape))}
    rows, columns = parameter.arrangement.matrix_shape
    codes, scales = momentum_shapes(rows, columns, bits)
    return {
        "momentum_codes": StateTensor(kernels.values.CODE_DTYPES[bits], codes),
        "momentum_scales": StateTensor(torch.float32, scales, fill=1.0, is_signed=False),
    }


def _rule(group: dict[str, Any]) -> kernels.Lion:
    beta1, beta2 = group["betas"]
    return kernels.Lion(
        float(group["lr"]), beta1, beta2, float(group["weight_decay"]), group["maximize"]
    )
