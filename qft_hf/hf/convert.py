"""Convert a model in memory to INT8 and back, with the attributes that transformers reads."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import PRODUCTS
from ..nn import (
    QuantizedModule,
    conversion_plan,
    dequantize_modules_,
    product_choices,
    quantize_modules_,
)
from ..optim import fit_states
from ..side import side_network_of
from .compatibility import has_quantized_weights, quantization_config_of
from .config import QUANT_METHOD, QFTConfig, quantization_method
from .coverage import check_coverage
from .loading_faults import check_finite
from .quantizer import QFTQuantizer
from .tensor_files import memory
from .wording import and_more

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
        _mark(model, config)
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
        RuntimeError: The graph of a forward pass that is still alive uses a weight. The model is
            unchanged.
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


def prepared_for_saving(model: Any, state: dict[str, Tensor] | None) -> Any:
    """Return a transformers model in a form that `save_pretrained` saves so that it can be loaded.

    `config.json`, which is written from the model's configuration, declares whether weights are
    INT8. For a part of an INT8 model, the declaration is missing; for a float model that was made
    from an INT8 model's configuration, it is wrong. It also has to say that embeddings are tied if
    one weight was assigned to both modules, since that weight is written once. transformers saves
    the state dict that a quantizer returns, so the quantizer of the returned model returns `state`
    if that is passed.

    Args:
        model: Any transformers model; not modified. It is returned itself if nothing is wrong.
        state: A state dict to save instead of the model's own; None for its own.

    Raises:
        ValueError: The weights have several formats, or tensors are missing from `state`.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    is_recorded = isinstance(quantizer, QFTQuantizer)
    if side_network_of(model) is not None or (quantizer is not None and not is_recorded):
        return model
    is_int8 = has_quantized_weights(model)
    if is_int8 and _is_tied(model) and not getattr(model.config, "tie_word_embeddings", True):
        model = _with_own_config(model)
        model.config.tie_word_embeddings = True
    says_int8 = quantization_method(model.config) == QUANT_METHOD
    if is_int8 == is_recorded == says_int8 and (state is None or not is_int8):
        return model
    saved = _with_own_config(model)
    if not is_int8:
        vars(saved).pop("hf_quantizer", None)
        vars(saved.config).pop("quantization_config", None)
        return saved
    config = copy.copy(quantization_config_of(model))
    if config is None:
        raise ValueError(
            f"{type(model).__name__} has INT8 weights of several formats, and config.json can hold "
            "only one. Save its parts separately, or save the result of "
            "dequantize_model_(copy.deepcopy(model))."
        )
    if not is_recorded:
        config.forget_absent(model)
        config.int8_products = _products_held(model, config)
    _mark(saved, config)
    if state is not None:
        _check_complete(model, state)
        saved.hf_quantizer.state = state
    return saved


def _is_tied(model: Any) -> bool:
    """Return whether the weight of the output embeddings is that of another module, too."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    owners = [module for module in model.modules() if module._parameters.get("weight") is weight]
    return weight is not None and len(owners) > 1


def _with_own_config(model: Any) -> Any:
    """Return a model with the same modules and a copy of the configuration."""
    copied = copy.copy(model)
    copied.config = copy.copy(model.config)
    return copied


def _products_held(model: nn.Module, config: QFTConfig) -> dict[str, list[str]] | None:
    """Return `int8_products` that select the products which a model's modules are set to."""
    if config.matmul != "int8":
        return None
    plan = conversion_plan(model, config.modules_to_not_convert)
    names = product_choices(model, plan, config)
    return {
        name: [product for product in PRODUCTS if getattr(module.products, product, False)]
        for name, module in plan.modules.items()
        if name in names and isinstance(module, QuantizedModule)
    }


def _check_complete(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raise if tensors of an INT8 model are missing from a state dict that is to be saved."""
    own = model.state_dict()
    there = {memory(own[name]) for name in state if name in own}  # a tied one has several names
    if lacking := [name for name, tensor in own.items() if memory(tensor) not in there]:
        raise ValueError(
            f"state_dict lacks {and_more(lacking)}, and an INT8 checkpoint without them cannot be "
            f"loaded. Pass all that {type(model).__name__}.state_dict() returns; to save float "
            "values, load them into a model after dequantize_model_, and save that."
        )


def _refuse_other_quantization(model: nn.Module, config: QFTConfig) -> None:
    """Raise if `model` is quantized, unless the configuration is the same."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, QFTQuantizer):
        method = getattr(model, "quantization_method", type(quantizer).__name__)
        raise ValueError(
            f"The model is quantized with {getattr(method, 'value', method)}. QFT starts from "
            "float weights: load the model without that quantization."
        )
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
            "call dequantize_model_(model.side_network) first."
        )
    if current != config:
        raise ValueError(
            f"{type(model).__name__} is already quantized with {current or 'several formats'}, and "
            f"{config} was asked for. Keep that configuration, or call dequantize_model_ first. "
            "That does not undo rounding, so it is better to quantize the float model again."
        )


def _mark(model: Any, config: QFTConfig) -> None:
    """Set the attributes that `from_pretrained` sets on a quantized model."""
    model.hf_quantizer = QFTQuantizer(config, pre_quantized=False)
    model.hf_quantizer.save_as_held(model)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
