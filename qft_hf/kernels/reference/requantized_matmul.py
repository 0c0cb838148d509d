"""INT8 products that are quantized again: the specification, made of both."""

from collections.abc import Callable

import torch
from torch import Tensor

from .int8_matmul import int8_matmul
from .quantize import quantize


def composed(
    int8_matmul: Callable[..., Tensor], quantize: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator, made of two others of a backend."""

    def requantized_matmul(
        a: Tensor,
        b: Tensor,
        a_scales: Tensor | None,
        *,
        columns: Tensor | None,
        values: Tensor | None,
        group_size: int,
    ) -> tuple[Tensor, Tensor]:
        """See `qft_hf.kernels.requantized_matmul.requantized_matmul`."""
        product = int8_matmul(
            a, b, a_scales, None, bias=None, columns=columns, values=values, dtype=torch.float32
        )
        return quantize(product, group_size)

    return requantized_matmul


requantized_matmul = composed(int8_matmul, quantize)
