"""Which models and optimizers belong to qft_hf, and which of them work together."""

from dataclasses import asdict, replace
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..nn import QuantizedModule
from ..optim import QFTOptimizer
from ..quant import QFTWeight
from ..side import side_network_of
from .config import QUANT_METHOD, QFTConfig
from .optimizers import OPTIMIZERS, given_options, names, optimizer_name


def has_quantized_weights(model: nn.Module) -> bool:
    """Return whether any parameter of `model` is a `QFTWeight`."""
    return any(isinstance(parameter, QFTWeight) for parameter in model.parameters())


def trained_part(model: nn.Module) -> nn.Module:
    """Return the module that our optimizers train: the side network of a model, or the model."""
    return side_network_of(model) or model


def quantization_config_of(model: Any) -> QFTConfig | None:
    """Return the `QFTConfig` of a model or side network, or one derived from its modules.

    Returns:
        None for a float model, and for a model without a `QFTConfig` whose weights have several
        formats.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD:
        config = QFTConfig.from_dict(config)  # of a model without storage, made from a config.json
    if not isinstance(config, QFTConfig) and side_network_of(model) is None:
        config = config_of_modules(model)
    return config if isinstance(config, QFTConfig) else None


def format_with(model: nn.Module, asked: dict[str, Any]) -> QFTConfig:
    """Return the format of an INT8 model, or the default, with the fields that are asked for."""
    return replace(quantization_config_of(model) or QFTConfig(), **asked)


def config_of_modules(model: nn.Module) -> QFTConfig | None:
    """Return the format of the modules of a model, for a part of an INT8 model or its wrapper."""
    modules = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    specs = {id(module.spec): module.spec for module in modules if module.spec is not None}
    configs = [QFTConfig(**asdict(spec)) for spec in specs.values()]
    for config in configs:
        config.forget_absent(model)  # it may name modules of the whole model that was quantized
    return configs[0] if configs and all(config == configs[0] for config in configs) else None


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def ours(optimizer: Any) -> QFTOptimizer | None:
    """Return one of our optimizers, without Accelerate's wrapper; None for any other optimizer."""
    inner = unwrapped(optimizer)
    return inner if isinstance(inner, QFTOptimizer) else None


def refuse_optimizer(optimizer: Any, args: TrainingArguments) -> None:
    """Raise ValueError if an optimizer that was passed to a Trainer contradicts the arguments."""
    if optimizer is None:
        return
    name = optimizer_name(args)
    if ours(optimizer) is None:
        classes = " or ".join(entry.optimizer_class.__name__ for entry in OPTIMIZERS.values())
        raise ValueError(
            f"optim={name!r} and an optimizer of class {type(optimizer).__name__} were both given. "
            f"Pass no optimizer, or a {classes} on a quantized model."
        )
    if options := given_options(args):
        raise ValueError(
            f"An optimizer was passed, and {', '.join(options)} were set, which only an optimizer "
            f"made by the Trainer reads. Pass no optimizer, or give {type(optimizer).__name__} "
            "these options yourself."
        )


def refuse_foreign_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise TypeError unless a model has one of our optimizers exactly if it trains INT8 weights.

    Frozen INT8 weights, such as those under adapters, allow any optimizer, which never sees them.
    """
    inner = unwrapped(optimizer)
    trained = [
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, QFTWeight) and parameter.requires_grad
    ]
    if trained and ours(inner) is None:
        advice = (
            f"Set optim={names()} and pass no optimizer of your own; or freeze them, as adapters "
            "do: weight.requires_grad_(False)."
        )
        if hasattr(model, "peft_config"):
            advice = (
                "In addition to adapters, only float modules can be trained: list the modules of "
                "modules_to_save in modules_to_not_convert of the QFTConfig."
            )
        raise TypeError(
            f"{len(trained)} INT8 weights ({trained[0]}, ...) are to be trained, and the optimizer "
            f"is {type(inner).__name__}, which cannot update them. {advice}"
        )
    part = trained_part(model)
    if ours(inner) is not None and not has_quantized_weights(part):
        name = "model" if part is model else "model.side_network"
        raise TypeError(
            f"The optimizer is {type(inner).__name__}, and no weight of {type(part).__name__} is "
            f"INT8. Call qft_hf.quantize_model_({name}, QFTConfig()) before training."
        )
