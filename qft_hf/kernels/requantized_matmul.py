"""Product of two INT8 matrices that is quantized again, in groups: what a weight's gradient is."""

from typing import Any

import torch
from torch import Tensor

from ..layout import GroupLayout
from .checks import check_given_columns, check_group_size, check_row_scales
from .int8_matmul import MAX_SUMMED, check_operands, check_values, int8_matmul
from .operators import declare
from .quantize import quantize


def _fake(a: Tensor, b: Tensor, *_: Any, group_size: int, **__: Any) -> tuple[Tensor, Tensor]:
    rows, columns = a.shape[0], b.shape[1]
    n_groups = GroupLayout(rows, columns, group_size).n_groups
    return a.new_empty((rows, columns)), a.new_empty((rows, n_groups), dtype=torch.float32)


_requantized_matmul = declare(
    "requantized_matmul",
    "(Tensor a, Tensor b, Tensor? a_scales, *, Tensor? columns, Tensor? values, int group_size) "
    "-> (Tensor codes, Tensor scales)",
    fake=_fake,
    check_values=check_values,
)


def requantized_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    *,
    columns: Tensor | None = None,
    values: Tensor | None = None,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """`quantize(int8_matmul(a, b, a_scales, None, ...), group_size=group_size)`: the same bits.

    On a CPU the float product is never in memory.

    Args:
        a: int8 `[M, K]`, as `int8_matmul` takes it.
        b: int8 `[K, N]`, likewise.
        a_scales: fp32 `[M, 1]`, or None.
        columns: int64 `[k]`: columns that `values` gives, as in `int8_matmul`; or None.
        values: Float `[M, k]`, or None.
        group_size: Columns per scale of the result.

    Returns:
        codes: int8 `[M, N]` in [-127, 127].
        scales: fp32 `[M, n_groups]`, as `quantize` makes them.

    Raises:
        TypeError: Codes are not int8.
        ValueError: Shapes, strides or devices do not fit.
        IndexError: One of `columns` does not exist, on the CPU.
    """
    check_operands(a, b)
    check_group_size(group_size)
    if a_scales is not None:
        check_row_scales("a_scales", a_scales, a.shape[0], a.device)
    check_given_columns(columns, values, a.shape[0], a.device)
    if a.numel() and b.numel() and a.shape[1] <= MAX_SUMMED:
        codes, scales = _requantized_matmul(
            a, b, a_scales, columns=columns, values=values, group_size=group_size
        )
        return codes, scales
    product = int8_matmul(a, b, a_scales, None, columns=columns, values=values, dtype=torch.float32)
    return quantize(product, group_size=group_size)
