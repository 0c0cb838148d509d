"""What `save_pretrained` writes of a model: a configuration and tensors that fit each other."""

import copy
import logging
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..config import PRODUCTS, names_module
from ..nn import QuantizedModule, conversion_plan, own_weights, prepare_modules_, product_choices
from ..quant import QFTWeight
from .compatibility import has_quantized_weights, quantization_config_of
from .config import QUANT_METHOD, QFTConfig, quantization_method
from .convert import mark_
from .coverage import added_modules
from .quantizer import QFTQuantizer
from .tensor_files import memory
from .wording import and_more

logger = logging.getLogger(__name__)


def prepared_for_saving(model: Any, state: dict[str, Tensor] | None) -> Any:
    """Return a transformers model in a form that `save_pretrained` saves so that it can be loaded.

    `config.json`, which is written from the model's configuration, declares whether weights are
    INT8. For a part of an INT8 model, the declaration is missing; for a float model that was made
    from an INT8 model's configuration, it is wrong. It also has to say that embeddings are tied if
    one weight was assigned to both modules, since that weight is written once, and which modules of
    an INT8 model are float. transformers saves the state dict that a quantizer returns, so the
    quantizer of the returned model returns `state` if that is passed.

    Args:
        model: Any transformers model without a side network. It is returned itself if its
            configuration needs no change, except for the names of float modules, which it gets.
        state: A state dict to save instead of the model's own; None for its own.

    Raises:
        ValueError: The weights have several formats, or tensors are missing from `state`.
        RuntimeError: Only some fields of a weight were loaded, and `state` is None.
    """
    for name, parameter in model.named_parameters() if state is None else ():
        if isinstance(parameter, QFTWeight):
            parameter.check_complete(name)
    saved = _declared(model, state)
    is_int8 = isinstance(getattr(saved, "hf_quantizer", None), QFTQuantizer)
    if is_int8 and not getattr(saved, "_hf_peft_config_loaded", False):  # not only its adapters
        _record_floats_(saved)
    return saved


def _declared(model: Any, state: dict[str, Tensor] | None) -> Any:
    """Return a model, or a copy whose configuration says truly whether it is INT8 and tied."""
    quantizer = getattr(model, "hf_quantizer", None)
    is_recorded = isinstance(quantizer, QFTQuantizer)
    if quantizer is not None and not is_recorded:
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
        raise _several_formats(model)
    if not is_recorded:
        config.forget_absent(model)
        config.int8_products = _products_held(model, config)
    mark_(saved, config)
    if state is not None:
        _check_complete(model, state)
        saved.hf_quantizer.state = state
    return saved


def _several_formats(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} has INT8 weights of several formats, and config.json can hold "
        "only one. Save its parts separately, or save the result of "
        "dequantize_model_(copy.deepcopy(model))."
    )


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


def _record_floats_(model: Any) -> None:
    """List exactly the modules that are float, such as a new head, in the configuration.

    A checkpoint is read according to its configuration; otherwise loading would require INT8 fields
    of modules that were added. A module that is tied to an INT8 weight becomes a quantized one.
    """
    config = copy.copy(model.hf_quantizer.quantization_config)
    absent = config.forget_absent(model)  # such as modules of a layer that was removed
    quantized = {n: m.spec for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    formats = {(spec.group_size, spec.outlier_fraction) for spec in quantized.values() if spec}
    if formats - {(config.group_size, config.outlier_fraction)}:
        raise _several_formats(model)
    listed = config.modules_to_not_convert or []
    # Some were float at an earlier save, and are INT8 now.
    floats = [entry for entry in listed if not any(names_module(entry, n) for n in quantized)]
    modules = added_modules(model, replace(config, modules_to_not_convert=floats or None))
    weights = {name: own_weights(model.get_submodule(name)).values() for name in modules}
    added = [n for n in modules if any(type(weight) is nn.Parameter for weight in weights[n])]
    if absent or listed != [*floats, *added]:
        config = replace(config, modules_to_not_convert=[*floats, *added] or None)
    model.hf_quantizer.quantization_config = model.config.quantization_config = config
    if added:
        logger.warning(
            "%s, added to the INT8 %s, is saved as float: modules_to_not_convert lists it now. To "
            "make it INT8, call quantize_model_ on the module itself",
            ", ".join(added),
            type(model).__name__,
        )
    if modules != added:  # the other modules are tied to INT8 weights
        prepare_modules_(model, config)
