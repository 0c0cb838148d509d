"""A quantized weight in a state dict: its INT8 fields under their own names.

A weight `lm_head.weight` is stored as `lm_head.weight_q`, `lm_head.weight_scale`, ..., and never as
`lm_head.weight`: a program that does not know the format then reports a missing key, instead of
using raw codes as weights.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..config import QuantizationSpec
from ..quant import Arrangement, QFTWeight

# Suffixes of the name of the weight, by field of `QFTWeight`.
SUFFIXES = {
    "codes": "_q",
    "scales": "_scale",
    "outlier_values": "_outlier_value",
    "outlier_columns": "_outlier_column",
}


def state_names(name: str) -> dict[str, str]:
    """Return the names in a state dict of all fields that the weight `name` may have, by field."""
    return {field: name + suffix for field, suffix in SUFFIXES.items()}


def state_fields(name: str, weight: QFTWeight) -> dict[str, Tensor]:
    """Return the fields of the weight `name` by their names in a state dict; empty ones are left
    out.
    """
    names = state_names(name)
    return {
        names[field]: tensor.detach()
        for field, tensor in weight.fields().items()
        if tensor.numel() > 0
    }


def with_state_fields(weight: QFTWeight, name: str, fields: dict[str, Tensor]) -> QFTWeight:
    """Return a weight with these fields of a state dict, which has no empty ones.

    Args:
        weight: Has the format, and all fields that are not given.
        name: Full name of the weight (`lm_head.weight`).
        fields: Tensors by full name in a state dict, at least one.
    """
    device = next(iter(fields.values())).device
    own = {
        field: tensor if tensor.numel() else torch.empty_like(tensor, device=device)
        for field, tensor in weight.fields().items()
    }
    given = {field: fields[key] for field, key in state_names(name).items() if key in fields}
    return weight.with_fields(own | given)


def weight_from_fields(
    fields: dict[str, Tensor],
    spec: QuantizationSpec,
    *,
    name: str,
    arrangement: Arrangement,
    dtype: torch.dtype,
) -> QFTWeight:
    """Check the fields of a checkpoint and return a `QFTWeight` of them.

    Args:
        fields: Tensors by full name in a state dict (`lm_head.weight_q`, ...).
        spec: The format that they must have.
        name: Full name of the weight (`lm_head.weight`).
        arrangement: How its values are placed in the stored matrix.
        dtype: The outer float dtype.

    Raises:
        ValueError: A field is missing, is not part of the format, has a wrong shape or dtype, or
            has values that no quantized weight can have.
    """
    wanted = QFTWeight.empty(arrangement, spec, dtype=dtype)
    expected = state_fields(name, wanted)
    if missing := expected.keys() - fields.keys():
        raise ValueError(
            f"{listed(missing)} missing from the checkpoint, which has "
            f"{listed(fields)}. A shard was lost or the file is damaged: copy or save the "
            "checkpoint again."
        )
    if extra := fields.keys() - expected.keys():
        raise ValueError(
            f"{listed(extra)} found in the checkpoint, but its config.json has "
            f"outlier_fraction={spec.outlier_fraction}, which is a format without these fields. "
            "Restore the config.json that was saved with the checkpoint."
        )
    for key, field in expected.items():
        if fields[key].dtype != field.dtype or fields[key].shape != field.shape:
            raise ValueError(
                f"{key} must be {field.dtype} of shape {tuple(field.shape)}, got "
                f"{fields[key].dtype} of shape {tuple(fields[key].shape)}. The checkpoint was "
                "written for another model or QFTConfig than its config.json describes. To change "
                "a size, such as num_labels, call dequantize_model_, save, load that float "
                "checkpoint with ignore_mismatched_sizes=True, and call quantize_model_."
            )
    weight = with_state_fields(wanted, name, fields)
    check_values(name, weight)
    if spec.matmul == "int8":
        check_shared_columns(name, weight)
    return weight


def check_values(name: str, weight: QFTWeight) -> None:
    """Raise for values that quantization never produces; training would not notice them.

    Raises:
        ValueError: A code is -128, a scale is not a positive finite number, an outlier is not
            finite, outlier columns are out of range or out of order, or a code under an outlier is
            not 0, as in a mixture of two models.
    """
    columns = weight.codes.shape[1]
    codes, scales = weight.codes, weight.scales
    outlier_values, outlier_columns = weight.outlier_values, weight.outlier_columns
    ascending = outlier_columns[:, 1:] > outlier_columns[:, :-1]
    under_outliers = codes.gather(1, outlier_columns.long().clamp(0, columns - 1))
    for field, problem, good in (
        ("codes", "-128, which is not a valid code", codes > -128),
        (
            "scales",
            "scales that are not positive, finite numbers",
            (scales > 0) & scales.isfinite(),
        ),
        ("outlier_values", "NaN or infinite values", outlier_values.isfinite()),
        (
            "outlier_columns",
            f"columns outside [0, {columns})",
            # Not `< columns`: 32,768 columns have 16-bit indices, in which 32,768 is negative.
            (outlier_columns >= 0) & (outlier_columns <= columns - 1),
        ),
        ("outlier_columns", "columns that do not ascend", ascending),
        (
            "codes",
            "codes other than 0 under outliers (to average models, dequantize them first)",
            under_outliers == 0,
        ),
    ):
        if not bool(good.all()):
            raise ValueError(
                f"{state_names(name)[field]} has {problem}: {int((~good).sum())} of "
                f"{good.numel()}. The checkpoint is damaged: copy or save it again."
            )


def check_shared_columns(name: str, weight: QFTWeight) -> None:
    """Raise unless `weight` has the format that INT8 products need; on meta, columns are unknown.

    Raises:
        ValueError: Rows of a matrix have outliers in different columns, or several scales per row.
    """
    columns = weight.outlier_columns.unflatten(0, (-1, weight.arrangement.rows))
    are_shared = weight.is_meta or bool((columns == columns[:, :1]).all())
    if weight.group_size is not None or not are_shared:
        raise ValueError(
            f"{name} was quantized for matmul='dequantize': its rows have outliers in different "
            "columns, or several scales each. Leave matmul='int8' out, or dequantize the model, "
            "save it, and quantize it with QFTConfig(matmul='int8')."
        )


def listed(names: Iterable[str]) -> str:
    """Return names in alphabetical order, for an error message."""
    return ", ".join(sorted(names))
