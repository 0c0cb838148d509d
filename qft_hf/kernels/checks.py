"""Checks of the operators' arguments, made before anything is written."""

from math import isfinite

import torch
from torch import Tensor

from .philox import LANES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

MAX_ROWS = 2**31 - 1  # programs of one launch on a GPU
MAX_QUADS = 2**32  # counters of random numbers, one for each four columns of a row


def fits(rows: int, columns: int) -> bool:
    """Return whether an INT8 matrix can have this size."""
    return rows <= MAX_ROWS and rows * -(-columns // LANES) <= MAX_QUADS


def check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `tensor` is a contiguous, non-empty matrix of one of `dtypes`."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}.")
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise ValueError(
            f"{name} must be a non-empty [rows, columns] matrix, got shape {tuple(tensor.shape)}. "
            "Flatten leading dimensions with .view(-1, columns) first."
        )
    if not fits(*tensor.shape):
        raise ValueError(
            f"{name} must have at most {MAX_ROWS:,} rows and {MAX_QUADS:,} times four columns in "
            f"all, got shape {tuple(tensor.shape)}. Split the matrix into several row blocks."
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}. Call .contiguous() first."
        )


def check_group_size(group_size: int | None) -> None:
    """Raise unless a group has at least one column."""
    if group_size is not None and group_size < 1:
        raise ValueError(
            f"A group needs at least one column, got group_size={group_size}. None makes one group "
            "of each row."
        )


def check_scales(name: str, scales: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """Raise unless `scales` are FP32 `shape`: `[rows, n_groups]`, or `[rows, 1]` for whole rows."""
    if scales.dtype != torch.float32 or scales.shape != shape:
        raise ValueError(
            f"{name} must be float32 of shape {shape}, as quantize returns scales (one per row and "
            f"group, or with group_size=None one per row), got {scales.dtype} of shape "
            f"{tuple(scales.shape)}."
        )
    if not scales.is_contiguous() or scales.device != device:
        raise ValueError(
            f"{name} must be contiguous and on {device}, got strides {scales.stride()} on "
            f"{scales.device}."
        )


def check_bits(name: str, bits: int) -> None:
    """Raise unless the codes of a quantized matrix are of 8 bits."""
    if bits != 8:
        raise TypeError(
            f"{name} must have codes of 8 bits, got {bits}: only a momentum can have fewer."
        )


def check_codes(name: str, codes: Tensor) -> None:
    """Raise unless `codes` is an int8 matrix, or empty, contiguous along its rows or columns."""
    if codes.dtype != torch.int8:
        raise TypeError(f"{name} must be torch.int8, got {codes.dtype}. Quantize it first.")
    if codes.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix, got shape {tuple(codes.shape)}. Flatten leading dimensions "
            "with .view(-1, columns) first."
        )
    if 1 not in codes.stride() and codes.numel():
        raise ValueError(
            f"{name} must be contiguous along its rows or its columns, got strides "
            f"{codes.stride()} for shape {tuple(codes.shape)}. Call .contiguous() first."
        )


def check_bias(bias: Tensor | None, rows: int, device: torch.device) -> None:
    """Raise unless there is no bias, or one value for each of `rows` outputs."""
    if bias is not None and (bias.shape != (rows,) or bias.device != device):
        raise ValueError(
            f"bias must have shape {(rows,)} on {device}, got shape {tuple(bias.shape)} on "
            f"{bias.device}."
        )


def check_given_columns(
    columns: Tensor | None, values: Tensor | None, rows: int, device: torch.device
) -> None:
    """Raise unless `values` holds some `columns` of a matrix with `rows` rows, or both are None."""
    if columns is None or values is None:
        if columns is values:
            return
        raise ValueError(
            f"Pass columns and values, or neither, got only the "
            f"{'values' if columns is None else 'columns'}."
        )
    if columns.dtype != torch.int64 or columns.ndim != 1 or columns.device != device:
        raise ValueError(
            f"columns must be int64 of shape [k] on {device}, got {columns.dtype} of shape "
            f"{tuple(columns.shape)} on {columns.device}. Convert them with .to({device}).long()."
        )
    wanted = (rows, *columns.shape)
    if values.shape != wanted or not values.is_floating_point() or values.device != device:
        raise ValueError(
            f"values must be float of shape {wanted}, one column for each of columns, on {device}, "
            f"got {values.dtype} of shape {tuple(values.shape)} on {values.device}. Pass the "
            "contents of those columns for every row of the result."
        )


def check_given_column_values(columns: Tensor | None, end: int) -> None:
    """Raise unless each of `columns` is in [0, end). Reads values."""
    wrong = None if columns is None else _out_of_range(columns, end)
    if wrong is not None:
        raise IndexError(
            f"columns must be in [0, {end}), got {wrong}. Number the columns of the result, from 0."
        )


def _out_of_range(numbers: Tensor, end: int) -> int | None:
    """One of `numbers` that is not in [0, end), if there is one."""
    if numbers.numel() == 0:
        return None
    low, high = (int(value) for value in numbers.aminmax())
    if low < 0:
        return low
    return high if high >= end else None


def check_float_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise unless `dtype`, the result type of the operator `name`, is a float type."""
    if not dtype.is_floating_point:
        raise TypeError(f"{name} returns floats, got dtype={dtype}.")


def check_same(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless `tensor` has the shape and device of `like`."""
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)} on {like.device}, got shape "
            f"{tuple(tensor.shape)} on {tensor.device}."
        )


def check_live(live: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `live` is None or holds the numbers of a step on `device`.

    Args:
        live: fp64, beginning with `lr`, `weight_decay` and the number of the step; or None.
        shape: The shape that it must have.
        device: The device of the weight.
    """
    if live is not None and (
        live.dtype != torch.float64
        or live.shape != shape
        or not live.is_contiguous()
        or live.device != device
    ):
        raise ValueError(
            f"live must be float64 numbers of shape {shape} on {device}, beginning with lr, "
            f"weight_decay and step, got {live.dtype} of shape {tuple(live.shape)} on "
            f"{live.device}."
        )


def check_rows(rows: Tensor, codes: Tensor) -> None:
    """Raise unless `rows` is a list of row numbers on the device of `codes`."""
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"Row numbers must be int32 or int64, got {rows.dtype}.")
    if rows.ndim != 1 or not rows.is_contiguous() or rows.device != codes.device:
        raise ValueError(
            f"Row numbers must be contiguous, of shape [n], on {codes.device} like the codes, got "
            f"shape {tuple(rows.shape)}, strides {rows.stride()} on {rows.device}."
        )


def check_finite(name: str, tensor: Tensor, *, positive: bool = False) -> None:
    """Raise unless every value is finite, and above zero if `positive`. Reads values."""
    if tensor.numel() == 0:
        return
    low, high = (float(value) for value in tensor.aminmax())  # both NaN if any is
    if isfinite(low) and isfinite(high) and (low > 0 or not positive):
        return
    good = tensor.isfinite() & ((tensor > 0) | (not positive))
    raise ValueError(
        f"{name} must be finite{' and positive' if positive else ''}, got "
        f"{int((~good).sum())} of {tensor.numel()} that are not; the first is {tensor[~good][0]}. "
        "Nothing was written: drop the gradient, or reload the weights or the optimizer state, "
        "whichever has these values."
    )


def check_column_values(columns: Tensor, codes: Tensor) -> None:
    """Raise unless each of the outlier `columns` is a column of `codes`. Reads values."""
    wrong = _out_of_range(columns, codes.shape[1])
    if wrong is not None:
        raise ValueError(
            f"outlier columns must be in [0, {codes.shape[1]}), got {wrong}. "
            "Nothing was written: reload the weight."
        )


def check_row_values(rows: Tensor, n_rows: int) -> None:
    """Raise unless each of `rows` is in [0, n_rows). Reads values."""
    wrong = _out_of_range(rows, n_rows)
    if wrong is not None:
        raise IndexError(
            f"Row numbers must be in [0, {n_rows}), got {wrong}. If "
            "these are token ids, the tokenizer is not the model's, or they contain a mask value "
            "such as -100."
        )
