"""The gradient of an embedding table, in INT8. The lookup itself is `dequantize` of some rows."""

import torch
from torch import Tensor

from .checks import FLOATS, check_bits, check_matrix, check_row_values, check_rows
from .groups import quantized
from .operators import operator
from .values import Quantized


@operator(writes=("table.codes", "table.scales"))
def embedding_gradient_(
    table: Quantized, ids: Tensor, gradient: Tensor, *, padding_idx: int | None = None
) -> None:
    """Sum the gradients of all tokens that looked up a row, and store the sum, quantized, there.

    Sums are FP32 and in the order of the tokens, so their bits are the same on every device and in
    every run. Backends make neither a float table nor a list of float sums. Rows that no token
    looked up are left as they are.

    Args:
        table: The table's gradient `[rows, columns]`, modified.
        ids: int32 or int64 `[n]`: the row that each token looked up.
        gradient: `[n, columns]`, contiguous; fp32, bf16 or fp16: the gradient of the rows returned.
        padding_idx: A row whose tokens are ignored, or None.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes or devices do not fit.
        IndexError: On the CPU only: one of `ids` is not a row. Nothing was written. On a GPU such
            tokens are ignored here, after the lookup has returned NaN for them.
    """
    codes, scales = table.tensors
    order, used, counts = tokens_by_row(ids, codes.shape[0], padding_idx)
    if not len(used):
        return
    first = counts.cumsum(0) - counts
    sums = torch.zeros(len(used), codes.shape[1], device=codes.device, dtype=torch.float32)
    for rank in range(int(counts.max())):  # the first token of each row, then the second, ...
        has = (counts > rank).nonzero().flatten()
        sums[has] += gradient[order[first[has] + rank]].float()
    codes[used], scales[used] = quantized(sums, table.group_size)


@embedding_gradient_.checks
def _(table: Quantized, ids: Tensor, gradient: Tensor, *, padding_idx: int | None) -> None:
    codes = table.codes
    check_bits("table", table.bits)
    check_rows(ids, codes)
    if gradient.dtype not in FLOATS or ids.numel():
        check_matrix("gradient", gradient, FLOATS)
    if gradient.shape != (len(ids), codes.shape[1]) or gradient.device != codes.device:
        raise ValueError(
            f"gradient must have shape {(len(ids), codes.shape[1])} on {codes.device}, a row for "
            f"each of the {len(ids)} ids, got shape {tuple(gradient.shape)} on {gradient.device}."
        )


@embedding_gradient_.checks_values
def _(table: Quantized, ids: Tensor, gradient: Tensor, *, padding_idx: int | None) -> None:
    check_row_values(ids, table.codes.shape[0])


def tokens_by_row(ids: Tensor, n_rows: int, padding_idx: int | None) -> tuple[Tensor, ...]:
    """Sort tokens by their row, and by their position within a row.

    Returns:
        order: int64: positions in `ids` of all tokens that are not ignored.
        used: The rows that they looked up, ascending.
        counts: int64: how many tokens looked up each of these rows; they are adjacent in `order`.
    """
    counted = (ids >= 0) & (ids < n_rows)
    if padding_idx is not None:
        counted &= ids != padding_idx
    order = ids.argsort(stable=True)
    order = order[counted[order]]
    used, counts = ids[order].unique_consecutive(return_counts=True)
    return order, used, counts
