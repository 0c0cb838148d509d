"""Products of the experts of a layer, matrices below each other that each have their own tokens.

Shapes: S tokens, sorted by expert; E experts with R rows (outputs) and C columns (inputs) each.
An expert without tokens is not expanded, and its gradient is zero. As many experts are expanded to
float together as fit into a tile of a linear layer, at least one. INT8 products are computed as in
a linear layer, for one expert after the other.
"""

from itertools import chain, groupby, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.groups import TINY
from ..layout import STATE_GROUP_SIZE, matrices_of_a_tile, n_groups
from ..quant import QFTWeight, Tiles
from . import int8
from .functional import (
    gradients,
    max_tokens,
    multiplied,
    once_differentiable,
    product_dtype,
    save_weight,
    saved_weight,
)
from .products import FLOAT, Int8Products

# Grouped products on a GPU read 16 bytes at a time: with rows of other lengths, experts are
# multiplied one at a time.
ALIGNED_COLUMNS = 8


class Tile(NamedTuple):
    """A run of consecutive experts; those of them that got tokens are expanded together."""

    run: range  # numbers of the experts
    active: Tensor  # numbers of the experts that got tokens: int32 `[n]`
    tokens: slice | None  # their tokens, sorted by expert; None: all tokens of the layer
    # End of the tokens of each expert in `active`, relative to the first token of the run: int32
    # `[n]`.
    ends: Tensor
    all_ends: Tensor  # the same for every expert of the run, including those without tokens

    def of(self, x: Tensor) -> Tensor:
        """Return the rows of `x` that belong to the tokens of this tile."""
        return x if self.tokens is None else x[self.tokens]

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Multiply the rows of `x` `[S, K]` by the matrices `[n, K, M]` of the `active` experts."""
        x = self.of(x)
        return x @ matrices[0] if len(matrices) == 1 else F.grouped_mm(x, matrices, offs=self.ends)

    def gradients(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return grad[of e]^T x[of e] of all experts e of the run, one below the other."""
        grad, x = self.of(grad).t(), self.of(x)
        if self.all_ends.shape[0] == 1:
            return grad @ x
        return F.grouped_mm(grad, x, offs=self.all_ends).view(-1, x.shape[1])


class Groups:
    """The tokens of each expert; shared by the products of one layer.

    Args:
        ends: End of the tokens of each expert, in their order. A weight may have fewer experts if
            the last ones have no tokens.
        device: Device of the tokens.
    """

    def __init__(self, ends: list[int], device: torch.device) -> None:
        self.ends = [0, *ends]  # tokens of expert e: ends[e] to ends[e + 1]
        self.device = device
        self.active = [e for e, end in enumerate(ends) if self.ends[e] < end]
        self._tiles: dict[tuple[int, int], list[Tile]] = {}

    def tokens(self, expert: int) -> slice:
        """Return the tokens of an expert."""
        return slice(self.ends[expert], self.ends[expert + 1])

    def n_tokens(self, expert: int) -> int:
        """Return the number of tokens of an expert."""
        return self.ends[expert + 1] - self.ends[expert]

    def tiles(self, weight: QFTWeight) -> list[Tile]:
        """Return the tiles that cover all experts that got tokens."""
        rows, columns = weight.arrangement.rows, weight.arrangement.columns
        n_experts, at_most = weight.arrangement.n_matrices, 1
        if rows % ALIGNED_COLUMNS == columns % ALIGNED_COLUMNS == 0:
            at_most = min(matrices_of_a_tile(rows, columns), n_experts)
        key = at_most, n_experts
        if key not in self._tiles:
            self._tiles[key] = self._make(at_most, n_experts)
        return self._tiles[key]

    def _make(self, at_most: int, n_experts: int) -> list[Tile]:
        runs, lists = [], []
        for number, experts in groupby(self.active, lambda e: e // at_most):
            active, first = list(experts), number * at_most
            run = range(first, min(first + at_most, n_experts))
            runs.append(run)
            lists.append(active)
            lists += ([self.ends[e + 1] - self.ends[first] for e in of] for of in (active, run))
        # All tiles use one transfer, for which the host does not wait.
        pinned = self.device.type == "cuda"
        numbers = torch.tensor(
            list(chain(*lists)), dtype=torch.int32, device="cpu", pin_memory=pinned
        )
        numbers = numbers.to(self.device, non_blocking=True)
        on_device = iter(numbers.split([len(part) for part in lists]))
        tiles = []
        for run in runs:
            tokens = slice(self.ends[run.start], self.ends[run.stop])
            has_all = tokens == slice(0, self.ends[-1])
            active, ends, all_ends = islice(on_device, 3)
            tiles.append(Tile(run, active, None if has_all else tokens, ends, all_ends))
        return tiles


class _Grouped(torch.autograd.Function):
    """y[S, R] = x[S, C] W[e]^T, where e is the expert of the token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: QFTWeight, groups: Groups, dtype: torch.dtype
    ) -> Tensor:
        ctx.x_dtype = x.dtype
        if x.dtype != dtype:
            x = x.to(dtype)
        save_weight(ctx, weight)
        ctx.groups, ctx.tiles = groups, groups.tiles(weight)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        products = [
            tile.times(x, weight.dequantize_matrices(tile.active, dtype).mT) for tile in ctx.tiles
        ]
        return _joined(products, x, weight.arrangement.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight = saved_weight(ctx, uses_values=ctx.needs_input_grad[0])
        grad = grad.contiguous()
        grad_x = gradient = None
        if ctx.needs_input_grad[0]:
            products = [
                tile.times(grad, weight.dequantize_matrices(tile.active, grad.dtype))
                for tile in ctx.tiles
            ]
            grad_x = _joined(products, grad, weight.arrangement.columns).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            groups, tiles = ctx.groups, ctx.tiles
            gradient = weight.gradient(
                Tiles(lambda rows: _gradient(grad, x, weight, groups, tiles, rows))
            )
        return grad_x, gradient, None, None


def _joined(products: list[Tensor], like: Tensor, columns: int) -> Tensor:
    """Concatenate the products of all tokens; without any, return an empty matrix."""
    if len(products) == 1:
        return products[0]
    return torch.cat(products) if products else like.new_empty(0, columns)


def _gradient(
    grad: Tensor, x: Tensor, weight: QFTWeight, groups: Groups, tiles: list[Tile], rows: slice
) -> Tensor:
    """Return rows of grad_W[e] = grad[of e]^T x[of e]: whole experts, or a part of one."""
    n_rows, columns = weight.arrangement.rows, weight.arrangement.columns
    start, stop, _ = rows.indices(weight.codes.shape[0])
    first, last = start // n_rows, -(-stop // n_rows)
    if last - first == 1:
        tokens = groups.tokens(first)
        return grad[tokens, start - first * n_rows : stop - first * n_rows].t() @ x[tokens]
    result = None
    for tile in tiles:
        if not first <= tile.run.start < last:
            continue
        product = tile.gradients(grad, x)
        if len(product) == stop - start:
            return product
        if result is None:
            result = grad.new_zeros(stop - start, columns)
        place = tile.run.start * n_rows - start
        result[place : place + len(product)] = product
    return grad.new_zeros(stop - start, columns) if result is None else result


class _Int8Grouped(torch.autograd.Function):
    """y[S, R] = x[S, C] W[e]^T, one expert at a time.

    For each expert that got tokens, `products` says which products are INT8, and `operands` has its
    quantized tokens if an INT8 product needs them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: QFTWeight,
        groups: Groups,
        products: list[Int8Products],
        operands: list[kernels.Input | None],
        dtype: torch.dtype,
    ) -> Tensor:
        save_weight(ctx, weight)
        ctx.groups, ctx.products, ctx.x_dtype = groups, products, x.dtype
        ctx.n_kept = []
        keeps_codes = any(chosen.weight_gradient for chosen in products)
        outputs: list[Tensor] = []
        kept: list[Tensor] = []
        for expert, chosen, operand in zip(groups.active, products, operands, strict=True):
            y, of_expert = multiplied(
                x[groups.tokens(expert)], weight.one(expert), None, chosen, operand, dtype,
                needs_weight=ctx.needs_input_grad[1],
            )  # fmt: skip
            if keeps_codes and operand is None:  # otherwise these views would keep all of x
                of_expert = tuple(tensor.clone() for tensor in of_expert)
            outputs.append(y)
            kept += of_expert
            ctx.n_kept.append(len(of_expert))
        ctx.save_for_backward(*kept)
        return _joined(outputs, x, weight.arrangement.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        weight = saved_weight(ctx, uses_values=needs_x)
        kept = iter(ctx.saved_tensors)
        grads_x: list[Tensor] = []
        made: dict[int, Tiles] = {}
        for expert, chosen, n_kept in zip(ctx.groups.active, ctx.products, ctx.n_kept, strict=True):
            grad_x, tiles = gradients(
                grad[ctx.groups.tokens(expert)], tuple(islice(kept, n_kept)), weight.one(expert),
                chosen, needs_x=needs_x, needs_weight=needs_weight,
            )  # fmt: skip
            if grad_x is not None:
                grads_x.append(grad_x.to(ctx.x_dtype))
            if tiles is not None:
                made[expert] = tiles
        grad_x = _joined(grads_x, grad, weight.arrangement.columns) if needs_x else None
        gradient = weight.gradient(_below_each_other(made, weight)) if needs_weight else None
        return grad_x, gradient, None, None, None, None


def _operands(
    x: Tensor, weight: QFTWeight, groups: Groups, products: list[Int8Products]
) -> list[kernels.Input | None]:
    """Return the quantized tokens of each expert, with outlier columns chosen per expert."""
    n_outliers = weight.outlier_values.shape[1]
    recording = torch.is_grad_enabled()
    operands = []
    for expert, chosen in zip(groups.active, products, strict=True):
        wanted = chosen.forward or (chosen.weight_gradient and recording)
        tokens = x.detach()[groups.tokens(expert)]
        operands.append(int8.quantize(tokens, n_outliers=n_outliers) if wanted else None)
    return operands


def _below_each_other(tiles: dict[int, Tiles], weight: QFTWeight) -> Tiles:
    """Return the gradient of all experts from those of some; it is zero for the others."""
    n_rows, columns = weight.arrangement.rows, weight.arrangement.columns

    def parts(rows: slice) -> tuple[int, list[tuple[Tiles, slice, slice]]]:
        """Return the number of rows, and for each expert in `tiles`: its `Tiles`, the rows in its
        own matrix, and their place in the result.
        """
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
        codes = torch.zeros(n, columns, dtype=torch.int8, device=weight.device)
        scales = torch.full((n, n_groups(columns, STATE_GROUP_SIZE)), TINY, device=weight.device)
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
    """Multiply each token by the weight of its expert, whose gradient is an `Int8Gradient`.

    Args:
        x: Float `[S, C]`: the tokens of the first expert, then those of the second, and so on; of
            the weight's dtype, or of any under autocast.
        weight: `[E, R, C]`, or transposed `[E, C, R]`. For INT8 products the requirements of
            `functional.linear` apply to each expert; outlier columns may differ between experts.
        groups: The expert of each of the S tokens.
        products: Which products are INT8, for experts with at least `int8.min_tokens_of_expert`
            tokens; None: none.
        training: As in `functional.linear`.

    Returns:
        Float `[S, R]` of the dtype of `x`, or the autocast dtype.

    Raises:
        TypeError: The dtype of `x` is not the weight's, and autocast is off.
    """
    dtype = product_dtype(x, weight)
    if not training and not torch.is_grad_enabled():
        if 0 < len(x) <= max_tokens(dtype, x.device):
            return _few(x.to(dtype), weight, groups)
    output: Tensor
    rows, columns = weight.arrangement.rows, weight.arrangement.columns
    fewest = int8.min_tokens_of_expert(rows, columns, groups.device.type)
    if products is None or max(map(groups.n_tokens, groups.active), default=0) < fewest:
        output = _Grouped.apply(x, weight, groups, dtype)
        return output
    of_each = [products if groups.n_tokens(e) >= fewest else FLOAT for e in groups.active]
    operands = _operands(x, weight, groups, of_each)
    output = _Int8Grouped.apply(x, weight, groups, of_each, operands, dtype)
    return output


def _few(x: Tensor, weight: QFTWeight, groups: Groups) -> Tensor:
    """Return the products of few tokens, as in generation, without expanding a weight."""
    products = []
    for expert in groups.active:
        stored = weight.one(expert).stored
        products.append(kernels.dequantized_matmul(x[groups.tokens(expert)], stored, bias=None))
    return _joined(products, x, weight.arrangement.rows)
