"""The gradient of an embedding table, in INT8. The lookup itself is `dequantize` of some rows."""

from torch import Tensor

from .checks import check_matrix, check_quantized, check_row_values, check_rows
from .operators import declare, nothing
from .quantize import FLOATS


def _check_values(codes: Tensor, scales: Tensor, ids: Tensor, *_: object, **__: object) -> None:
    check_row_values(ids, codes)


_embedding_gradient_ = declare(
    "embedding_gradient_",
    "(Tensor(a!) codes, Tensor(b!) scales, Tensor ids, Tensor gradient, *, int group_size, "
    "int? padding_idx) -> ()",
    fake=nothing,
    check_values=_check_values,
)


def embedding_gradient_(
    codes: Tensor,
    scales: Tensor,
    ids: Tensor,
    gradient: Tensor,
    *,
    group_size: int,
    padding_idx: int | None = None,
) -> None:
    """Sum the gradients of the tokens of each row and quantize the sums into that row.

    Sums are FP32 and in the order of the tokens, so their bits are the same on every device and in
    every run. Neither a float table nor a list of float sums is made. Rows that no token looked up
    are left as they are.

    Args:
        codes: int8 `[rows, columns]`, modified.
        scales: fp32 `[rows, n_groups]`, modified.
        ids: int32 or int64 `[n]`: the row that each token looked up.
        gradient: `[n, columns]`, contiguous; fp32, bf16 or fp16: of the rows handed out.
        group_size: Columns per scale.
        padding_idx: A row whose tokens count for nothing, or None.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes or devices do not fit.
        IndexError: One of `ids` is no row, on the CPU; on a GPU such tokens count for nothing,
            after a lookup that gave NaN for them. Nothing was written.
    """
    check_quantized("table gradient", codes, scales, group_size)
    check_rows(ids, codes)
    if gradient.dtype not in FLOATS or ids.numel():
        check_matrix("gradient", gradient, FLOATS)
    if gradient.shape != (len(ids), codes.shape[1]) or gradient.device != codes.device:
        raise ValueError(
            f"gradient must have shape {(len(ids), codes.shape[1])} on {codes.device}, a row for "
            f"each of the {len(ids)} ids, got shape {tuple(gradient.shape)} on {gradient.device}."
        )
    _embedding_gradient_(
        codes, scales, ids, gradient, group_size=group_size, padding_idx=padding_idx
    )
