"""The three products of a linear layer on INT8 operands, for integer matrix units.

Shapes are as in `functional`. Every operand is quantized along the dimension that a product sums
over, with one scale for each of its rows or columns, so that scales can be taken out of the integer
sum: `x` per token, the gradient per token (with the scales of the weight folded in) and per output
(with the scales of `x` folded in). Outliers are whole columns of the weight and of `x`, about one
percent of each: codes are 0 there, and their contribution is a small float product.

In language models a few columns of `x` are a hundred times larger than the others and would set
the scale of every token. Without float columns for them, the gradients of SmolLM2 have a
signal-to-noise ratio of 7 dB.

Source: Dettmers et al. 2022, "LLM.int8()", section 3 (arXiv:2208.07339), for vector-wise scales and
float columns chosen by the activations. There a threshold chooses them, here their number is fixed.
"""

import threading
import weakref
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels import Input
from ..layout import STATE_GROUP_SIZE
from ..quant import ALL_ROWS, QFTWeight, Tiles


class Gradient(NamedTuple):
    """An output gradient `grad[N, R]`, quantized for one of its two INT8 products."""

    codes: Tensor  # int8 `[N, R]` for `grad_x`; `[R, N]` for `grad_W`
    scales: Tensor  # fp32, one per row of the codes
    # The columns of the result that are float products and not computed from codes: `[N, k]` of
    # `grad_x`, or `[R, k]` of `grad_W`, of the dtype of `grad`.
    outliers: Tensor

    def of(self, rows: slice) -> "Gradient":
        """Return some rows of the codes with their scales and outliers."""
        return self if rows is ALL_ROWS else Gradient(*(tensor[rows] for tensor in self))


# With fewer tokens the weight is dequantized. Integer matrix units process 16 or 32 rows at a time,
# and the time of a product this small is that of reading the weight, whichever units multiply.
MIN_TOKENS = 32

# On a GPU the float products of many experts are one launch. The INT8 products of one expert are a
# dozen launches per step, which keep the host busy for about 100 µs. Computed from the speeds of
# GPUs, INT8 products of 0.5 to 5 * 10**10 multiplications save that time (docs/int8-products.md).
MIN_EXPERT_MULTIPLICATIONS = 2**34


def min_tokens_of_expert(rows: int, columns: int, device_type: str) -> int:
    """Return the least number of tokens for INT8 products of an expert `[rows, columns]`."""
    if device_type == "cpu":
        return MIN_TOKENS
    return max(MIN_TOKENS, ceil(MIN_EXPERT_MULTIPLICATIONS / max(1, rows * columns)))


class _Slot:
    """The last input of a thread (a weak reference), its version, and its quantized form."""

    entry: tuple[weakref.ref[Tensor], int, Input] | None = None

    def forget(self, reference: weakref.ref[Tensor]) -> None:
        """Free the codes of an input that no longer exists."""
        if self.entry is not None and self.entry[0] is reference:
            self.entry = None


class _Slots(threading.local):
    """One slot per thread: with checkpointing, backward threads compute layers again."""

    def __init__(self) -> None:
        self.slot = _Slot()


_slots = _Slots()


def quantized_input(x: Tensor, *, n_outliers: int) -> Input:
    """Quantize `x[..., C]` per token, rounding to nearest; `n_outliers` columns stay float.

    Layers that read the same tensor, such as query, key and value, share one result: the last one
    is kept until its input is freed or changed, or another input is quantized.
    """
    # Inference tensors and tensors of a compiler have no version that shows a change. A compiler
    # removes repeated computations itself.
    if x.is_inference() or type(x) is not Tensor:
        return quantize(x, n_outliers=n_outliers)
    slot = _slots.slot
    entry = slot.entry
    if (
        entry is not None
        and entry[0]() is x
        and entry[1] == x._version
        and entry[2].columns.shape[0] == n_outliers
    ):
        return entry[2]
    result = quantize(x, n_outliers=n_outliers)
    slot.entry = (weakref.ref(x, slot.forget), x._version, result)
    return result


def quantize(x: Tensor, *, n_outliers: int) -> Input:
    """Quantize an input that no other layer reads; see `quantized_input`."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    return Input(*kernels.quantize_input(rows, n_outliers=n_outliers))


def forward(
    operand: Input, x: Tensor, weight: QFTWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return y[..., R] = x[..., C] W[R, C]^T + b[R] in `dtype`; `operand` is the quantized `x`."""
    floats = x.reshape(-1, x.shape[-1]).contiguous()
    y = kernels.int8_linear(operand, floats, weight.stored, bias=bias, dtype=dtype)
    # Not a view, because autograd refuses to change one in place: no other tensor uses this memory.
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))


def quantized_gradient(
    grad: Tensor, weight: QFTWeight, operand: Input | None, *, for_x: bool, seed: int
) -> tuple[Gradient | None, Gradient | None]:
    """Quantize a contiguous output gradient for the two products of a backward pass.

    All operations that read the float gradient run here, while it is in the cache.

    Args:
        grad: Float `[N, R]`.
        weight: `[R, C]`.
        operand: The quantized input if the weight gradient is an INT8 product, otherwise None.
        for_x: Whether the input gradient is one.
        seed: Key of the random numbers for rounding.

    Returns:
        The forms for `grad_x` and for `grad_W`; None for one that is not an INT8 product.
    """
    row_codes, row_scales, column_codes, column_scales = kernels.quantize_gradient(
        grad,
        weight.scales if for_x else None,
        None if operand is None else operand.scales,
        seed=seed,
    )
    of_x, of_weight = kernels.outlier_products(
        grad,
        weight.outlier_values if for_x else None,
        None if operand is None else operand.values,
    )
    return (
        Gradient(row_codes, row_scales, of_x) if for_x else None,
        None if operand is None else Gradient(column_codes, column_scales, of_weight),
    )


def input_gradient(grad: Gradient, weight: QFTWeight) -> Tensor:
    """Return grad_x[N, C] = grad[N, R] W[R, C]."""
    return kernels.int8_matmul(
        grad.codes,
        weight.codes,
        grad.scales,
        None,
        columns=weight.stored.shared_columns,
        values=grad.outliers,
        dtype=grad.outliers.dtype,
    )


def weight_gradient(grad: Gradient, operand: Input) -> Tiles:
    """Return grad_W[R, C] = grad[N, R]^T x[N, C], which is computed in tiles."""

    def tile(rows: slice) -> Tensor:
        codes, scales, outliers = grad.of(rows)
        return kernels.int8_matmul(
            codes,
            operand.codes,
            scales,
            None,
            columns=operand.columns,
            values=outliers,
            dtype=torch.float32,
        )

    def quantized_tile(rows: slice) -> tuple[Tensor, Tensor]:
        codes, scales, outliers = grad.of(rows)
        return kernels.requantized_matmul(
            codes,
            operand.codes,
            scales,
            columns=operand.columns,
            values=outliers,
            group_size=STATE_GROUP_SIZE,
        )

    return Tiles(tile, quantized_tile)
