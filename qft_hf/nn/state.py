"""A quantized weight in a state dict: its INT8 fields under names of their own.

They are never called `weight`: a program that does not know the format then misses a key, instead
of taking raw codes for weights.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..config import QuantizationSpec
from ..quant import Arrangement, QFTWeight

# Name in a state dict, by field of `QFTWeight`.
STATE_NAMES = {
    "codes": "weight_q",
    "scales": "weight_scale",
    "outlier_values": "weight_outlier_value",
    "outlier_columns": "weight_outlier_column",
}


def state_fields(weight: QFTWeight) -> dict[str, Tensor]:
    """The fields of a weight by their names in a state dict; without outliers there are two."""
    return {
        STATE_NAMES[name]: field.detach()
        for name, field in weight.fields().items()
        if field.numel() > 0
    }


def weight_from_fields(
    fields: dict[str, Tensor],
    spec: QuantizationSpec,
    *,
    name: str,
    arrangement: Arrangement,
    dtype: torch.dtype,
) -> QFTWeight:
    """A `QFTWeight` around the fields of a checkpoint, once they are known to be sound.

    Args:
        fields: Tensors by name in a state dict (`weight_q`, ...).
        spec: The format they must have.
        name: Full name of the weight, for errors.
        arrangement: How its values lie in the matrix that the fields are.
        dtype: The outer float dtype.

    Raises:
        ValueError: A field is missing, not part of the format, of another shape or dtype, or has
            values that no quantized weight has.
    """
    wanted = QFTWeight.empty(arrangement, spec, dtype=dtype, device="meta")
    expected = state_fields(wanted)
    if missing := expected.keys() - fields.keys():
        raise ValueError(
            f"{listed(name, missing)} missing from the checkpoint, which has "
            f"{listed(name, fields)}. A shard was lost or the file is damaged: copy or save the "
            "checkpoint again."
        )
    if extra := fields.keys() - expected.keys():
        raise ValueError(
            f"{listed(name, extra)} in the checkpoint, and its config.json has "
            f"outlier_fraction={spec.outlier_fraction}, which makes no such field. Restore the "
            "config.json that was saved with it."
        )
    for key, field in expected.items():
        if fields[key].dtype != field.dtype or fields[key].shape != field.shape:
            raise ValueError(
                f"{listed(name, [key])} must be {field.dtype} of shape {tuple(field.shape)}, got "
                f"{fields[key].dtype} of shape {tuple(fields[key].shape)}. The checkpoint is of "
                "another model or of another QFTConfig than its config.json says."
            )
    inner = {
        attribute: fields[key]
        if (key := STATE_NAMES[attribute]) in fields
        else torch.empty(field.shape, dtype=field.dtype, device=fields[STATE_NAMES["codes"]].device)
        for attribute, field in wanted.fields().items()
    }
    weight = wanted.with_fields(inner)
    check_values(name, weight)
    if spec.matmul == "int8":
        check_shared_columns(name, weight)
    return weight


def check_values(name: str, weight: QFTWeight) -> None:
    """Raise for values that quantizing never makes; they would train on in silence.

    Raises:
        ValueError: A code is -128, a scale is not a positive finite number, an outlier is not
            finite, or its columns are out of range or out of order.
    """
    columns = weight.codes.shape[1]
    codes, scales = weight.codes, weight.scales
    outlier_values, outlier_columns = weight.outlier_values, weight.outlier_columns
    ascending = outlier_columns[:, 1:] > outlier_columns[:, :-1]
    for field, problem, good in (
        ("codes", "-128, which is no code", codes > -128),
        (
            "scales",
            "scales that are not positive, finite numbers",
            (scales > 0) & scales.isfinite(),
        ),
        ("outlier_values", "NaN or infinite values", outlier_values.isfinite()),
        (
            "outlier_columns",
            f"columns outside [0, {columns})",
            # Not `< columns`: 32,768 columns have 16-bit numbers, and among these it is negative.
            (outlier_columns >= 0) & (outlier_columns <= columns - 1),
        ),
        ("outlier_columns", "columns that do not ascend", ascending),
    ):
        if not bool(good.all()):
            raise ValueError(
                f"{listed(name, [STATE_NAMES[field]])} has {problem}: {int((~good).sum())} of "
                f"{good.numel()}. The checkpoint is damaged: copy or save it again."
            )


def check_shared_columns(name: str, weight: QFTWeight) -> None:
    """Raise unless the outliers of `weight` can take part in INT8 products.

    Raises:
        ValueError: They lie in other columns in each row, or scales are not those of whole rows.
    """
    columns = weight.outlier_columns
    if weight.group_size is not None or not bool((columns == columns[:1]).all()):
        raise ValueError(
            f"{name} was quantized for matmul='dequantize': its outliers lie in other "
            "columns in each row, or rows have several scales. Leave matmul='int8' out, or "
            "dequantize the model, save it, and quantize it with QFTConfig(matmul='int8')."
        )


def listed(name: str, fields: Iterable[str]) -> str:
    """Full names of some fields of the weight `name`."""
    stem = name.removesuffix("weight")
    return ", ".join(stem + field for field in sorted(fields))
