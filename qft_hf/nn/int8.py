"""The three products of a linear layer on INT8 operands, for integer matrix units.

Shapes as in `dequantized`. Everything is quantized along what a product sums over, with one scale
for each of its rows or columns, so that scales leave the integer sum: `x` per token, the gradient
per token (with the scales of the weight folded in) and per output (with the scales of `x` folded
in). Critical values of the weight are whole columns; their share is a small float product.

Source: Dettmers et al. 2022, "LLM.int8()", section 3 (arXiv:2208.07339), for vector-wise scales
and float columns. There activations choose the columns at each call, here the weight does once.
"""

import threading
import weakref

import torch
from torch import Tensor

from .. import kernels
from ..quant import Int8Gradient, QFTWeight

# Codes [rows, columns] and scales [rows, 1].
Operand = tuple[Tensor, Tensor]

# With fewer tokens the weight is dequantized. Integer matrix units take 16 or 32 rows at a time,
# and reading the weight sets the time of a product this small, whatever multiplies.
MIN_TOKENS = 32


class _Slot:
    """The last input of a thread, held weakly, its version, and what it was quantized to."""

    entry: tuple[weakref.ref[Tensor], int, Operand] | None = None

    def forget(self, reference: weakref.ref[Tensor]) -> None:
        """Let the operand of a dead input go."""
        if self.entry is not None and self.entry[0] is reference:
            self.entry = None


class _Slots(threading.local):
    """A slot for each thread: backward threads compute layers again under checkpointing."""

    def __init__(self) -> None:
        self.slot = _Slot()


_slots = _Slots()


@torch.no_grad()
def quantized_input(x: Tensor) -> Operand:
    """INT8 codes of `x[..., C]` per token, rounded to nearest: `[N, C]`, `[N, 1]`.

    Layers that read the same tensor, such as query, key and value, share one result: the last is
    kept until its input dies, changes, or another input comes.
    """
    if x.is_inference():  # has no version that would tell of a change
        return _quantize(x)
    slot = _slots.slot
    entry = slot.entry
    if entry is not None and entry[0]() is x and entry[1] == x._version:
        return entry[2]
    operand = _quantize(x)
    slot.entry = (weakref.ref(x, slot.forget), x._version, operand)
    return operand


def _quantize(x: Tensor) -> Operand:
    codes, scales = kernels.quantize(
        x.detach().reshape(-1, x.shape[-1]).contiguous(), group_size=None
    )
    return codes, used_scales(codes, scales)


def used_scales(codes: Tensor, scales: Tensor) -> Tensor:
    """The scales of rows that have codes; 0 for rows of zeros.

    Those have a scale of 1 by convention, a thousand times that of others. Folded into a gradient
    it would set the scale of the whole row or column and leave nothing of the other elements.
    """
    # any() would say the same and is fifty times slower on CPUs.
    return scales * ((codes.amax(1, keepdim=True) > 0) | (codes.amin(1, keepdim=True) < 0))


def forward(
    operand: Operand, x: Tensor, weight: QFTWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y[..., R] = x[..., C] W[R, C]^T + b[R], of `dtype`; `operand` is the quantized `x`."""
    codes, scales = operand
    y = kernels.int8_matmul(codes, weight.codes.t(), scales, weight.scales, bias=bias, dtype=dtype)
    columns, values = critical_columns(weight)
    if len(columns):
        critical = x.reshape(-1, x.shape[-1]).index_select(1, columns)
        y.addmm_(critical.to(dtype), values.to(dtype).t())
    return y.view(*x.shape[:-1], weight.shape[0])


def input_gradient(rows: Operand, grad: Tensor, weight: QFTWeight) -> Tensor:
    """grad_x[N, C] = grad[N, R] W[R, C]; `rows` is `grad`, times the weight's scales, per token."""
    codes, scales = rows
    grad_x = kernels.int8_matmul(codes, weight.codes, scales, None, dtype=grad.dtype)
    columns, values = critical_columns(weight)
    if len(columns):  # whose codes are 0
        grad_x.index_copy_(1, columns, grad @ values.to(grad.dtype))
    return grad_x


def weight_gradient(
    columns: Operand, codes: Tensor, weight: QFTWeight, *, defer: bool
) -> Int8Gradient:
    """grad_W[R, C] = grad[N, R]^T x[N, C], from codes of `x`; `defer` as in `QFTWeight.gradient`.

    `columns` is `grad`, times the scales of `x`, per output and transposed: `[R, N]`.
    """
    column_codes, scales = columns

    def tile(rows: slice) -> Tensor:
        return kernels.int8_matmul(
            column_codes[rows], codes, scales[rows], None, dtype=torch.float32
        )

    return weight.gradient(tile, defer=defer)


def critical_columns(weight: QFTWeight) -> tuple[Tensor, Tensor]:
    """Indices `[k]` int64 and FP32 values `[R, k]` of the columns that the codes leave out."""
    return weight.outlier_columns[0].long(), weight.outlier_values
