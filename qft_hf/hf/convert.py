"""A model in memory to INT8 and back, with what transformers wants to know about it."""

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..nn import QuantizedModule, conversion_plan, dequantize_modules_, quantize_modules_
from ..side import SideNetwork
from .config import QUANT_METHOD, QFTConfig
from .coverage import check_coverage
from .loading_faults import check_finite
from .quantizer import QFTQuantizer

Model = TypeVar("Model", bound=nn.Module)


def quantize_model_(model: Model, config: QFTConfig) -> Model:
    """Quantize every `nn.Linear` and `nn.Embedding` of a model in place.

    Tied weights stay tied and parameters keep their identity. A transformers model then is what
    `from_pretrained(..., quantization_config=config)` returns: `save_pretrained` writes INT8. One
    that is quantized with the same `config` already keeps its weights; float modules that were
    added to it since are quantized.

    Args:
        model: Any module; modified.
        config: The storage format.

    Returns:
        `model`.

    Raises:
        ValueError: The model is quantized in another way, has NaN or infinite values (named), holds
            matrices in a class that is not supported, has no weight that can be INT8, or, with
            `config.strict`, too few. The model is unchanged.
    """
    _refuse_other_quantization(model, config)
    plan = conversion_plan(model, config.modules_to_not_convert)
    check_coverage(model, plan, config)
    for kept in plan.kept:
        if not kept.parameter.is_meta:
            check_finite(kept.name, kept.parameter)
    quantize_modules_(model, config)
    if isinstance(model, PreTrainedModel):
        _mark(model, config)
    elif isinstance(model, SideNetwork):
        model.quantization = config
    return model


def dequantize_model_(model: Model, dtype: torch.dtype = torch.bfloat16) -> Model:
    """Give a model plain modules again, in place.

    `save_pretrained` then writes an ordinary checkpoint, for programs without qft_hf too.

    Args:
        model: Any module with quantized weights; modified.
        dtype: Of all parameters afterwards, float ones included.

    Returns:
        `model`.

    Raises:
        ValueError: Nothing is quantized, or `dtype` is not a float type.
    """
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no INT8 weights. To cast it, call model.to({dtype})."
        )
    # Those that carry a record of it, also inside another module, such as one with adapters.
    for module in [m for m in model.modules() if "hf_quantizer" in vars(m)]:
        quantizer: Any = module.hf_quantizer
        if isinstance(quantizer, QFTQuantizer):
            quantizer.dequantize(module, dtype=dtype)
    dequantize_modules_(model, dtype)
    return model


def _refuse_other_quantization(model: nn.Module, config: QFTConfig) -> None:
    """Raise if `model` is quantized, unless with the same configuration."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, QFTQuantizer):
        current = quantizer.quantization_config
        if current != config:
            raise ValueError(
                f"The model is already quantized with {current}, and {config} was asked for. Keep "
                "that configuration, or call dequantize_model_ first; dequantizing cannot bring "
                "back what rounding lost, so rather quantize the float model anew."
            )
    elif quantizer is not None:
        method = getattr(model, "quantization_method", type(quantizer).__name__)
        raise ValueError(
            f"The model is quantized with {getattr(method, 'value', method)}. QFT starts from "
            "float weights: load the model without that quantization."
        )
    elif any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has INT8 weights already, and no record of their QFTConfig. "
            "Keep them, or call dequantize_model_ first."
        )


def _mark(model: Any, config: QFTConfig) -> None:
    """Set what `from_pretrained` sets on a quantized model."""
    model.hf_quantizer = QFTQuantizer(config, pre_quantized=False)
    model.hf_quantizer.save_as_held(model)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
