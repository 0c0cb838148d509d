"""The mean of a gradient over several processes; each process holds the rows that it owns.

Autograd, clipping and the flow treat these as gradients of a whole weight.
"""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

from .. import kernels
from ..layout import row_tiles
from .arrangement import Arrangement
from .gradient import IN_PLACE, Int8Gradient, TiledGradient, Tiles, vector_norm
from .reading import aten, read
from .tensor import Int8Tensor


class OwnRows(Int8Gradient):
    """A gradient as INT8 codes and scales of the own rows only.

    Its norm is that of all rows. Multiplying it by a number scales the own rows and the norm, so
    every process has to do the same. Every other operation that reads values raises.

    Args:
        stored: Codes and scales of the own rows; None: this process owns none.
        own_rows: Position of these rows in the matrix.
        square_sum: fp64 scalar: the sum of squares of all rows, once the processes have added up
            their sums in this tensor.
        like: The weight.
    """

    own_rows: slice

    @staticmethod
    def __new__(cls, *_: Any, like: Int8Tensor, **__: Any) -> Self:
        """Make the outer tensor, in the shape of the weight and without storage."""
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    def __init__(
        self,
        stored: kernels.Quantized | None,
        *,
        own_rows: slice,
        square_sum: Tensor,
        like: Int8Tensor,
    ) -> None:
        self.stored = stored  # type: ignore[assignment]  # without own rows nothing is updated
        self.own_rows = own_rows
        self.square_sum = square_sum
        self.arrangement = like.arrangement

    def fields(self) -> dict[str, Tensor]:
        """Return the stored tensors by name; none if this process owns no rows."""
        return {} if self.stored is None else super().fields()

    def values(self) -> Tensor:
        """Raise NotImplementedError, because the values are distributed over several processes."""
        rows = self.own_rows
        raise NotImplementedError(
            f"This process has rows {rows.start} to {rows.stop} of the gradient of a "
            f"{tuple(self.shape)} weight, as the mean over all processes: it can be clipped and "
            "scaled by numbers, and nothing else. Change gradients in a hook of the weight, "
            "weight.register_hook(...), which sees the gradient of its own process. A second "
            "backward pass cannot be added to it: run all passes except the last one under "
            "optimizer.accumulate()."
        )

    @property
    def finite_probe(self) -> Tensor:
        """A tensor that is finite if and only if the gradient is, on all processes."""
        return self.square_sum

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of all rows of all processes: fp64 scalar."""
        return self.square_sum

    squared_norms = squared_norm  # norms of single rows of other processes are unknown here

    def drop_nonfinite_(self) -> None:
        """Zero the groups of the own rows that have a NaN or infinity."""
        if self.stored is not None:
            super().drop_nonfinite_()


# Of the operators that an INT8 gradient implements, own rows keep only those registered below.
OwnRows._operators.clear()
OwnRows.implements(aten.linalg_vector_norm.default)(vector_norm)


@OwnRows.implements(*IN_PLACE.values())
def _scale_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient, factor = args
    if not isinstance(gradient, OwnRows) or (isinstance(factor, Tensor) and factor.numel() > 1):
        return read(operator, args, kwargs)
    if gradient.stored is not None:
        operator(gradient.stored.scales, factor)
    squared = factor.double().square() if isinstance(factor, Tensor) else factor * factor
    # Not in place: a norm that was recorded before holds the old tensor and must keep its value.
    is_product = operator in (aten.mul_.Tensor, aten.mul_.Scalar)
    gradient.square_sum = gradient.square_sum * (squared if is_product else 1 / squared)
    return gradient


@OwnRows.implements(aten.add_.Tensor, aten.add.Tensor)
def _refuse(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(tensor for tensor in args if isinstance(tensor, OwnRows)).values()


class OwnTiles(TiledGradient):
    """A deferred gradient of the own rows, computed in float one tile at a time when it is used.

    Args:
        make: Computes the float gradient `[n, columns]` of a range of the own rows, counted from
            the first own row.
        own_rows: Position of these rows in the matrix.
        square_sum: fp64 scalar, 0: `quantized` writes the sum of squares of the own rows into it.
        like: The weight.
    """

    own_rows: slice

    @staticmethod
    def __new__(cls, *_: Any, like: Int8Tensor, **__: Any) -> Self:
        """Make the outer tensor, in the shape of the weight and without storage."""
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    def __init__(
        self,
        make: Callable[[slice], Tensor],
        *,
        own_rows: slice,
        square_sum: Tensor,
        like: Int8Tensor,
    ) -> None:
        n_rows, columns = own_rows.stop - own_rows.start, like.arrangement.columns
        rows = list(row_tiles(n_rows, columns)) if n_rows else []
        super().__init__(Tiles(make), rows, arrangement=Arrangement((n_rows, columns)))
        self.own_rows = own_rows
        self.square_sum = square_sum
        self.like = like

    def quantized(self) -> OwnRows:
        """Return all own rows in INT8."""
        stored = None
        if self.rows:
            stored = super().quantized().stored
            self.square_sum.copy_(kernels.squared_norm(stored))
        return OwnRows(stored, own_rows=self.own_rows, square_sum=self.square_sum, like=self.like)
