"""`Int8Gradient`: what `.grad` of a quantized weight holds between backward and step.

If a gradient is used as soon as it is complete, backward returns a `TiledGradient` instead, which
is computed in float, one tile of rows at a time, when it is used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .. import kernels
from ..kernels.groups import empty_quantized
from ..layout import STATE_GROUP_SIZE, n_groups
from .arrangement import Arrangement
from .reading import Readable, aten, read
from .tensor import Int8Tensor


class Int8Gradient(Int8Tensor):
    """A gradient as INT8 codes with an FP32 scale per 256 columns of a row.

    Autograd, gradient accumulation, hooks and `torch.nn.utils.clip_grad_norm_` use it like a float
    tensor. Addition rounds to nearest, and so does multiplication by factors that differ within a
    row. The norm is that of the stored values.

    Args:
        codes: int8 `[rows, columns]`.
        scales: fp32 `[rows, n_groups]`; NaN or infinite for a group with a NaN or infinite value.
        dtype: The outer float dtype, that of the weight.
        arrangement: That of the weight; None: the weight has the shape of `codes`.
    """

    FIELDS = ("codes", "scales")
    to_change = (
        "Multiplying in place by a number or a mask works, and clamping; for other changes return "
        "the new gradient from a hook, or assign it to .grad: it is quantized again."
    )

    stored: kernels.Quantized
    own_rows: slice | None = None  # the rows that it holds; None: all (`own_rows.py`)

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        *,
        dtype: torch.dtype,
        arrangement: Arrangement | None = None,
    ) -> None:
        self.stored = kernels.Quantized(codes, scales, STATE_GROUP_SIZE)
        self.arrangement = arrangement or Arrangement(tuple(codes.shape))

    @property
    def finite_probe(self) -> Tensor:
        """A tensor that is finite if and only if the gradient is."""
        return self.stored.scales

    def drop_nonfinite_(self) -> None:
        """Zero non-finite scales (their codes are 0), without testing whether there are any."""
        self.scales.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    @classmethod
    def from_float(
        cls, gradient: Tensor, *, dtype: torch.dtype, arrangement: Arrangement | None = None
    ) -> Self:
        """Quantize a float gradient of the shape of its weight, rounding to nearest."""
        if arrangement is not None:
            gradient = arrangement.matrix(gradient)
        codes, scales = kernels.quantize(gradient.contiguous(), group_size=STATE_GROUP_SIZE)
        return cls(codes, scales, dtype=dtype, arrangement=arrangement)

    @classmethod
    def zeros(cls, like: Tensor) -> Self:
        """Return a gradient of zeros for a matrix: with codes of 0 any finite scale is valid."""
        rows, columns = like.shape
        n, device = n_groups(columns, STATE_GROUP_SIZE), like.device
        return cls(
            torch.zeros(rows, columns, dtype=torch.int8, device=device),
            torch.ones(rows, n, dtype=torch.float32, device=device),
            dtype=like.dtype,
        )

    def set_rows_(self, rows: slice, gradient: Tensor) -> None:
        """Quantize a float gradient `[n, columns]` into `n` rows."""
        self.codes[rows], self.scales[rows] = kernels.quantize(
            gradient.contiguous(), group_size=STATE_GROUP_SIZE
        )

    def values(self) -> Tensor:
        """Return the values as a plain tensor of this shape and dtype."""
        values = kernels.dequantize(kernels.Weight.dense(self.stored), dtype=self.dtype)
        return self.arrangement.parameter(values)

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of all values: fp64 scalar."""
        return kernels.squared_norm(self.stored)

    def squared_norms(self) -> Tensor:
        """Return the sum of squares of each row of the stored matrix: fp64 `[rows]`."""
        return kernels.squared_norms(self.stored)


class Tiles(NamedTuple):
    """Functions that compute a gradient, one range of its rows at a time.

    Attributes:
        make: Computes the float gradient `[n, columns]` of a range of rows.
        make_quantized: Computes codes and scales of a range of rows without a float gradient, with
            the bits of `kernels.quantize` of the result of `make`; None: they are computed that
            way.
    """

    make: Callable[[slice], Tensor]
    make_quantized: Callable[[slice], tuple[Tensor, Tensor]] | None = None

    def quantized(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the codes and scales of a range of rows."""
        if self.make_quantized is not None:
            return self.make_quantized(rows)
        return kernels.quantize(self.make(rows).contiguous(), group_size=STATE_GROUP_SIZE)


class TiledGradient(Readable):
    """A deferred gradient, computed in float, one tile of rows at a time, when it is used.

    Autograd may pass it on or add it to another gradient. An addition, and a call of `quantized`,
    compute it at once. Other operators read the values of its INT8 form.

    Args:
        tiles: Computes the tiles. The input and output gradient of the layer, which it refers to,
            stay alive as long as it does.
        rows: Ranges of rows that cover the gradient in order.
        arrangement: That of the weight; `rows` and tiles refer to the stored matrix.
        dtype: The outer float dtype, that of the weight.
        device: Device of the tiles.
    """

    to_change = "To change the gradient, assign a new one to .grad: it is quantized again."
    own_rows: slice | None = None  # the rows that it holds; None: all (`own_rows.py`)

    @staticmethod
    def __new__(
        cls, *_: Any, arrangement: Arrangement, dtype: torch.dtype, device: torch.device, **__: Any
    ) -> Self:
        """Make the outer tensor, without storage."""
        return Tensor._make_wrapper_subclass(cls, arrangement.shape, dtype=dtype, device=device)

    def __init__(
        self, tiles: Tiles, rows: list[slice], *, arrangement: Arrangement, **_: Any
    ) -> None:
        self.tile_source = tiles
        self.rows = rows
        self.arrangement = arrangement

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return the shape without the values, which would have to be computed."""
        return f"TiledGradient(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def tile_of(self, rows: slice) -> Tensor:
        """Return the float gradient of one of the ranges, contiguous."""
        return self.tile_source.make(rows).contiguous()

    def values(self) -> Tensor:
        """Return the values of its INT8 form, as a plain tensor of the outer dtype."""
        return self.quantized().values()

    def quantized(self) -> Int8Gradient:
        """Return the whole gradient in INT8; each tile is quantized as soon as it exists."""
        if len(self.rows) == 1:
            codes, scales = self.tile_source.quantized(self.rows[0])
        else:
            shape = self.arrangement.matrix_shape
            codes, scales = empty_quantized(*shape, STATE_GROUP_SIZE, self.device)
            for rows in self.rows:
                codes[rows], scales[rows] = self.tile_source.quantized(rows)
        return Int8Gradient(codes, scales, dtype=self.dtype, arrangement=self.arrangement)


@Int8Gradient.implements(aten.detach.default, aten.alias.default)
@TiledGradient.implements(aten.detach.default, aten.clone.default, aten.alias.default)
@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would meet an unfinished alias
def _alias(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Autograd calls this for every gradient that it puts into `.grad`. The contents are shared
    # as they are: they have been checked and need no detaching.
    gradient = args[0]
    alias: Any = Tensor._make_wrapper_subclass(
        type(gradient), gradient.shape, dtype=gradient.dtype, device=gradient.device
    )
    alias.__dict__.update(gradient.__dict__)
    return alias


def quantized(gradient: Tensor, like: Any) -> Int8Gradient:
    """Return a gradient of a quantized weight in INT8; an `Int8Gradient` is returned unchanged.

    Args:
        gradient: An `Int8Gradient`, a `TiledGradient`, or a float tensor in the shape of the
            weight, from code that does not know about INT8.
        like: The weight, or a gradient of it.
    """
    if isinstance(gradient, Int8Gradient):
        return gradient
    if isinstance(gradient, TiledGradient):
        return gradient.quantized()
    return Int8Gradient.from_float(
        gradient.to_dense(), dtype=like.dtype, arrangement=like.arrangement
    )


@Int8Gradient.implements(aten.add_.Tensor)
def _add_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient, other = args
    if not isinstance(gradient, Int8Gradient):  # float, and stays so until its weight is updated
        return read(operator, args, kwargs)
    added = tuple(other.shape) if isinstance(other, Tensor) else other
    if gradient.shape != added or kwargs.get("alpha", 1) != 1:
        raise NotImplementedError(
            f"In-place addition to an INT8 gradient of shape {tuple(gradient.shape)} needs a "
            f"tensor of the same shape and alpha=1, got {added} and {kwargs}. In a "
            "hook, return gradient + other instead."
        )
    kernels.accumulate_(gradient.stored, quantized(other, gradient).stored)
    return gradient


@Int8Gradient.implements(aten.add.Tensor)
@TiledGradient.implements(aten.add.Tensor)
def _add(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    one, other = args
    if not isinstance(other, Tensor) or one.shape != other.shape or kwargs.get("alpha", 1) != 1:
        return read(operator, args, kwargs)
    like = one if isinstance(one, Int8Gradient | TiledGradient) else other
    total = quantized(one, like)
    if total is one:
        total = total.clone()
    kernels.accumulate_(total.stored, quantized(other, like).stored)
    return total


IN_PLACE = {
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Tensor: aten.div_.Tensor,
    aten.div.Scalar: aten.div_.Scalar,
}


@Int8Gradient.implements(*IN_PLACE.values())
def _scale_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Gradient:
    gradient, factor = args
    if not isinstance(gradient, Int8Gradient):
        return read(operator, args, kwargs)
    if isinstance(factor, Tensor) and factor.numel() > 1 and not gradient.arrangement.is_plain:
        factor = gradient.arrangement.matrix(factor.expand(gradient.shape))
    is_per_row = (
        not isinstance(factor, Tensor)
        or factor.numel() == 1
        or (factor.ndim == 2 and tuple(factor.shape) == (gradient.codes.shape[0], 1))
    )
    if is_per_row:
        operator(gradient.scales, factor)
    else:  # for example by a hook that masks elements
        _change_(gradient, lambda values: operator(values, factor))
    return gradient


@Int8Gradient.implements(aten.clamp_.default)
def _clamp_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Gradient:
    gradient, *limits = args
    _change_(gradient, lambda values: operator(values, *limits, **kwargs))
    return gradient


# Clipping with foreach=True starts one operation for a list of gradients.
FOR_EACH: dict[Any, Callable[[Tensor, Any], Tensor]] = {
    aten._foreach_mul_.Tensor: lambda gradient, factor: gradient.mul_(factor),
    aten._foreach_clamp_min_.Scalar: lambda gradient, least: gradient.clamp_(min=least),
    aten._foreach_clamp_max_.Scalar: lambda gradient, most: gradient.clamp_(max=most),
}


@Int8Gradient.implements(*FOR_EACH)
def _change_each_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    gradients, number = args
    for gradient in gradients:
        FOR_EACH[operator](gradient, number)


def _change_(gradient: Int8Gradient, change: Callable[[Tensor], Tensor]) -> None:
    """Apply `change` to the FP32 values of the stored matrix and round the result to nearest."""
    values = kernels.dequantize(kernels.Weight.dense(gradient.stored), dtype=torch.float32)
    codes, scales = kernels.quantize(change(values), group_size=STATE_GROUP_SIZE)
    gradient.codes.copy_(codes)
    gradient.scales.copy_(scales)


@Int8Gradient.implements(*IN_PLACE)
def _scale(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Gradient:
    gradient, factor = args
    if not isinstance(gradient, Int8Gradient) and operator is aten.mul.Tensor:
        gradient, factor = factor, gradient  # mask * gradient
    if not isinstance(gradient, Int8Gradient):
        return read(operator, args, kwargs)
    return _scale_(IN_PLACE[operator], (gradient.clone(), factor), kwargs)


@Int8Gradient.implements(aten._amp_foreach_non_finite_check_and_unscale_.default)
def _unscale_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise NotImplementedError(
        "A GradScaler unscales float gradients, and gradients of INT8 weights are INT8. Use "
        "bfloat16, which needs no scaling, in place of float16 and the GradScaler."
    )


@Int8Gradient.implements(aten.zero_.default)
def _zero_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Gradient:
    gradient = args[0]
    gradient.codes.zero_()
    gradient.scales.fill_(1.0)
    return gradient


@Int8Gradient.implements(aten.linalg_vector_norm.default)
def vector_norm(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the norm of a gradient: the 2-norm without expanding it, any other from its values."""
    gradient, order = args[0], args[1] if len(args) > 1 else 2
    if order != 2 or len(args) > 2 or kwargs.get("dim") is not None:
        return read(operator, args, kwargs)
    norm: Tensor = gradient.squared_norm().sqrt().float()
    return norm
