"""`attach_side_network`: freezes a model and makes it train a side network instead."""

import inspect
import logging
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..nn import QuantizedModule, dequantize_modules_
from .config import QSTConfig
from .network import SideNetwork
from .stack import layer_stack
from .trial import try_beside

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger(__name__)

NAME = "side_network"  # name of the module in its model
NEW_ROWS = "_n_new_rows"  # attribute of a model whose embeddings got rows since it was loaded
# Layer arguments that encode positions in sizes of the base: a value for each head, or its width.
BASE_SIZED_ARGUMENTS = ("alibi", "rel_embeddings", "position_bias")
# Settings of families whose layers do not run as narrow layers with one expert, and why. Only those
# that a trial on the meta device does not reveal.
UNFIT_SETTINGS = {
    "input_jitter_noise": "has a router that needs two experts or more",  # PhiMoE
}


def attach_side_network(model: Model, config: QSTConfig | None = None) -> Model:
    """Freeze a model and attach a side network, which is trained instead.

    The model returns the same logits as before until it has been trained: bit for bit, or up to
    rounding if the head of a classifier was INT8. Its base may be float, INT8 of this package, or
    4-bit of bitsandbytes; the base always runs as in evaluation, without dropout. The model keeps
    its class, `generate` and `config`; `save_pretrained` writes only the trained modules, as
    `save_side_network` does.

    The head of a language model stays frozen. Any other head, such as that of a classifier, is
    trained too, in its own dtype; an INT8 head is dequantized to `model.dtype`.

    Args:
        model: A transformers model with a head, on one device, which may be meta; modified.
        config: Configuration of the side network; None: the defaults.

    Returns:
        `model`, with the parameters of the side network in FP32.

    Raises:
        ValueError: No stack of layers is found, the model has a side network or adapters already,
            is on several devices, or the sizes do not fit, or the side network fails in a trial
            with a few tokens. The model is unchanged.
    """
    config = config or QSTConfig()
    any_model: Any = model
    _refuse(model)
    runner, layers = layer_stack(model)
    _refuse_layers(layers, any_model.config)
    heads = trained_heads(model)
    _refuse_heads(heads)
    device = next(layers[0].parameters()).device
    with torch.device(device):
        network = SideNetwork(layers, any_model.config, config).float()
    if device.type != "meta":
        with torch.no_grad():
            for module in network.layers.modules():
                any_model.get_decoder()._init_weights(module)
    try_beside(network, model)
    if n_new := getattr(model, NEW_ROWS, 0):
        logger.warning(
            "%s has %d embeddings that resize_token_embeddings added: they are frozen now and will "
            "not learn, and they are not saved with the side network. If texts have these tokens, "
            "train them first (quantize_model_), save that model and load it as the base",
            type(model).__name__,
            n_new,
        )
    for head in heads.values():
        if any(isinstance(module, QuantizedModule) for module in head.modules()):
            dequantize_modules_(head, any_model.dtype)
    model.requires_grad_(requires_grad=False)
    for head in heads.values():
        head.requires_grad_(requires_grad=True)
    network.frozen = tuple(child for child in model.children() if child not in heads.values())
    network.follow(runner, layers)
    model.add_module(NAME, network)
    model.register_forward_pre_hook(_refuse_call, with_kwargs=True)
    network.train(model.training)
    return model


def side_network_of(model: Any) -> SideNetwork | None:
    """Return the side network of a model; None if it has none."""
    network = getattr(model, NAME, None)
    return network if isinstance(network, SideNetwork) else None


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that side tuning trains, by name: side network, and head if any.

    Raises:
        ValueError: The model has no side network.
    """
    network = side_network_of(model)
    if network is None:
        raise ValueError(
            f"{type(model).__name__} has no side network. Call attach_side_network first."
        )
    return {NAME: network} | trained_heads(model)


def trained_heads(model: Any) -> dict[str, nn.Module]:
    """Return the children of a model other than its base; none for language models."""
    if model.get_output_embeddings() is not None:
        return {}
    beside = {name: child for name, child in model.named_children() if name != NAME}
    return {name: child for name, child in beside.items() if child is not model.base_model}


def side_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that side tuning trains, by full name.

    Raises:
        ValueError: The model has no side network.
    """
    return {
        f"{place}.{name}": parameter
        for place, module in trained_modules(model).items()
        for name, parameter in module.named_parameters()
    }


def _refuse_heads(heads: dict[str, nn.Module]) -> None:
    for place, head in heads.items():
        for name, parameter in head.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{place}.{name} is {parameter.dtype}, but the head of a classifier is trained "
                    f"in float. List {place!r} in llm_int8_skip_modules when you load the model."
                )


def _refuse(model: Any) -> None:
    name = type(model).__name__
    if side_network_of(model) is not None:
        raise ValueError(f"{name} has a side network already. Load the model again for another.")
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{name} has PEFT adapters, which would have to be trained through the base. Merge "
            "them, or attach the side network to the model without them."
        )
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise ValueError(f"A side network needs a model of transformers, got {name}.")
    if model.get_output_embeddings() is None and model.base_model is model:
        raise ValueError(
            f"{name} has no head. Load the model with AutoModelForCausalLM or "
            "AutoModelForSequenceClassification."
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"{name} is on {' and '.join(devices)}, and side tuning runs on one device. Load it "
            'with device_map={"": 0}.'
        )


def _refuse_call(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if the model has got adapters, or the shape of labels does not fit its head.

    Values of labels are not checked.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} has got PEFT adapters beside its side network, which would "
            "stay untrained, as would adapters in the frozen base. Leave peft_config out, or load "
            "the base without a side network."
        )
    labels, ids = kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor):
        return
    name, shape = type(model).__name__, tuple(labels.shape)
    if model.get_output_embeddings() is not None:
        wanted, fits = "one label for each token", shape == tuple(ids.shape)
    elif name.endswith("ForSequenceClassification"):
        wanted = f"one label or {model.config.num_labels} numbers for each text"
        fits = shape in {(len(ids),), (len(ids), 1), (len(ids), model.config.num_labels)}
    else:
        return
    if not fits:
        raise ValueError(
            f"The head of {name} takes {wanted}, got labels of shape {shape} for token ids of "
            f"shape {tuple(ids.shape)}. Load the base with the head for this task: "
            "AutoModelForCausalLM or AutoModelForSequenceClassification."
        )


def _refuse_layers(layers: list[nn.Module], config: Any) -> None:
    for layer in layers:
        wanted = inspect.signature(type(layer).forward).parameters
        found = [name for name in BASE_SIZED_ARGUMENTS if name in wanted]
        if found and getattr(config, found[0], True):
            raise ValueError(
                f"{type(layer).__name__} takes {found[0]}, which does not fit the sizes of a side "
                "network. Choose a model with rotary or learned positions."
            )
        unfit = [reason for name, reason in UNFIT_SETTINGS.items() if hasattr(config, name)]
        if any(_is_state_space(module) for module in layer.modules()):
            unfit = ["has a state space, whose heads have to fill its width"]
        if unfit:
            raise ValueError(
                f"{type(layer).__name__} {unfit[0]}, so it cannot be a layer of a side network. "
                "Train all parameters (method full), or choose another model."
            )


def _is_state_space(module: nn.Module) -> bool:
    """Return whether a module is a mixer of Mamba-2."""
    decay = getattr(module, "A_log", None)
    return isinstance(decay, Tensor) and decay.ndim == 1 and hasattr(module, "D")
