"""The three products of a linear layer on INT8 operands, for integer matrix units.

Shapes as in `dequantized`. Everything is quantized along what a product sums over, with one scale
for each of its rows or columns, so that scales leave the integer sum: `x` per token, the gradient
per token (with the scales of the weight folded in) and per output (with the scales of `x` folded
in). Outliers are whole columns, of the weight and of `x`, about one percent of each: codes
are 0 there, and their share is a small float product.

A few columns of `x` are a hundred times larger than the others in language models, and would set
the scale of every token. Without float columns for them the gradients of SmolLM2 have 7 dB.

Source: Dettmers et al. 2022, "LLM.int8()", section 3 (arXiv:2208.07339), for vector-wise scales
and float columns chosen by the activations, there by a threshold and here by number.
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
    """An output gradient `grad[N, R]` as one of its two INT8 products takes it.

    Attributes:
        codes: int8 `[N, R]` for `grad_x`; `[R, N]` for `grad_W`.
        scales: fp32, one per row of the codes.
        outliers: What the codes leave out, the columns of the result that are float products:
            `[N, k]` of `grad_x`, or `[R, k]` of `grad_W`, of the dtype of `grad`.
    """

    codes: Tensor
    scales: Tensor
    outliers: Tensor

    def of(self, rows: slice) -> "Gradient":
        """Some rows of the codes, and what belongs to them."""
        return self if rows is ALL_ROWS else Gradient(*(tensor[rows] for tensor in self))


# With fewer tokens the weight is dequantized. Integer matrix units take 16 or 32 rows at a time,
# and reading the weight sets the time of a product this small, whatever multiplies.
MIN_TOKENS = 32

# On a GPU the float products of many experts are one launch, and the INT8 products of one expert a
# dozen launches in a step, which keep the host busy for about 100 µs. By arithmetic from the speeds
# of GPUs, products of 0.5 to 5 * 10**10 multiplications save as much (docs/int8-products.md).
MIN_EXPERT_MULTIPLICATIONS = 2**34


def min_tokens_of_expert(rows: int, columns: int, device_type: str) -> int:
    """How many tokens an expert `[rows, columns]` has to have for INT8 products."""
    if device_type == "cpu":
        return MIN_TOKENS
    return max(MIN_TOKENS, ceil(MIN_EXPERT_MULTIPLICATIONS / max(1, rows * columns)))


class _Slot:
    """The last input of a thread, held weakly, its version, and what it was quantized to."""

    entry: tuple[weakref.ref[Tensor], int, Input] | None = None

    def forget(self, reference: weakref.ref[Tensor]) -> None:
        """Let the codes of a dead input go."""
        if self.entry is not None and self.entry[0] is reference:
            self.entry = None


class _Slots(threading.local):
    """A slot for each thread: backward threads compute layers again under checkpointing."""

    def __init__(self) -> None:
        self.slot = _Slot()


_slots = _Slots()


def quantized_input(x: Tensor, *, n_outliers: int) -> Input:
    """`x[..., C]` per token, rounded to nearest, with `n_outliers` columns left in float.

    Layers that read the same tensor, such as query, key and value, share one result: the last is
    kept until its input dies, changes, or another input comes.
    """
    # Inference tensors have no version that would tell of a change, nor have those of a compiler,
    # which finds by itself what is computed twice.
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
    """`quantized_input` of an input that nothing else reads."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    return Input(*kernels.quantize_input(rows, n_outliers=n_outliers))


def forward(
    operand: Input, x: Tensor, weight: QFTWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y[..., R] = x[..., C] W[R, C]^T + b[R], of `dtype`; `operand` is the quantized `x`."""
    floats = x.reshape(-1, x.shape[-1]).contiguous()
    y = kernels.int8_linear(operand, floats, weight.stored, bias=bias, dtype=dtype)
    # No view, whose user could not change it in place: nobody else has this memory.
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))


def quantized_gradient(
    grad: Tensor, weight: QFTWeight, operand: Input | None, *, for_x: bool, seed: int
) -> tuple[Gradient | None, Gradient | None]:
    """A contiguous output gradient as the two products of a backward pass take it.

    All that reads the float gradient is done here, while it is in the cache.

    Args:
        grad: Float `[N, R]`.
        weight: `[R, C]`.
        operand: The quantized input where the weight's gradient is wanted, else None.
        for_x: Whether the input's gradient is.
        seed: Key of the random numbers that round.
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
    """grad_x[N, C] = grad[N, R] W[R, C]."""
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
    """grad_W[R, C] = grad[N, R]^T x[N, C]."""

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
