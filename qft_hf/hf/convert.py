"""Convert a model in memory to INT8 and back, with the attributes that transformers reads."""

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..nn import QuantizedModule, conversion_plan, dequantize_modules_, quantize_modules_
from ..optim import fit_states
from ..side import side_network_of
from .compatibility import has_quantized_weights, quantization_config_of
from .config import QUANT_METHOD, QFTConfig, refuse_other_method
from .coverage import check_coverage
from .loading_faults import check_finite
from .quantizer import QFTQuantizer

Model = TypeVar("Model", bound=nn.Module)


def quantize_model_(model: Model, config: QFTConfig) -> Model:
    """Quantize linear layers, embeddings and experts of a model in place; see docs/families.md.

    Tied weights stay tied and parameters keep their identity. A transformers model becomes what
    `from_pretrained(..., quantization_config=config)` returns: `save_pretrained` writes INT8. A
    model that is already quantized with the same `config` keeps its weights; float modules that
    were added to it since are quantized, and so is what an interrupted call has left.

    Args:
        model: Any module; modified.
        config: The storage format.

    Returns:
        `model`.

    Raises:
        ValueError: The model is quantized in another way, has NaN or infinite values (named), holds
            matrices in a class that is not supported, has no weight that can be INT8, or, with
            `config.strict`, too few. The model is unchanged.
        RuntimeError: The graph of a forward pass that is still alive uses a weight. The model is
            unchanged.
    """
    _refuse_other_quantization(model, config)
    plan = conversion_plan(model, config.modules_to_not_convert)
    check_coverage(model, plan, config)
    for kept in plan.kept:
        if not kept.parameter.is_meta:
            check_finite(kept.name, kept.parameter)
    quantize_modules_(model, config)
    for parameter in model.parameters():
        fit_states(parameter)
    if isinstance(model, PreTrainedModel):
        mark_(model, config)
    return model


def dequantize_model_(model: Model, dtype: torch.dtype = torch.bfloat16) -> Model:
    """Replace quantized modules of a model by plain float modules, in place.

    `save_pretrained` then writes an ordinary checkpoint, which programs can load without qft_hf.

    Args:
        model: Any module with quantized weights; modified.
        dtype: Dtype of all parameters afterward, including those that were float.

    Returns:
        `model`.

    Raises:
        ValueError: Nothing is quantized, or `dtype` is not a float type.
        RuntimeError: An operator outside of the weight's module has saved it for backward, or only
            some of its fields were loaded. The model is unchanged.
    """
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no INT8 weights. To cast it, call model.to({dtype})."
        )
    # Models that record their quantization, also inside another module such as one with adapters.
    for module in [m for m in model.modules() if "hf_quantizer" in vars(m)]:
        quantizer: Any = module.hf_quantizer
        if isinstance(quantizer, QFTQuantizer):
            quantizer.dequantize(module, dtype=dtype)
    dequantize_modules_(model, dtype)
    for parameter in model.parameters():
        fit_states(parameter)
    return model


def _refuse_other_quantization(model: nn.Module, config: QFTConfig) -> None:
    """Raise if `model` is quantized, unless the configuration is the same."""
    refuse_other_method(getattr(model, "hf_quantizer", None))
    # A conversion that was interrupted may have left modules whose weights are still float.
    is_begun = any(isinstance(module, QuantizedModule) for module in model.modules())
    if not is_begun and not has_quantized_weights(model):
        return
    current = quantization_config_of(model)
    if current is None and side_network_of(model) is not None:
        raise ValueError(
            f"{type(model).__name__} has an INT8 side network and a float base, which was not "
            "quantized before. Call quantize_model_ before attach_side_network, or "
            "load_side_network into an INT8 base; for a side network of another format, "
            "call dequantize_model_(model.side_network, model.dtype) first."
        )
    if current != config:
        raise ValueError(
            f"{type(model).__name__} is already quantized with {current or 'several formats'}, and "
            f"{config} was asked for. Keep that configuration, or quantize the float model again; "
            "dequantize_model_(model, model.dtype) makes this one float, with its rounding errors."
        )


def mark_(model: Any, config: QFTConfig) -> None:
    """Set the attributes that `from_pretrained` sets on a quantized model."""
    model.hf_quantizer = QFTQuantizer(config, pre_quantized=False)
    model.hf_quantizer.save_as_held(model)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
