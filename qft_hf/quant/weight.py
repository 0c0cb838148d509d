"""`QFTWeight`: a trainable weight stored as INT8 codes beside a few critical values in float."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from .. import kernels
from ..config import QuantizationSpec
from ..layout import INT16_COLUMNS, GroupLayout, outliers_per_row
from .gradient import Int8Gradient, RowTiles
from .tensor import Int8Tensor

# Elements of a weight that are expanded to float at a time: 64 MB in FP32.
TILE_ELEMENTS = 2**24
# Rows of a tile are a multiple of this: products of slices that begin anywhere take up to half as
# long again.
TILE_ROWS = 64


class QFTWeight(Int8Tensor):
    """A `[rows, columns]` weight in the hybrid format: dense INT8 and sparse critical values.

    Its dtype is the float type it stands for (that of products and of the exported model); nothing
    of that type is stored. The value of an element is its critical value where it has one and
    `codes * scale` elsewhere; codes under critical values are 0.

    Args:
        codes: int8 `[rows, columns]`.
        scales: fp32 `[rows, n_groups]`, positive.
        outlier_values: fp32 `[rows, n_outliers]`.
        outlier_columns: int16 or int32 `[rows, n_outliers]`, ascending in each row.
        group_size: Columns per scale; None: whole rows.
        dtype: The outer float dtype.

    Source:
        Li et al. 2023, "QFT", section 3.3 (arXiv:2310.07147); dense-and-sparse split from Kim et
        al. 2023, "SqueezeLLM", section 4.2 (arXiv:2306.07629). Theirs picks critical values per
        tensor; here each row has the same number, so that rows stay independent. With
        `matmul="int8"` all rows have them in the same columns.
    """

    FIELDS = ("codes", "scales", "outlier_values", "outlier_columns")

    outlier_values: Tensor
    outlier_columns: Tensor
    group_size: int | None
    # Whether gradients may be left to be made by who takes them, which is gradient release.
    defers_gradient: bool = False
    # State-dict keys of fields that a partly loaded checkpoint still owes this weight.
    pending: frozenset[str] = frozenset()

    @staticmethod
    def __new__(cls, codes: Tensor, *_: Any, dtype: torch.dtype, **__: Any) -> Self:
        """Make the outer tensor: shape and device of the codes, no storage."""
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        outlier_values: Tensor,
        outlier_columns: Tensor,
        *,
        group_size: int | None,
        dtype: torch.dtype,
    ) -> None:
        self.codes = codes
        self.scales = scales
        self.outlier_values = outlier_values
        self.outlier_columns = outlier_columns
        self.group_size = group_size

    def _format(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "dtype": self.dtype}

    def with_fields(self, fields: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> Self:
        """A weight of the same format around other fields; what is pending stays so."""
        weight = type(self)(**fields, group_size=self.group_size, dtype=dtype or self.dtype)
        weight.pending = self.pending
        return weight

    @classmethod
    def from_float(cls, weight: Tensor, spec: QuantizationSpec, *, name: str = "weight") -> Self:
        """Quantize a float matrix: critical values first, the rest to nearest.

        Args:
            weight: fp32, bf16 or fp16 `[rows, columns]`; not modified. Its dtype becomes the outer
                dtype. On the meta device only shapes are made.
            spec: Group size, outlier fraction, and whether the critical values are whole columns,
                as INT8 products need them.
            name: What to call the tensor in an error.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        weight = weight.detach().contiguous()
        if weight.is_meta:
            rows, columns = weight.shape
            return cls.empty(rows, columns, spec, dtype=weight.dtype, device=weight.device)
        finite = weight.isfinite()
        if not bool(finite.all()):
            count = weight.numel() - int(finite.sum())
            raise ValueError(
                f"{name} has {count} of {weight.numel()} values that are NaN or infinite and "
                "cannot be quantized. The checkpoint is damaged or its dtype too narrow: load a "
                "good one, or list the module in modules_to_not_convert."
            )
        dense = weight.float()
        index = _critical_columns(dense, spec)
        values = dense.gather(1, index)
        if index.shape[1]:
            dense = dense.scatter(1, index, 0.0)
        codes, scales = kernels.quantize(dense, group_size=spec.group_size)
        return cls(
            codes,
            scales,
            values,
            index.to(_column_dtype(weight.shape[1])),
            group_size=spec.group_size,
            dtype=weight.dtype,
        )

    @classmethod
    def empty(
        cls,
        rows: int,
        columns: int,
        spec: QuantizationSpec,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Self:
        """A weight with fields of the right shape and no defined values."""
        layout = GroupLayout(rows, columns, spec.group_size)
        n_outliers = outliers_per_row(columns, spec.outlier_fraction)
        return cls(
            torch.empty(rows, columns, dtype=torch.int8, device=device),
            torch.empty(rows, layout.n_groups, dtype=torch.float32, device=device),
            torch.empty(rows, n_outliers, dtype=torch.float32, device=device),
            torch.empty(rows, n_outliers, dtype=_column_dtype(columns), device=device),
            group_size=spec.group_size,
            dtype=dtype,
        )

    def row_tiles(self, *, at_most: int | None = None) -> Iterator[slice]:
        """Row ranges of like size that cover the matrix in order.

        Args:
            at_most: Rows of one range, beside the limit of `TILE_ELEMENTS` elements.
        """
        rows, columns = self.shape
        step = max(1, min(TILE_ELEMENTS // columns, at_most or rows))
        if step < rows:
            multiple = TILE_ROWS if step >= TILE_ROWS else 1
            n_tiles = -(-rows // (step - step % multiple))
            step = -(-rows // (n_tiles * multiple)) * multiple
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def dequantize_rows(self, rows: slice | Tensor) -> Tensor:
        """The values of some rows, a slice or numbers `[n]`: `[n, columns]`, outer dtype."""
        part, index = (rows, None) if isinstance(rows, slice) else (slice(None), rows)
        return kernels.dequantize(
            self.codes[part],
            self.scales[part],
            group_size=self.group_size,
            rows=index,
            outlier_values=self.outlier_values[part],
            outlier_columns=self.outlier_columns[part],
            dtype=self.dtype,
        )

    def gradient(
        self,
        tile: Callable[[slice], Tensor],
        quantized_tile: Callable[[slice], tuple[Tensor, Tensor]] | None = None,
        *,
        defer: bool,
    ) -> Int8Gradient:
        """The gradient of this weight, of which each row tile is quantized as soon as it exists.

        Args:
            tile: Makes the float gradient `[n, columns]` of a range of rows.
            quantized_tile: As `make_quantized` of `RowTiles`.
            defer: Leave all of that to who uses the gradient; what `tile` refers to lives until
                then.
        """
        rows, columns = self.shape
        tiles = RowTiles(
            tile,
            list(self.row_tiles()),
            shape=(rows, columns),
            device=self.device,
            make_quantized=quantized_tile,
        )
        gradient = Int8Gradient.deferred(tiles, dtype=self.dtype)
        if not defer:
            gradient.fields()
        return gradient

    def dequantize(self) -> Tensor:
        """All values as a plain `[rows, columns]` tensor of the outer dtype."""
        return self.dequantize_rows(slice(0, self.shape[0]))


def _critical_columns(weight: Tensor, spec: QuantizationSpec) -> Tensor:
    """Which columns of each row stay float: int64 `[rows, n_outliers]`, ascending.

    Each row's largest magnitudes; for INT8 products the same columns in every row, those with the
    largest value relative to the norm of its row: what stands out most sets the scale of its row,
    and a row with a large scale takes the codes of all others in its share of the input gradient.
    """
    rows, columns = weight.shape
    n_outliers = outliers_per_row(columns, spec.outlier_fraction)
    size = weight.abs()
    if spec.matmul == "int8":
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        size = size.div_(norm.clamp_min_(1e-30)).amax(dim=0, keepdim=True)  # a row may be zeros
    index = size.topk(n_outliers, dim=1).indices.sort(dim=1).values
    return index.expand(rows, n_outliers).contiguous()


def _column_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= INT16_COLUMNS else torch.int32
