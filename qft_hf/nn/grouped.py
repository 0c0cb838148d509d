"""Products of many matrices below each other, the experts of a layer, each with tokens of its own.

Shapes: S tokens in the order of their experts, E experts, R rows (outputs) and C columns (inputs)
of each. Of an expert without tokens nothing is expanded, and its gradient is zero. Experts are
expanded to float as many at a time as a tile of a linear layer has elements, and one at least.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..layout import matrices_of_a_tile
from ..quant import QFTWeight
from . import dequantized
from .functional import once_differentiable, product_dtype

# Grouped products on a GPU read 16 bytes at a time: rows of other lengths go one expert at a time.
ALIGNED_COLUMNS = 8


class Tile(NamedTuple):
    """Experts that got tokens, and are expanded together.

    Attributes:
        experts: Their numbers, ascending.
        tokens: Theirs, in the order of the experts.
        ends: int32 `[n]`: where the tokens of each end, counted from the first of the tile.
    """

    experts: Sequence[int]
    tokens: slice
    ends: Tensor


def tiles(weight: QFTWeight, counts: Sequence[int], first: int = 0) -> Iterator[Tile]:
    """Experts with tokens, so many at a time as one tile has room for.

    Args:
        weight: Of experts.
        counts: Tokens of each expert from the number `first` on.
        first: That number.
    """
    arrangement = weight.arrangement
    at_most = matrices_of_a_tile(arrangement.rows, arrangement.columns)
    if arrangement.rows % ALIGNED_COLUMNS or arrangement.columns % ALIGNED_COLUMNS:
        at_most = 1
    ends = list(accumulate(counts))
    hit = [number for number, count in enumerate(counts) if count]
    for place in range(0, len(hit), at_most):
        numbers = hit[place : place + at_most]
        start = ends[numbers[0]] - counts[numbers[0]]
        yield Tile(
            [first + number for number in numbers],
            slice(start, ends[numbers[-1]]),
            torch.tensor(
                [ends[number] - start for number in numbers],
                dtype=torch.int32,
                device=weight.device,
            ),
        )


class _Grouped(torch.autograd.Function):
    """y[S, R] = x[S, C] W[e]^T, with e the expert of the token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: QFTWeight, counts: list[int], dtype: torch.dtype
    ) -> Tensor:
        ctx.x_dtype = x.dtype
        if x.dtype != dtype:
            x = x.to(dtype)
        # The weight is no saved tensor: it is not copied, moved or offloaded with activations.
        ctx.weight, ctx.counts = weight, counts
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.tiles = list(tiles(weight, counts))
        products = [
            _times(x[tile.tokens], weight.dequantize_matrices(tile.experts, dtype).mT, tile)
            for tile in ctx.tiles
        ]
        return _joined(products, x.new_empty(0, weight.arrangement.rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight: QFTWeight = ctx.weight
        grad = grad.contiguous()
        grad_x = gradient = None
        if ctx.needs_input_grad[0]:
            products = [
                _times(
                    grad[tile.tokens], weight.dequantize_matrices(tile.experts, grad.dtype), tile
                )
                for tile in ctx.tiles
            ]
            grad_x = _joined(products, grad.new_empty(0, weight.arrangement.columns))
            grad_x = grad_x.to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            gradient = weight.gradient(lambda rows: _gradient(grad, x, weight, ctx.counts, rows))
        return grad_x, gradient, None, None


def _times(x: Tensor, matrices: Tensor, tile: Tile) -> Tensor:
    """Each run of rows of `x` `[S, K]` times its matrix of `[n, K, M]`."""
    return x @ matrices[0] if len(matrices) == 1 else F.grouped_mm(x, matrices, offs=tile.ends)


def _joined(products: list[Tensor], empty: Tensor) -> Tensor:
    if len(products) == 1:
        return products[0]
    return torch.cat(products) if products else empty


def _gradient(grad: Tensor, x: Tensor, weight: QFTWeight, counts: list[int], rows: slice) -> Tensor:
    """Rows of grad_W[e] = grad[of e]^T x[of e]: of whole experts, or of a part of one."""
    n_rows, columns = weight.arrangement.rows, weight.arrangement.columns
    start, stop, _ = rows.indices(weight.codes.shape[0])
    first, last = start // n_rows, -(-stop // n_rows)
    before = sum(counts[:first])
    total = before + sum(counts[first:last])
    grad, x = grad[before:total], x[before:total]
    if last - first == 1:
        return grad[:, start - first * n_rows : stop - first * n_rows].t() @ x
    result = None
    for tile in tiles(weight, counts[first:last], first):
        of_tile, x_of_tile = grad[tile.tokens].t(), x[tile.tokens]
        if len(tile.experts) == 1:
            product = (of_tile @ x_of_tile)[None]
        else:
            product = F.grouped_mm(of_tile, x_of_tile, offs=tile.ends)
        if len(tile.experts) == last - first:
            return product.view(-1, columns)
        if result is None:
            result = grad.new_zeros(last - first, n_rows, columns)
        result[[expert - first for expert in tile.experts]] = product
    return grad.new_zeros(stop - start, columns) if result is None else result.view(-1, columns)


def grouped_linear(
    x: Tensor, weight: QFTWeight, counts: list[int], *, training: bool = False
) -> Tensor:
    """Each token times the weight of its expert; the weight's gradient is an `Int8Gradient`.

    Args:
        x: Float `[S, C]`: the tokens of the first expert, then those of the second, ...; of the
            weight's dtype, or under autocast.
        weight: `[E, R, C]`, or transposed `[E, C, R]`.
        counts: Tokens of each of the E experts; they add up to S.
        training: As in `functional.linear`.

    Returns:
        Float `[S, R]` of the dtype of `x`, or the autocast dtype.

    Raises:
        TypeError: The dtype of `x` is not the weight's, and autocast is off.
    """
    dtype = product_dtype(x, weight)
    if not training and not torch.is_grad_enabled():
        if 0 < len(x) <= dequantized.max_tokens(dtype, x.device):
            return _few(x.to(dtype), weight, counts)
    output: Tensor = _Grouped.apply(x, weight, counts, dtype)
    return output


def _few(x: Tensor, weight: QFTWeight, counts: list[int]) -> Tensor:
    """The products of few tokens, as in generation, without expanding a weight."""
    products, end = [], 0
    for expert, count in enumerate(counts):
        if count:
            start, end = end, end + count
            stored = weight.stored.rows(weight.arrangement.part(expert))
            products.append(kernels.dequantized_matmul(x[start:end], stored, bias=None))
    return _joined(products, x)
