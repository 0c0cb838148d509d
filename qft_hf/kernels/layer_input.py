"""A layer's input as an INT8 operand: one scale per token, and the largest columns in float."""

import torch
from torch import Tensor

from .checks import FLOATS, check_matrix
from .groups import empty_quantized, quantized
from .operators import operator

MAGNITUDE = 0x7FFFFFFF  # FP32 bits without the sign: as integers in the order of the magnitudes


def _fake(x: Tensor, *, n_outliers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    return (
        *empty_quantized(rows, columns, None, x.device),
        x.new_empty(n_outliers, dtype=torch.int64),
        x.new_empty((n_outliers, rows)).t(),
    )


@operator(fake=_fake)
def quantize_input(x: Tensor, *, n_outliers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize `x` to INT8 with one scale per token, except for its `n_outliers` largest columns.

    In language models a few columns are a hundred times larger than the others, and would set the
    scale of every token. They stay in float, and count as 0 for the scales and codes, even if they
    hold NaN.

    Args:
        x: `[N, C]`, contiguous; fp32, bf16 or fp16. Not modified.
        n_outliers: How many columns, in [0, C]: those with the largest magnitudes, and the first
            ones of equal magnitude. NaN counts as the largest.

    Returns:
        codes: int8 `[N, C]` in [-127, 127], 0 in the outlier columns.
        scales: fp32 `[N, 1]`; both as `quantize(..., group_size=None)` returns them.
        columns: int64 `[n_outliers]`, ascending.
        values: `[N, n_outliers]` of the dtype of `x`, stored column by column: `x[:, columns]`.

    Raises:
        TypeError: `x` is not one of the three float dtypes.
        ValueError: `x` is not a contiguous, non-empty matrix, or has fewer columns than
            `n_outliers`.

    Source:
        Dettmers et al. 2022, "LLM.int8()", section 3 (arXiv:2208.07339), which chooses columns by
        a threshold.
    """
    largest = (x.float().view(torch.int32) & MAGNITUDE).amax(dim=0)
    order = largest.sort(descending=True, stable=True).indices
    columns = order[:n_outliers].sort().values
    codes, scales = quantized(x.float().index_fill(1, columns, 0.0), None)
    return codes, scales, columns, take_columns(x, columns)


@quantize_input.checks
def _(x: Tensor, *, n_outliers: int) -> None:
    check_matrix("x", x, FLOATS)
    if not 0 <= n_outliers <= x.shape[1]:
        raise ValueError(
            f"n_outliers must be in [0, {x.shape[1]}], the columns of x, got {n_outliers}."
        )


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Return `x[:, columns]` stored column by column, which takes half the time on a CPU."""
    return x.t().index_select(0, columns).t()
