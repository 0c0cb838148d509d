"""Group-wise absmax INT8 quantization of a matrix, and back."""

import torch
from torch import Tensor

from .backend import backend_for
from .checks import check_matrix, check_quantized

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize(x: Tensor, *, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Quantize `x` to INT8 with one absmax scale per row and group of columns.

    Rounds to nearest, ties to even. `x` is not modified. A group with a NaN or infinity gets a
    scale that is not finite and codes 0, so that the fault stays visible.

    Args:
        x: `[rows, columns]`, contiguous; fp32, bf16 or fp16. Arithmetic is fp32.
        group_size: Columns per scale; the last group of a row may be short. None: whole rows.

    Returns:
        codes: int8 `[rows, columns]` in [-127, 127].
        scales: fp32 `[rows, n_groups]` in units of `x`: `x ~= codes * scale`, with error at most
            half a scale. 1 for a group of zeros.

    Raises:
        TypeError: `x` is not one of the three float dtypes.
        ValueError: `x` is not a contiguous, non-empty matrix.

    Source:
        Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.1
        (arXiv:2110.02861). Codes are linear here, dynamic there.
    """
    check_matrix("x", x, FLOATS)
    return backend_for(x.device).quantize(x, group_size)


def dequantize(codes: Tensor, scales: Tensor, *, group_size: int | None) -> Tensor:
    """Expand INT8 codes to `codes * scale`.

    Args:
        codes: int8 `[rows, columns]`, contiguous.
        scales: fp32 `[rows, n_groups]`.
        group_size: Columns per scale; None: whole rows.

    Returns:
        fp32 `[rows, columns]`.

    Raises:
        TypeError: `codes` is not int8.
        ValueError: Shapes do not fit each other or `group_size`.
    """
    check_quantized("x", codes, scales, group_size)
    return backend_for(codes.device).dequantize(codes, scales, group_size)
