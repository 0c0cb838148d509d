"""Quantization of a gradient and the Lion step with it: the specification, made of both."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .gradient import squared_norm
from .lion import lion_step_
from .quantize import quantize


def composed(
    quantize: Callable[..., tuple[Tensor, Tensor]],
    squared_norm: Callable[..., Tensor],
    lion_step_: Callable[..., None],
) -> Callable[..., Tensor]:
    """The operator, made of three others of a backend."""

    def quantize_and_lion_step_(
        *tensors: Tensor, state_group_size: int, factor: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """See `qft_hf.kernels.quantize_and_lion.quantize_and_lion_step_`."""
        *state, gradient = tensors
        codes, scales = quantize(gradient, state_group_size)
        norm = squared_norm(codes, scales, state_group_size)
        if factor is not None:
            scales *= factor
        finite = scales.isfinite().all(dim=1)
        kept = [] if bool(finite.all()) else [tensor[~finite] for tensor in state]
        if kept:  # rows that must stay as they are: they step with zeros and are put back
            scales[~finite] = 0.0
        lion_step_(*state, codes, scales, state_group_size=state_group_size, **arguments)
        for tensor, rows in zip(state, kept, strict=False):
            tensor[~finite] = rows
        return norm

    return quantize_and_lion_step_


quantize_and_lion_step_ = composed(quantize, squared_norm, lion_step_)
