"""Which models and optimizers are ours, and which of them go together."""

from dataclasses import fields
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..config import QuantizationSpec
from ..nn import QuantizedModule
from ..quant import QFTWeight
from ..side import SideNetwork, side_network_of
from .config import QFTConfig
from .optimizers import OPTIMIZERS, given_options, is_ours, names, optimizer_name


def has_quantized_weights(model: nn.Module) -> bool:
    """Whether any parameter of `model` is a `QFTWeight`."""
    return any(isinstance(parameter, QFTWeight) for parameter in model.parameters())


def trained_part(model: nn.Module) -> nn.Module:
    """What one of our optimizers trains in INT8: the side network of a model, or all of it."""
    return side_network_of(model) or model


def quantization_config_of(model: Any) -> QFTConfig | None:
    """The `QFTConfig` of a model or side network: the one that it carries, or that of its modules.

    None for a float model, and for one with weights of several formats that carries none.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(model, SideNetwork):
        config = model.quantization
    elif not isinstance(config, QFTConfig) and side_network_of(model) is None:
        config = _config_of_modules(model)
    return config if isinstance(config, QFTConfig) else None


def _config_of_modules(model: nn.Module) -> QFTConfig | None:
    """How the modules of a part of an INT8 model were quantized, or of a module around one."""
    modules = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    specs = {id(module.spec): module.spec for module in modules if module.spec is not None}
    configs = [
        QFTConfig(**{field.name: getattr(spec, field.name) for field in fields(QuantizationSpec)})
        for spec in specs.values()
    ]
    for config in configs:
        config.forget_absent(model)  # its names are those in the model that was quantized
    return configs[0] if configs and all(config == configs[0] for config in configs) else None


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper, or itself."""
    return getattr(optimizer, "optimizer", optimizer)


def refuse_optimizer(optimizer: Any, args: TrainingArguments) -> None:
    """Raise if an optimizer that the user passes to a Trainer cannot be what the run needs.

    Raises:
        ValueError: It is of another library, or `args` sets options that it would not see.
    """
    if optimizer is None:
        return
    name = optimizer_name(args)
    if not is_ours(optimizer):
        classes = " or ".join(entry.optimizer_class.__name__ for entry in OPTIMIZERS.values())
        raise ValueError(
            f"optim={name!r} and an optimizer of class {type(optimizer).__name__} were both given. "
            f"Pass no optimizer, or a {classes} on a quantized model."
        )
    if options := given_options(args):
        raise ValueError(
            f"An optimizer was passed, and {', '.join(options)} were set for one that the Trainer "
            f"makes. Pass no optimizer, or give {type(optimizer).__name__} these options yourself."
        )


def refuse_foreign_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise unless INT8 weights that are trained and one of our optimizers go together.

    Frozen ones, such as those under adapters, may have any optimizer: it never sees them.

    Raises:
        TypeError: INT8 weights under another optimizer, or a float model under one of ours.
    """
    inner = unwrapped(optimizer)
    trained = [
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, QFTWeight) and parameter.requires_grad
    ]
    if trained and not is_ours(inner):
        advice = (
            f"Set optim={names()} and pass no optimizer of your own; or freeze them, as adapters "
            "do: weight.requires_grad_(False)."
        )
        if hasattr(model, "peft_config"):
            advice = (
                "Beside adapters only float modules can be trained: list those of modules_to_save "
                "in modules_to_not_convert of the QFTConfig."
            )
        raise TypeError(
            f"{len(trained)} INT8 weights ({trained[0]}, ...) are to be trained, and the optimizer "
            f"is {type(inner).__name__}, which cannot update them. {advice}"
        )
    part = trained_part(model)
    if is_ours(inner) and not has_quantized_weights(part):
        raise TypeError(
            f"The optimizer is {type(inner).__name__}, and no weight of {type(part).__name__} is "
            "INT8. Call qft_hf.quantize_model_(model, QFTConfig()) before training."
        )
