"""Statistics of each weight of an INT8 checkpoint, and its difference from an original model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..kernels.groups import QMAX
from ..quant import QFTWeight
from .checkpoint import weight_files
from .config import QUANT_METHOD, quantization_method
from .loading_faults import refuse_int8
from .missing_model import explain_loading_errors, refuse_what_is_no_model
from .remote_code import loading_class
from .side_network import is_side_network
from .tensor_files import tensor_names


@dataclass(frozen=True, slots=True)
class InspectedWeight:
    """One INT8 weight; its errors are None without an original to compare with."""

    name: str  # of the parameter
    shape: tuple[int, ...]  # rows and columns
    stored_bytes: int  # of codes, scales and outliers
    smallest_scale: float  # of all groups
    median_scale: float
    largest_scale: float
    zero_share: float  # of codes that are 0, including those in the places of outliers
    saturated_share: float  # of codes of magnitude 127: rounding to nearest makes one in each group
    outlier_share: float  # of values that are kept in FP32
    largest_outlier: float  # magnitude; 0 if there are none
    error: float | None = None  # norm of the difference from the original, relative to its norm
    largest_error: float | None = None  # largest difference, in scales of its group


def inspect_checkpoint(
    folder: Path, original: str | None = None, *, trust_remote_code: bool = False
) -> list[InspectedWeight]:
    """Load an INT8 checkpoint and describe each of its INT8 weights.

    Args:
        folder: Folder of the checkpoint.
        original: Folder, or name on the Hub, of a model of the same architecture to compare with:
            the float model that was quantized, or an INT8 model from before training. After
            training, the difference is the sum of rounding and learning.
        trust_remote_code: Whether code that comes with the two models may run.

    Raises:
        FileNotFoundError: `folder` is not a checkpoint folder, or `original` does not exist.
        ValueError: The checkpoint holds a side network or has no INT8 weights, the original has
            other names or shapes, or a model cannot be loaded.
    """
    if is_side_network(folder):
        raise ValueError(
            f"{folder} holds a side network, and not the weights of its base. Inspect the base."
        )
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = int8_config(folder, **trust)
    model: Any = load_int8(folder, config, **trust)
    others: dict[str, Any] = {}
    if original is not None:
        with explain_loading_errors(original):
            family = AutoConfig.from_pretrained(original, **trust).model_type
        if family != config.model_type:
            raise ValueError(
                f"{original} is a model of type {family!r}, and {folder} one of type "
                f"{config.model_type!r}. Give the model that the checkpoint was made from."
            )
        with explain_loading_errors(original):
            others = dict(type(model).from_pretrained(original, **trust).named_parameters())
    return [
        _inspected(name, weight, _counterpart(name, weight, others, original))
        for name, weight in model.named_parameters()
        if isinstance(weight, QFTWeight)
    ]


def int8_config(
    folder: Path, *, advice: str = "Give the output folder of a run.", **loading: Any
) -> Any:
    """Return the configuration of an INT8 checkpoint, loaded with these arguments.

    Raises:
        FileNotFoundError: `folder` is not a checkpoint folder.
        ValueError: The checkpoint is not INT8, or its config.json does not say so.
    """
    refuse_what_is_no_model(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: it has no config.json. Give the output folder of a run "
            "or one of its checkpoint-<step> folders."
        )
    with explain_loading_errors(folder):
        config = AutoConfig.from_pretrained(folder, **loading)
    method = quantization_method(config)
    if method != QUANT_METHOD:
        refuse_int8(tensor_names(folder.glob("*.safetensors")), of=str(folder))
        raise ValueError(
            f"{folder} does not hold INT8 weights of qft_hf (quant_method is {method!r}, not "
            f"{QUANT_METHOD!r}). {advice}"
        )
    return config


def load_int8(folder: Path, config: Any, **loading: Any) -> Any:
    """Load an INT8 checkpoint of this configuration, of the class that the configuration names.

    Raises:
        ValueError: Weights are missing or damaged, or the class is not known.
    """
    model_class = loading_class(config)
    with explain_loading_errors(folder):
        weight_files(folder)
        return model_class.from_pretrained(folder, **loading)


def _counterpart(
    name: str, weight: QFTWeight, others: dict[str, Any], original: str | None
) -> Tensor | None:
    if original is None:
        return None
    other: Tensor | None = others.get(name)
    if other is None or other.shape != weight.shape:
        came = "nothing" if other is None else f"a parameter of shape {tuple(other.shape)}"
        raise ValueError(
            f"{original} has {came} for {name}, which has shape {tuple(weight.shape)}. Give the "
            "model that the checkpoint was made from."
        )
    return other


def _inspected(name: str, weight: QFTWeight, original: Tensor | None) -> InspectedWeight:
    codes, scales, outliers = weight.codes, weight.scales, weight.outlier_values
    error, largest = None, None
    if original is not None:
        error, largest = _difference(weight, original)
    return InspectedWeight(
        name=name,
        shape=tuple(weight.shape),
        stored_bytes=weight.stored_bytes,
        smallest_scale=scales.min().item(),
        median_scale=scales.median().item(),
        largest_scale=scales.max().item(),
        zero_share=(codes == 0).float().mean().item(),
        saturated_share=(codes.abs() == QMAX).float().mean().item(),
        outlier_share=outliers.numel() / weight.numel(),
        largest_outlier=outliers.abs().max().item() if outliers.numel() else 0.0,
        error=error,
        largest_error=largest,
    )


def _difference(weight: QFTWeight, original: Tensor) -> tuple[float, float]:
    """Return the relative norm of the difference, and the largest difference in scales."""
    squares, norm, largest = 0.0, 0.0, 0.0
    columns = weight.arrangement.columns
    group = weight.group_size or columns
    other: Any = original.detach()
    if not isinstance(other, QFTWeight):
        other = weight.arrangement.matrix(other)
    for rows in weight.row_tiles():
        wanted = (
            other.dequantize_rows(rows, torch.float32)
            if isinstance(other, QFTWeight)
            else other[rows].float()
        )
        difference = weight.dequantize_rows(rows, torch.float32) - wanted
        scales = weight.scales[rows].repeat_interleave(group, dim=1)[:, :columns]
        squares += difference.square().sum().item()
        norm += wanted.square().sum().item()
        largest = max(largest, (difference.abs() / scales).max().item())
    return (squares / norm) ** 0.5 if norm else squares**0.5, largest
