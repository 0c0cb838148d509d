"""The mean of a gradient over several processes, of which each process has the rows it owns.

To autograd, clipping and the flow of gradients they are gradients of a whole weight.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from .. import kernels
from ..layout import STATE_GROUP_SIZE, row_tiles
from .arrangement import Arrangement
from .gradient import IN_PLACE, Int8Gradient, TiledGradient, Tiles, vector_norm
from .reading import aten, read
from .tensor import Int8Tensor


class OwnRows(Int8Gradient):
    """A gradient as INT8 codes and scales, of the own rows alone.

    Its norm is that of all rows, and multiplying it by a number scales them on every process that
    does the same. Anything else that would look at values raises.

    Args:
        stored: Codes and scales of the own rows; None: this process owns none.
        own_rows: Which rows of the matrix they are.
        square_sum: fp64 scalar: the sum of squares of all rows, as soon as the processes have added
            up theirs in this very tensor.
        like: The weight.
    """

    own_rows: slice

    @staticmethod
    def __new__(cls, *_: Any, like: Int8Tensor, **__: Any) -> Self:
        """Make the outer tensor: that of the weight, no storage."""
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    def __init__(
        self,
        stored: kernels.Quantized | None,
        *,
        own_rows: slice,
        square_sum: Tensor,
        like: Int8Tensor,
    ) -> None:
        self.stored = stored  # type: ignore[assignment]  # who owns no rows does not update any
        self.own_rows = own_rows
        self.square_sum = square_sum
        self.arrangement = like.arrangement

    @property
    def has_rows(self) -> bool:
        """Whether there are rows for this process to update."""
        return self.stored is not None

    def fields(self) -> dict[str, Tensor]:
        """The stored tensors by name; none if this process owns no rows."""
        return {} if self.stored is None else super().fields()

    def values(self) -> Tensor:
        """Raise: they are on several processes.

        Raises:
            NotImplementedError: Always.
        """
        rows = self.own_rows
        raise NotImplementedError(
            f"This process has rows {rows.start} to {rows.stop} of the gradient of a "
            f"{tuple(self.shape)} weight, as the mean over all processes: it can be clipped and "
            "scaled by numbers, and nothing else. Change gradients in a hook of the weight, "
            "weight.register_hook(...), which sees those of its own process. A second backward "
            "pass cannot be added to it: run all but the last under optimizer.accumulate()."
        )

    @property
    def witness(self) -> Tensor:
        """A tensor that is finite if the gradient is, on all processes."""
        return self.square_sum

    def squared_norm(self) -> Tensor:
        """Sum of squares of all rows of all processes: fp64 scalar."""
        return self.square_sum

    squared_norms = squared_norm  # rows of others have none here

    def drop_nonfinite_(self) -> None:
        """Make groups of the own rows with a NaN or infinity zeros."""
        if self.has_rows:
            super().drop_nonfinite_()


# Of all that an INT8 gradient does without its values, own rows do what follows alone.
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
    # Another tensor: who has noted the norm has that before.
    is_product = operator in (aten.mul_.Tensor, aten.mul_.Scalar)
    gradient.square_sum = gradient.square_sum * (squared if is_product else 1 / squared)
    return gradient


@OwnRows.implements(aten.add_.Tensor, aten.add.Tensor)
def _refuse(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next(tensor for tensor in args if isinstance(tensor, OwnRows)).values()


class OwnTiles(TiledGradient):
    """A gradient of the own rows in float, made a tile at a time when it is used.

    Args:
        make: Makes the float gradient `[n, columns]` of a range of the own rows, counted from the
            first of them.
        own_rows: Which rows of the matrix they are.
        square_sum: fp64 scalar, 0: `quantized` writes the sum of squares of the own rows into it.
        like: The weight.
    """

    own_rows: slice

    @staticmethod
    def __new__(cls, *_: Any, like: Int8Tensor, **__: Any) -> Self:
        """Make the outer tensor: that of the weight, no storage."""
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

    @property
    def has_rows(self) -> bool:
        """Whether there are rows for this process to update."""
        return bool(self.rows)

    def quantized(self) -> OwnRows:
        """All own rows in INT8."""
        stored = None
        if self.rows:
            parts = [self.made_by.quantized(rows) for rows in self.rows]
            codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            stored = kernels.Quantized(codes, scales, STATE_GROUP_SIZE)
            self.square_sum.copy_(kernels.squared_norm(stored))
        return OwnRows(stored, own_rows=self.own_rows, square_sum=self.square_sum, like=self.like)
