"""`Int8Gradient`: what `.grad` of a quantized weight holds between backward and step."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from .. import kernels
from ..layout import STATE_GROUP_SIZE, GroupLayout
from .tensor import Int8Tensor, aten


class RowTiles:
    """A float gradient that does not exist yet: made a tile of rows at a time, when it is used.

    Args:
        make: Makes the float gradient `[n, columns]` of a range of rows. What it refers to, inputs
            and output gradients of a layer, is alive until then.
        rows: Ranges of rows that cover the gradient in order.
        shape: `(rows, columns)`.
        device: Where `make` puts them.
        make_quantized: Makes codes and scales of a range of rows, the bits of `kernels.quantize` of
            `make`, where that takes no float gradient; None: by just that.
    """

    def __init__(
        self,
        make: Callable[[slice], Tensor],
        rows: list[slice],
        *,
        shape: tuple[int, int],
        device: torch.device,
        make_quantized: Callable[[slice], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.make: Callable[[slice], Tensor] | None = make
        self.make_quantized = make_quantized
        self.rows = rows
        self.shape = shape
        self.device = device
        self._quantized: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Each range of rows with its contiguous float gradient."""
        if self.make is None:
            raise RuntimeError("This gradient is quantized already: use its codes and scales.")
        for rows in self.rows:
            yield rows, self.make(rows).contiguous()

    def quantize(self) -> tuple[Tensor, Tensor]:
        """Codes and scales; made once, for the same gradient is several objects to autograd."""
        if self._quantized is None:
            if self.make_quantized is None:
                parts = (
                    (rows, kernels.quantize(x, group_size=STATE_GROUP_SIZE)) for rows, x in self
                )
            else:
                parts = ((rows, self.make_quantized(rows)) for rows in self.rows)
            if len(self.rows) == 1:
                self._quantized = next(parts)[1]
            else:
                n_groups = GroupLayout(*self.shape, STATE_GROUP_SIZE).n_groups
                codes = torch.empty(self.shape, dtype=torch.int8, device=self.device)
                scales = torch.empty(
                    self.shape[0], n_groups, dtype=torch.float32, device=self.device
                )
                for rows, part in parts:
                    codes[rows], scales[rows] = part
                self._quantized = codes, scales
            self.make = self.make_quantized = None
        return self._quantized


class Int8Gradient(Int8Tensor):
    """A `[rows, columns]` gradient as INT8 codes with an FP32 scale per 256 columns of a row.

    Autograd, gradient accumulation and `torch.nn.utils.clip_grad_norm_` use it like a float tensor:
    adding rounds to nearest, scaling changes scales only, and the norm is that of the stored
    values.

    Args:
        codes: int8 `[rows, columns]`.
        scales: fp32 `[rows, n_groups]`; a group that was NaN or infinite has such a scale.
        dtype: The outer float dtype, that of the weight.
    """

    FIELDS = ("codes", "scales")

    _tiles: RowTiles | None = None

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Self:
        """Make the outer tensor: shape and device of the codes, no storage."""
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> None:
        self.codes = codes
        self.scales = scales

    @classmethod
    def deferred(cls, tiles: RowTiles, *, dtype: torch.dtype) -> Self:
        """A gradient that is made and quantized when its codes or scales are first used.

        For gradient release, which makes, quantizes and uses a gradient tile by tile.
        """
        deferred = Tensor._make_wrapper_subclass(cls, tiles.shape, dtype=dtype, device=tiles.device)
        deferred._tiles = tiles
        return deferred

    @property
    def tiles(self) -> RowTiles | None:
        """The float gradient, as long as it is not quantized."""
        return None if self._tiles is None or self._tiles.make is None else self._tiles

    def __getattr__(self, name: str) -> Any:
        """Quantize now: reached where `codes` or `scales` do not exist yet."""
        if name not in self.FIELDS or self._tiles is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.codes, self.scales = self._tiles.quantize()
        return getattr(self, name)

    def with_fields(self, fields: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> Self:
        """A gradient around other fields."""
        return type(self)(**fields, dtype=dtype or self.dtype)

    @classmethod
    def zeros(
        cls, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        """A gradient of zeros. Beside codes of 0 any finite scale does."""
        n_groups = GroupLayout(rows, columns, STATE_GROUP_SIZE).n_groups
        return cls(
            torch.zeros(rows, columns, dtype=torch.int8, device=device),
            torch.ones(rows, n_groups, dtype=torch.float32, device=device),
            dtype=dtype,
        )

    def set_rows_(self, rows: slice, gradient: Tensor) -> None:
        """Quantize a float gradient `[n, columns]` into `n` rows."""
        self.codes[rows], self.scales[rows] = kernels.quantize(
            gradient.contiguous(), group_size=STATE_GROUP_SIZE
        )

    def dequantize(self) -> Tensor:
        """The values as a plain `[rows, columns]` tensor of the outer dtype."""
        return kernels.dequantize(
            self.codes, self.scales, group_size=STATE_GROUP_SIZE, dtype=self.dtype
        )

    def squared_norm(self) -> Tensor:
        """Sum of squares of all values: fp64 scalar."""
        return kernels.squared_norm(self.codes, self.scales, group_size=STATE_GROUP_SIZE)

    def is_finite(self) -> Tensor:
        """Bool scalar: whether every value is finite. Reads the scales only."""
        return self.scales.isfinite().all()


_each_field = Int8Gradient._operators[aten.detach.default]


@Int8Gradient.implements(aten.detach.default, aten.alias.default)
def _alias(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient = args[0]
    if gradient.tiles is None:
        return _each_field(operator, args, kwargs)
    alias = Int8Gradient.deferred(gradient.tiles, dtype=gradient.dtype)
    return return_and_correct_aliasing(operator, args, kwargs, alias)


@Int8Gradient.implements(aten.add_.Tensor)
def _add_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Gradient:
    gradient, other = args
    if not isinstance(gradient, Int8Gradient) or not isinstance(other, Int8Gradient):
        raise NotImplementedError(
            f"Adding {type(other).__name__} to {type(gradient).__name__} would mix INT8 and float "
            "gradients of one weight: every use of a QFT weight must go through its QFT module."
        )
    if kwargs.get("alpha", 1) != 1:
        raise NotImplementedError("INT8 gradients add with alpha=1 only; scale them first.")
    kernels.accumulate_(
        gradient.codes,
        gradient.scales,
        other.codes,
        other.scales,
        group_size=STATE_GROUP_SIZE,
    )
    return gradient


@Int8Gradient.implements(aten.add.Tensor)
def _add(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Gradient:
    return _add_(operator, (args[0].clone(), args[1]), kwargs)


@Int8Gradient.implements(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar)
def _scale_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Gradient:
    gradient, factor = args
    if isinstance(factor, Tensor) and factor.numel() != 1:
        raise NotImplementedError(
            f"An INT8 gradient can be scaled by one number, got a factor of shape "
            f"{tuple(factor.shape)}."
        )
    operator(gradient.scales, factor)
    return gradient


@Int8Gradient.implements(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def _scale(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Gradient:
    in_place = {
        aten.mul.Tensor: aten.mul_.Tensor,
        aten.mul.Scalar: aten.mul_.Scalar,
        aten.div.Tensor: aten.div_.Tensor,
        aten.div.Scalar: aten.div_.Scalar,
    }[operator]
    return _scale_(in_place, (args[0].clone(), args[1]), kwargs)


@Int8Gradient.implements(aten.zero_.default)
def _zero_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int8Gradient:
    gradient = args[0]
    gradient.codes.zero_()
    gradient.scales.fill_(1.0)
    return gradient


@Int8Gradient.implements(aten.linalg_vector_norm.default)
def _vector_norm(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    gradient, order = args[0], args[1] if len(args) > 1 else 2
    if order != 2 or len(args) > 2 or kwargs.get("dim") is not None:
        raise NotImplementedError(
            f"An INT8 gradient has the 2-norm over all its elements; order {order} with arguments "
            f"{args[2:]} {kwargs} was asked for. Use norm_type=2."
        )
    norm: Tensor = gradient.squared_norm().sqrt().float()
    return norm
