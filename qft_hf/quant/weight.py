"""`QFTWeight`: a trainable weight stored as INT8 codes and a few outliers in FP32."""

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import kernels, layout
from ..config import QuantizationSpec
from ..kernels.groups import QMAX, empty_quantized, spread_groups
from ..layout import INT16_COLUMNS, outliers_per_row
from .arrangement import Arrangement
from .gradient import Int8Gradient, TiledGradient, Tiles
from .hybrid import check_quantizable, quantized_rows, shared_columns
from .reading import aten, read, view, warn_of_memory
from .tensor import Int8Tensor

ALL_ROWS = slice(0, None)


class QFTWeight(Int8Tensor):
    """A weight in the hybrid format: dense INT8 and sparse outliers.

    The weight is stored as a matrix `[rows, columns]` whose rows are outputs. It has the shape that
    its module expects, and `arrangement` maps one to the other. Its dtype is the float type that it
    represents, which is that of products and of the exported model; no value of that type is
    stored. The value of an element is its outlier if it has one, otherwise `code * scale`; codes
    under outliers are 0.

    Args:
        codes: int8 `[rows, columns]`.
        scales: fp32 `[rows, n_groups]`, positive.
        outlier_values: fp32 `[rows, n_outliers]`.
        outlier_columns: int16 or int32 `[rows, n_outliers]`, ascending in each row.
        group_size: Columns per scale; None: whole rows.
        dtype: The outer float dtype.
        arrangement: How the weight's values are placed in the matrix; None: the weight has its
            shape.

    Source:
        Li et al. 2023, "QFT", section 3.3 (arXiv:2310.07147); dense-and-sparse split from Kim et
        al. 2023, "SqueezeLLM", section 4.2 (arXiv:2306.07629), which chooses outliers per tensor.
        Here each row has the same number of outliers, so that rows stay independent. With
        `matmul="int8"` all rows have them in the same columns.
    """

    FIELDS = ("codes", "scales", "outlier_values", "outlier_columns")
    to_change = (
        "To edit weights, call dequantize_model_(model, model.dtype), change them, and call "
        "quantize_model_(model, QFTConfig()) again; to train them, use an optimizer of qft_hf, "
        "such as QFTLion; to compute with other values, change the result of .dequantize(), a "
        "copy; for a running mean use a float model: "
        "AveragedModel(dequantize_model_(copy.deepcopy(model), model.dtype)). On several processes "
        "do not use DistributedDataParallel: an optimizer of qft_hf averages gradients itself."
    )

    stored: kernels.Weight
    # Whether an embedding looks up rows of it. An output head may share it; its gradient is then a
    # sum, and the logits' gradient must not be kept until both terms exist.
    is_table: bool = False
    # State-dict keys of the fields that a partly loaded checkpoint has not provided yet.
    pending: frozenset[str] = frozenset()

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        *_: Any,
        dtype: torch.dtype | None = None,
        arrangement: Arrangement | None = None,
        **__: Any,
    ) -> Self:
        """Make the outer tensor, on the device of the codes and without storage."""
        if dtype is None:
            raise TypeError(
                f"QFTWeight needs codes, scales, outliers and a dtype (from_float computes them), "
                f"but got only a {type(codes).__name__}. Accelerate calls it this way to move or "
                "offload a parameter (dispatch_model, cpu_offload, disk_offload), which INT8 "
                "weights do not support: use from_pretrained(..., device_map=...) with devices "
                "that together have room for the model, or model.to(device)."
            )
        return super().__new__(cls, codes, dtype=dtype, arrangement=arrangement)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy; that of a parameter has no gradient, as that of any `nn.Parameter`."""
        gradient = None
        if isinstance(self, nn.Parameter):
            gradient, self.grad = self.grad, None  # else it is copied, and `memo` keeps it
        try:
            copied: Self = super().__deepcopy__(memo)
        finally:
            if gradient is not None:
                self.grad = gradient
        return copied

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        outlier_values: Tensor,
        outlier_columns: Tensor,
        *,
        group_size: int | None,
        dtype: torch.dtype,
        arrangement: Arrangement | None = None,
    ) -> None:
        self.stored = kernels.Weight(codes, scales, outlier_values, outlier_columns, group_size)
        self.arrangement = arrangement or Arrangement(tuple(codes.shape))

    @property
    def outlier_values(self) -> Tensor:
        """fp32 `[rows, n_outliers]`."""
        return self.stored.outlier_values

    @property
    def outlier_columns(self) -> Tensor:
        """int16 or int32 `[rows, n_outliers]`."""
        return self.stored.outlier_columns

    @property
    def group_size(self) -> int | None:
        """Columns per scale; None: whole rows."""
        return self.stored.group_size

    def aliased(self, fields: dict[str, Tensor]) -> Self:
        """Return a weight with `fields`, which share the memory of this weight's fields.

        It shares the plans too. Writing to one, as in `weight.data.copy_(other)`, changes both.
        """
        weight = super().aliased(fields)
        weight.stored.plans = self.stored.plans
        return weight

    def fields_changed(self) -> None:
        """Drop the plans made for the old values; to be called after copying into fields."""
        self.stored.plans.clear()
        if not self.is_inference():
            torch.autograd.graph.increment_version(self)  # like any in-place change of a tensor

    def _format(self) -> dict[str, Any]:
        return {"group_size": self.group_size, **super()._format()}

    def with_fields(self, fields: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> Self:
        """Return a weight with other fields and the same format, `is_table` and `pending`."""
        weight = super().with_fields(fields, dtype=dtype)
        weight.pending = self.pending
        weight.is_table = self.is_table
        return weight

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        spec: QuantizationSpec,
        *,
        name: str = "weight",
        transposed: bool = False,
    ) -> Self:
        """Quantize a float weight: take out the outliers, then round the rest to nearest.

        Args:
            weight: fp32, bf16 or fp16 `[R, C]`, or `[E, R, C]`, whose matrices are quantized one
                after the other; not modified. Its dtype becomes the outer dtype. On the meta device
                only shapes are set.
            spec: Group size, outlier fraction, and whether the outliers of a matrix are whole
                columns, as INT8 products need them.
            name: Name of the tensor in errors.
            transposed: Whether `weight` is `[C, R]` or `[E, C, R]`.

        Raises:
            ValueError: A value is NaN or infinite, or there are too many for the kernels.
        """
        weight, arrangement = weight.detach(), Arrangement(tuple(weight.shape), transposed)
        check_quantizable(name, weight, arrangement)
        result = cls.empty(arrangement, spec, dtype=weight.dtype, device=weight.device)
        if weight.is_meta:
            return result
        for rows, matrix in arrangement.parts(weight):
            fields = [field[rows] for field in result.stored.tensors]
            columns = shared_columns(matrix, spec) if spec.matmul == "int8" else None
            for tile in layout.row_tiles(*matrix.shape):
                parts = quantized_rows(matrix[tile], spec, columns)
                for field, part in zip(fields, parts, strict=True):
                    field[tile] = part
        return result

    @classmethod
    def empty(
        cls,
        arrangement: Arrangement,
        spec: QuantizationSpec,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> Self:
        """Return a weight with fields of the right shapes and undefined values, or none on meta."""
        rows, columns = arrangement.matrix_shape
        n_outliers = outliers_per_row(columns, spec.outlier_fraction)
        column_dtype = torch.int16 if columns <= INT16_COLUMNS else torch.int32
        return cls(
            *empty_quantized(rows, columns, spec.group_size, device),
            torch.empty(rows, n_outliers, dtype=torch.float32, device=device),
            torch.empty(rows, n_outliers, dtype=column_dtype, device=device),
            group_size=spec.group_size,
            dtype=dtype,
            arrangement=arrangement,
        )

    def resized(self, values: Tensor, spec: QuantizationSpec) -> Self:
        """Return a weight with as many rows as `values`.

        Args:
            values: Float `[rows, columns]`. Rows that this weight has are taken from this weight,
                bit for bit; the rows after them are quantized.
            spec: The format of this weight.
        """
        n_kept = min(len(self), len(values))
        fields = {name: field[:n_kept].clone() for name, field in self.fields().items()}
        if len(values) > n_kept:
            columns = self.outlier_columns[0].long() if spec.matmul == "int8" else None
            added = quantized_rows(values.detach()[n_kept:], spec, columns)
            fields = {
                name: torch.cat([field, part.to(field.dtype)])
                for (name, field), part in zip(fields.items(), added, strict=True)
            }
        weight = type(self)(*fields.values(), group_size=self.group_size, dtype=self.dtype)
        weight.is_table = self.is_table
        return weight

    def check_complete(self, name: str = "weight") -> None:
        """Raise if only some of its fields were loaded.

        Args:
            name: Name of the weight in the error text.

        Raises:
            RuntimeError: Others are `pending`.
        """
        if self.pending:
            raise RuntimeError(
                f"A checkpoint was loaded without {sorted(self.pending)}; the {name} is a mixture "
                "of two models. Load a complete checkpoint of this model and QFTConfig."
            )

    def row_tiles(self, *, at_most: int | None = None) -> Iterator[slice]:
        """Return the ranges of rows that are expanded to float at a time; see `layout.row_tiles`.

        A range of experts has whole experts or a part of one.
        """
        n_matrices, rows = self.arrangement.n_matrices, self.arrangement.rows
        if n_matrices == 1:
            return layout.row_tiles(rows, self.arrangement.columns, at_most=at_most)
        return layout.matrix_tiles(n_matrices, rows, self.arrangement.columns)

    def dequantize_rows(self, rows: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of some rows of the matrix, without a gradient: `[n, columns]`.

        Args:
            rows: A slice, or row numbers `[n]`.
            dtype: Dtype that the values are rounded to after the outer dtype, if it differs.
        """
        self.check_complete()
        if isinstance(rows, Tensor):
            return kernels.expand(self.stored, self.dtype, dtype, rows=rows)
        return kernels.expand(self.stored.rows(rows), self.dtype, dtype)

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of all rows, as in `dequantize_rows`: `[rows, columns]`."""
        return kernels.expand(self.stored, self.dtype, dtype)

    def values(self) -> Tensor:
        """Return all values as a plain tensor of this shape and dtype, without a gradient."""
        self.check_complete()
        return self.arrangement.parameter(self.matrix())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return all values as a plain tensor of this shape, rounded to `dtype` if one is given.

        If gradients are recorded, the gradient of the result is passed on to this weight, in INT8.
        """
        values = super().dequantize()
        return values if dtype is None else values.to(dtype)

    def part(self, start: int, end: int) -> Tensor:
        """Return the values of a range of rows or experts (dimension 0), without a gradient."""
        shape, transposed = self.arrangement
        if len(shape) == 2 and transposed:  # a range of columns
            return self.values()[start:end]
        n_rows = self.arrangement.matrix_shape[0] // shape[0]
        rows = self.dequantize_rows(slice(start * n_rows, end * n_rows))
        return Arrangement((end - start, *shape[1:]), transposed).parameter(rows)

    def one(self, number: int) -> "QFTWeight":
        """Return the matrix of one expert as a weight `[R, C]` that shares this weight's memory.

        It takes no part in autograd, and is kept with the plans of this weight.
        """
        key = ("matrix", number, self.dtype)
        matrix: QFTWeight | None = self.stored.plans.get(key)
        if matrix is None:
            fields = self.stored.rows(self.arrangement.part(number)).tensors
            matrix = QFTWeight(*fields, group_size=self.group_size, dtype=self.dtype)
            self.stored.plans[key] = matrix
        return matrix

    def dequantize_matrices(self, numbers: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values of the matrices of some experts: `[n, R, C]`.

        Args:
            numbers: Numbers of the experts: int32 or int64 `[n]`, ascending, each once.
            dtype: As in `dequantize_rows`.
        """
        rows = self.arrangement.rows
        if len(numbers) == self.arrangement.n_matrices:
            values = self.matrix(dtype)
        else:
            values = kernels.expand(self.stored, self.dtype, dtype, rows=numbers, n_each=rows)
        return values.view(-1, rows, self.arrangement.columns)

    @property
    def wants_tiles(self) -> bool:
        """Whether the gradient may be passed on as a `TiledGradient`.

        It may if every hook on this parameter asks for tiles by its own `wants_tiles`. A user's
        hook, before or after accumulation, needs the whole gradient.
        """
        hooks = self._post_accumulate_grad_hooks
        if not hooks or self.is_table or self._backward_hooks:
            return False
        return all(getattr(hook, "wants_tiles", False) for hook in hooks.values())

    def gradient(self, tiles: Tiles) -> Int8Gradient | TiledGradient:
        """Return the gradient, quantized tile by tile, or in tiles if `wants_tiles`."""
        rows = [ALL_ROWS] if self.stored.is_one_tile else list(self.row_tiles())
        wants_tiles = self.wants_tiles
        if not wants_tiles and len(rows) == 1:
            codes, scales = tiles.quantized(ALL_ROWS)
            return Int8Gradient(codes, scales, dtype=self.dtype, arrangement=self.arrangement)
        gradient = TiledGradient(
            tiles, rows, arrangement=self.arrangement, dtype=self.dtype, device=self.device
        )
        return gradient if wants_tiles else gradient.quantized()

    def _take(self, value: Tensor) -> None:
        # The fields of another weight, as `weight.data = weight.data.cuda()` does.
        if not isinstance(value, QFTWeight):
            super()._take(value)
        else:
            Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            self.stored, self.arrangement = value.stored, value.arrangement


@QFTWeight.implements(aten.slice.Tensor)
def _slice(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, dim, start, end, step = args + (0, None, None, 1)[len(args) - 1 :]
    rows = range(*slice(start, end, step).indices(weight.shape[0]))
    if dim % weight.ndim or step != 1 or not rows:
        return view(operator, args, kwargs)
    return view(operator, args, kwargs, make=lambda: weight.part(rows.start, rows.stop))


@QFTWeight.implements(aten.select.int)
def _select(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, dim, index = args
    if dim % weight.ndim:
        return view(operator, args, kwargs)
    index %= weight.shape[0]  # `view` raises for an index that is out of range
    return view(operator, args, kwargs, make=lambda: weight.part(index, index + 1)[0])


@QFTWeight.implements(aten.embedding.default)
def _embedding(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, ids = args[:2]
    if not weight.arrangement.is_plain:
        return read(operator, args, kwargs)
    warn_of_memory(operator, weight)
    rows = weight.dequantize_rows(ids.reshape(-1).contiguous())
    return rows.view(*ids.shape, weight.shape[1])


@QFTWeight.implements(
    aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar
)  # fmt: skip
def _scale_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # RWKV divides weights by powers of two for inference, and multiplies them back for training.
    # A weight with a gradient is being updated by an optimizer that decays it first: not ours.
    weight, factor = args
    is_number = not isinstance(factor, Tensor) or factor.numel() == 1
    takes = isinstance(weight, QFTWeight) and weight.grad is None and is_number
    if not (takes and 0 < float(factor) < float("inf")):
        return read(operator, args, kwargs)  # raises
    operator(weight.scales, factor)
    operator(weight.outlier_values, factor)
    weight.fields_changed()
    return weight


@QFTWeight.implements(aten.clamp_.default)
def _clamp_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give values beyond a limit the last code within it; all others keep their codes.

    Gemma 3n clamps weights in every forward pass.
    """
    weight, low, high = (*args, None, None)[:3]
    low, high = (sign * float("inf") if x is None else x for sign, x in ((-1, low), (1, high)))
    if not low <= 0 <= high:  # codes under outliers are 0 and must stay 0
        return read(operator, args, kwargs)  # raises
    columns = weight.codes.shape[1]
    scales = spread_groups(weight.scales, columns, weight.group_size)
    lowest = (low / scales).ceil_().clamp_(min=-QMAX)
    highest = (high / scales).floor_().clamp_(max=QMAX)
    weight.codes.copy_(weight.codes.float().clamp_(lowest, highest))
    weight.outlier_values.clamp_(low, high)
    weight.fields_changed()
    return weight
