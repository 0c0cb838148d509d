"""Products of many matrices below each other, the experts of a layer, each with tokens of its own.

Shapes: S tokens in the order of their experts, E experts, R rows (outputs) and C columns (inputs)
of each. Of an expert without tokens nothing is expanded, and its gradient is zero. Experts are
expanded to float as many at a time as a tile of a linear layer has elements, and one at least.
INT8 products are those of a linear layer, of one expert after the other.
"""

from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.groups import TINY
from ..layout import STATE_GROUP_SIZE, GroupLayout, matrices_of_a_tile
from ..quant import QFTWeight, Tiles
from . import dequantized, int8
from .functional import gradients, multiplied, once_differentiable, product_dtype
from .products import FLOAT, Int8Products

# Grouped products on a GPU read 16 bytes at a time: rows of other lengths go one expert at a time.
ALIGNED_COLUMNS = 8


class Tile(NamedTuple):
    """Experts that got tokens, and are expanded together.

    Attributes:
        experts: Numbers of those that got tokens, ascending.
        tokens: Theirs, in the order of the experts.
        on_device: int32 `[n]`: `experts` too.
        ends: int32 `[n]`: where the tokens of each end, counted from the first of the tile.
    """

    experts: list[int]
    tokens: slice
    on_device: Tensor
    ends: Tensor


class Groups:
    """How many tokens each expert got; the products of one layer share it.

    Args:
        ends: Where the tokens of each expert end, in their order: one number an expert.
        device: Where the tokens are.
    """

    def __init__(self, ends: list[int], device: torch.device) -> None:
        self.ends = [0, *ends]  # of expert e: from ends[e] to ends[e + 1]
        self.device = device
        self.hit = [e for e, end in enumerate(ends) if self.ends[e] < end]
        self._tiles: dict[int, list[Tile]] = {}

    def tokens(self, expert: int) -> slice:
        """Those of an expert."""
        return slice(self.ends[expert], self.ends[expert + 1])

    def n_tokens(self, expert: int) -> int:
        """How many these are."""
        return self.ends[expert + 1] - self.ends[expert]

    def tiles(self, at_most: int) -> list[Tile]:
        """All experts that got tokens, in tiles with room for so many experts each."""
        if at_most not in self._tiles:
            self._tiles[at_most] = list(self._make(at_most))
        return self._tiles[at_most]

    def _make(self, at_most: int) -> Iterator[Tile]:
        of_tiles = [list(experts) for _, experts in groupby(self.hit, lambda e: e // at_most)]
        ends = [self.ends[e + 1] - self.ends[experts[0]] for experts in of_tiles for e in experts]
        # One transfer for all tiles, which the host does not wait for.
        pinned = self.device.type == "cuda"
        numbers = torch.tensor([self.hit, ends], dtype=torch.int32, pin_memory=pinned)
        numbers = numbers.to(self.device, non_blocking=True)
        done = 0
        for experts in of_tiles:
            on_device, ends_of_tile = numbers[:, done : done + len(experts)]
            done += len(experts)
            tokens = slice(self.ends[experts[0]], self.ends[experts[-1] + 1])
            yield Tile(experts, tokens, on_device, ends_of_tile)


def _at_a_time(weight: QFTWeight) -> int:
    """How many experts of a weight are expanded together."""
    rows, columns = weight.arrangement.rows, weight.arrangement.columns
    if rows % ALIGNED_COLUMNS or columns % ALIGNED_COLUMNS:
        return 1
    return matrices_of_a_tile(rows, columns)


class _Grouped(torch.autograd.Function):
    """y[S, R] = x[S, C] W[e]^T, with e the expert of the token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: QFTWeight, groups: Groups, dtype: torch.dtype
    ) -> Tensor:
        ctx.x_dtype = x.dtype
        if x.dtype != dtype:
            x = x.to(dtype)
        # The weight is no saved tensor: it is not copied, moved or offloaded with activations.
        ctx.weight, ctx.groups = weight, groups
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        products = [
            _times(x[tile.tokens], _expanded(weight, tile, dtype).mT, tile)
            for tile in groups.tiles(_at_a_time(weight))
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
                _times(grad[tile.tokens], _expanded(weight, tile, grad.dtype), tile)
                for tile in ctx.groups.tiles(_at_a_time(weight))
            ]
            grad_x = _joined(products, grad.new_empty(0, weight.arrangement.columns))
            grad_x = grad_x.to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            gradient = weight.gradient(lambda rows: _gradient(grad, x, weight, ctx.groups, rows))
        return grad_x, gradient, None, None


def _expanded(weight: QFTWeight, tile: Tile, dtype: torch.dtype) -> Tensor:
    return weight.dequantize_matrices(tile.experts, dtype, index=tile.on_device)


def _times(x: Tensor, matrices: Tensor, tile: Tile) -> Tensor:
    """Each run of rows of `x` `[S, K]` times its matrix of `[n, K, M]`."""
    return x @ matrices[0] if len(matrices) == 1 else F.grouped_mm(x, matrices, offs=tile.ends)


def _joined(products: list[Tensor], empty: Tensor) -> Tensor:
    if len(products) == 1:
        return products[0]
    return torch.cat(products) if products else empty


def _gradient(grad: Tensor, x: Tensor, weight: QFTWeight, groups: Groups, rows: slice) -> Tensor:
    """Rows of grad_W[e] = grad[of e]^T x[of e]: of whole experts, or of a part of one."""
    n_rows, columns = weight.arrangement.rows, weight.arrangement.columns
    start, stop, _ = rows.indices(weight.codes.shape[0])
    first, last = start // n_rows, -(-stop // n_rows)
    if last - first == 1:
        tokens = groups.tokens(first)
        return grad[tokens, start - first * n_rows : stop - first * n_rows].t() @ x[tokens]
    result = None
    for tile in groups.tiles(_at_a_time(weight)):
        if not first <= tile.experts[0] < last:
            continue
        of_tile, x_of_tile = grad[tile.tokens].t(), x[tile.tokens]
        if len(tile.experts) == 1:
            product = (of_tile @ x_of_tile)[None]
        else:
            product = F.grouped_mm(of_tile, x_of_tile, offs=tile.ends)
        if len(tile.experts) == last - first:
            return product.view(-1, columns)
        if result is None:
            result = grad.new_zeros(last - first, n_rows, columns)
        result.index_copy_(0, tile.on_device.long() - first, product)
    return grad.new_zeros(stop - start, columns) if result is None else result.view(-1, columns)


class _Int8Grouped(torch.autograd.Function):
    """The same, one expert at a time; products of those with many tokens are as `products` says.

    `operands` are the quantized tokens of the experts that got any, where a product needs them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: QFTWeight,
        groups: Groups,
        products: Int8Products,
        operands: list[kernels.Input | None],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.weight, ctx.groups, ctx.products, ctx.x_dtype = weight, groups, products, x.dtype
        ctx.n_kept = []
        outputs: list[Tensor] = []
        kept: list[Tensor] = []
        for expert, operand in zip(groups.hit, operands, strict=True):
            y, of_expert = multiplied(
                x[groups.tokens(expert)], weight.one(expert), None,
                _products(groups, expert, products), operand, dtype,
                needs_weight=ctx.needs_input_grad[1],
            )  # fmt: skip
            if products.weight_gradient and operand is None:  # else all of x would be kept by these
                of_expert = tuple(tensor.clone() for tensor in of_expert)
            outputs.append(y)
            kept += of_expert
            ctx.n_kept.append(len(of_expert))
        ctx.save_for_backward(*kept)
        return _joined(outputs, x.new_empty(0, weight.arrangement.rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight: QFTWeight = ctx.weight
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        kept = iter(ctx.saved_tensors)
        grads_x: list[Tensor] = []
        made: dict[int, Tiles] = {}
        for expert, n_kept in zip(ctx.groups.hit, ctx.n_kept, strict=True):
            grad_x, tiles = gradients(
                grad[ctx.groups.tokens(expert)], tuple(islice(kept, n_kept)), weight.one(expert),
                _products(ctx.groups, expert, ctx.products),
                needs_x=needs_x, needs_weight=needs_weight,
            )  # fmt: skip
            if grad_x is not None:
                grads_x.append(grad_x.to(ctx.x_dtype))
            if tiles is not None:
                made[expert] = tiles
        grad_x = (
            _joined(grads_x, grad.new_empty(0, weight.arrangement.columns)) if needs_x else None
        )
        gradient = weight.gradient(*_below_each_other(made, weight)) if needs_weight else None
        return grad_x, gradient, None, None, None, None


def _products(groups: Groups, expert: int, products: Int8Products) -> Int8Products:
    """Those of one expert: with few tokens none is INT8, as in `functional.linear`."""
    return products if groups.n_tokens(expert) >= int8.MIN_TOKENS else FLOAT


def _operands(
    x: Tensor, weight: QFTWeight, groups: Groups, products: Int8Products
) -> list[kernels.Input | None]:
    """The tokens of each expert as INT8 products take them, with outlier columns of their own."""
    n_outliers = weight.outlier_values.shape[1]
    recording = torch.is_grad_enabled()
    operands = []
    for expert in groups.hit:
        chosen = _products(groups, expert, products)
        wanted = chosen.forward or (chosen.weight_gradient and recording)
        tokens = x.detach()[groups.tokens(expert)]
        operands.append(int8.quantize(tokens, n_outliers=n_outliers) if wanted else None)
    return operands


def _below_each_other(tiles: dict[int, Tiles], weight: QFTWeight) -> Tiles:
    """The gradient of all experts, of those of some; it is zero for the others."""
    n_rows, columns = weight.arrangement.rows, weight.arrangement.columns

    def parts(rows: slice) -> tuple[int, list[tuple[Tiles, slice, slice]]]:
        """How many rows these are; what makes some, of which of its own, and where they belong."""
        start, stop, _ = rows.indices(weight.codes.shape[0])
        found = []
        for expert in range(start // n_rows, -(-stop // n_rows)):
            if expert in tiles:
                first = expert * n_rows
                own = slice(max(start - first, 0), min(stop - first, n_rows))
                place = slice(first + own.start - start, first + own.stop - start)
                found.append((tiles[expert], own, place))
        return stop - start, found

    def make(rows: slice) -> Tensor:
        n, found = parts(rows)
        if len(found) == 1 and found[0][2] == slice(0, n):
            return found[0][0].make(found[0][1])
        result = torch.zeros(n, columns, device=weight.device)
        for of_expert, own, place in found:
            result[place] = of_expert.make(own)
        return result

    def make_quantized(rows: slice) -> tuple[Tensor, Tensor]:
        n, found = parts(rows)
        n_groups = GroupLayout(n, columns, STATE_GROUP_SIZE).n_groups
        codes = torch.zeros(n, columns, dtype=torch.int8, device=weight.device)
        scales = torch.full((n, n_groups), TINY, device=weight.device)
        for of_expert, own, place in found:
            codes[place], scales[place] = of_expert.quantized(own)
        return codes, scales

    return Tiles(make, make_quantized)


def grouped_linear(
    x: Tensor,
    weight: QFTWeight,
    groups: Groups,
    *,
    products: Int8Products | None = None,
    training: bool = False,
) -> Tensor:
    """Each token times the weight of its expert; the weight's gradient is an `Int8Gradient`.

    Args:
        x: Float `[S, C]`: the tokens of the first expert, then those of the second, ...; of the
            weight's dtype, or under autocast.
        weight: `[E, R, C]`, or transposed `[E, C, R]`; for INT8 products as `functional.linear`
            wants it, each expert with outliers in columns of its own.
        groups: Which of the S tokens are whose.
        products: Which products are INT8, of experts with `int8.MIN_TOKENS` tokens or more.
        training: As in `functional.linear`.

    Returns:
        Float `[S, R]` of the dtype of `x`, or the autocast dtype.

    Raises:
        TypeError: The dtype of `x` is not the weight's, and autocast is off.
    """
    dtype = product_dtype(x, weight)
    if not training and not torch.is_grad_enabled():
        if 0 < len(x) <= dequantized.max_tokens(dtype, x.device):
            return _few(x.to(dtype), weight, groups)
    output: Tensor
    if products is None or max(map(groups.n_tokens, groups.hit), default=0) < int8.MIN_TOKENS:
        output = _Grouped.apply(x, weight, groups, dtype)
        return output
    operands = _operands(x, weight, groups, products)
    output = _Int8Grouped.apply(x, weight, groups, products, operands, dtype)
    return output


def _few(x: Tensor, weight: QFTWeight, groups: Groups) -> Tensor:
    """The products of few tokens, as in generation, without expanding a weight."""
    products = []
    for expert in groups.hit:
        stored = weight.one(expert).stored
        products.append(kernels.dequantized_matmul(x[groups.tokens(expert)], stored, bias=None))
    return _joined(products, x)
