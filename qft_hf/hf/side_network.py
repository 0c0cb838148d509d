"""Saves, checks and loads a side network without its base, and makes transformers do the same.

A folder with a side network holds the trained tensors, a description with the name of the base, and
a card, but not the base itself. As with adapters, `save_pretrained` of a model with a side network
writes only the side network, so the checkpoints of every Trainer hold it and the optimizer's state.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..nn.convert import quantize_modules_
from ..quant import QFTWeight
from ..side import (
    NAME,
    QSTConfig,
    SideNetwork,
    attach_side_network,
    layer_stack,
    side_network_of,
    side_parameters,
    trained_heads,
    trained_modules,
)
from ..version import __version__
from .atomic_writes import atomic_folder
from .base import quantization_name
from .card import CARD, is_card, marked_card
from .compatibility import quantization_config_of
from .config import QFTConfig
from .convert import quantize_model_
from .tensor_files import DAMAGED, damaged, metadata
from .wording import and_more

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS_NAME = "side_network.safetensors"
CONFIG_NAME = "side_network.json"

# What side_network.json says of the base, in all versions.
_FACTS = ("name", "architecture", "config_hash", "vectors_hash", "quantization")

# Fields of a configuration that may differ between two uses of one base.
_OF_A_USE = {
    "_name_or_path", "architectures", "dtype", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "output_router_logits", "problem_type", "quantization_config",
    "return_dict", "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def save_side_network(model: nn.Module, folder: str | Path) -> None:
    """Write the side network of a model, and its head if that is trained: all files or none.

    Args:
        model: Model with a side network. Not modified.
        folder: Created if it does not exist; other files in it stay, and so does a `README.md` that
            was not written by qft_hf.

    Raises:
        ValueError: The model has no side network.
    """
    _write(model, _state(model), Path(folder))


def _write(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Write the tensors of a side network and its description."""
    with atomic_folder(folder) as draft:
        save_file(state, draft / WEIGHTS_NAME, {"format": "pt", **metadata(state)})
        text = json.dumps(_description(model), indent=2, sort_keys=True)
        (draft / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        card = folder / CARD
        if not card.exists() or is_card(card):
            _card(model).save(draft / CARD)


def load_side_network(model: Model, folder: str | Path) -> Model:
    """Give a model the side network in a folder, after checking that it was trained on this base.

    Args:
        model: The base, as `from_pretrained` returns it; modified. If it has a side network of the
            same configuration already, only the values are loaded.
        folder: Folder that `save_side_network` wrote.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: There is no side network in the folder.
        ValueError: The side network belongs to another base or another version of it, or is
            damaged, or the model has one of another configuration. The model is unchanged.
    """
    folder = Path(folder)
    said = whole_description(folder)
    _refuse_another_base(model, said["base"], folder)
    config, quantization = said["config"], said["quantization"]
    network: Any = side_network_of(model)
    _refuse_another_network(network, config, quantization, folder)
    state = load_file(folder / WEIGHTS_NAME)
    _refuse_other_tensors(model, said, state, folder)
    if network is None:
        with torch.random.fork_rng():  # the states of random numbers do not change
            attach_side_network(model, config)
        network = trained_modules(model)[NAME].to(state[f"{NAME}.gates"].dtype)
    if quantization is not None and quantization_config_of(network) is None:
        quantize_model_(network, QFTConfig.from_dict(quantization))
    for place, module in trained_modules(model).items():
        start = f"{place}."
        own = {name.removeprefix(start): state[name] for name in state if name.startswith(start)}
        module.load_state_dict(own)
    if said.get("labels") is not None:
        any_model: Any = model
        any_model.config.id2label = said["labels"]
        any_model.config.label2id = {name: index for index, name in said["labels"].items()}
        # Older folders do not name it.
        any_model.config.problem_type = said.get("problem_type") or any_model.config.problem_type
    return model


def is_side_network(folder: Path) -> bool:
    """Return whether a folder holds a side network."""
    return (folder / CONFIG_NAME).is_file()


def saving_alone(
    save: Any,
    self: Any,
    save_directory: Any,
    is_main_process: bool = True,  # noqa: FBT001, FBT002 transformers' signature
    state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Make saving write only the side network of a model that has one."""
    if side_network_of(self) is None:
        save(self, save_directory, is_main_process, state_dict, *args, **kwargs)
        return
    if kwargs.get("push_to_hub"):
        raise ValueError(
            "save_pretrained(push_to_hub=True) does not support a side network. Call "
            f"model.push_to_hub({str(kwargs.get('repo_id') or save_directory)!r})."
        )
    if is_main_process:
        _write(self, _state(self, state_dict), Path(save_directory))


def loading_alone(load: Any, self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
    """Make resuming load only the side network of a model that has one."""
    wanted = self.model if model is None else model
    if side_network_of(wanted) is None:
        load(self, resume_from_checkpoint, model)
    else:
        load_side_network(wanted, resume_from_checkpoint)


def loading_best(load: Any, self: Any) -> None:
    """Make the end of training load only the best side network."""
    if side_network_of(self.model) is None:
        load(self)
    else:
        load_side_network(self.model, self.state.best_model_checkpoint)


def allowing_side_networks(validate: Any, model: Any) -> None:
    """Allow a side network on a quantized base, which stays frozen."""
    if side_network_of(model) is None:
        validate(model)


def _state(model: nn.Module, passed: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors of the trained modules, by full name, from `passed` if it is given."""
    own = {
        f"{place}.{name}": tensor
        for place, module in trained_modules(model).items()
        for name, tensor in module.state_dict().items()
    }
    if passed is not None and (lacking := [name for name in own if name not in passed]):
        raise ValueError(
            f"state_dict lacks {and_more(lacking)} of the side network. Pass all that "
            f"{type(model).__name__}.state_dict() returns."
        )
    state = own if passed is None else {name: passed[name] for name in own}
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _description(model: Any) -> dict[str, Any]:
    """Return the contents of `side_network.json`."""
    network: Any = side_network_of(model)
    quantization = quantization_config_of(network)
    return {
        "format": 1,
        "qft_hf": __version__,
        "config": asdict(network.config),
        "quantization": None if quantization is None else quantization.to_dict(),
        "labels": model.config.id2label if trained_heads(model) else None,
        "problem_type": model.config.problem_type if trained_heads(model) else None,
        "base": _base(model),
    }


def _base(model: Any) -> dict[str, Any]:
    """Return the facts that identify the base of a model, with or without a side network."""
    return {
        "name": _name(model),
        "architecture": type(model).__name__,
        "config_hash": _config_hash(model.config),
        "vectors_hash": _hash(model, of_dimensions=1),
        "rows_hash": _hash(model, of_dimensions=2),
        "quantization": quantization_name(getattr(model, "hf_quantizer", None)),
    }


def _config_hash(config: Any, *, nested: bool = True) -> str:
    """Return a hash of a configuration without the fields that belong to a use of the model.

    Args:
        config: The configuration.
        nested: Whether these fields are left out of the configurations inside it, too, such as that
            of the text decoder; earlier versions kept them there.
    """

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: kept(value) if nested and isinstance(value, dict) else value
            for name, value in values.items()
            if name not in _OF_A_USE and not name.endswith("_token_id")
        }

    own = config.to_diff_dict()  # new defaults of later versions make no difference
    text = json.dumps(kept(own), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _name(model: Any) -> str:
    """Return the name of the base on the Hub, or the name of its folder."""
    origin = str(getattr(model.config, "_name_or_path", ""))
    return Path(origin).resolve().name if origin and Path(origin).exists() else origin


def _hash(model: Any, *, of_dimensions: int) -> str:
    """Return a hash of the base's float vectors (norms and biases), or of its float matrices.

    Of a matrix, only the first row is hashed. The hash does not depend on the dtype, and that of
    the vectors does not depend on the format of the matrices either.
    """
    trained = tuple(f"{name}." for name in (*trained_heads(model), NAME))
    digest = xxhash.xxh3_64()
    for name, parameter in sorted(model.named_parameters()):
        is_float = parameter.is_floating_point() and not isinstance(parameter, QFTWeight)
        if parameter.ndim == of_dimensions and is_float and not name.startswith(trained):
            digest.update(name.encode())
            row = parameter.detach() if parameter.ndim == 1 else parameter.detach()[0]
            values = row.to("cpu", torch.bfloat16).contiguous()
            digest.update(values.view(torch.int16).numpy())
    return digest.hexdigest()


def whole_description(folder: Path) -> dict[str, Any]:
    """Return what `side_description` returns, after checking the tensors in the same folder.

    Raises:
        FileNotFoundError: There is no side network in the folder.
        ValueError: A file is damaged, or a later version wrote it.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: there is no side network. Name a folder that "
                "save_side_network, save_pretrained or a Trainer has written."
            )
    said = side_description(folder)
    if found := damaged([folder / WEIGHTS_NAME]):
        raise ValueError(f"{found[0]}. {DAMAGED}")
    return said


def side_description(folder: Path) -> dict[str, Any]:
    """Return the contents of `side_network.json`, with its `config` as a `QSTConfig`.

    Raises:
        ValueError: The file is damaged, or a later version wrote it.
    """
    try:
        said: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        known, _ = said["format"], said["qft_hf"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} cannot be read ({error}). {DAMAGED}") from error
    if known != 1:
        raise ValueError(
            f"{folder / CONFIG_NAME} has format {known}, of qft_hf {said.get('qft_hf')}, which "
            f"version {__version__} cannot read. Install that version."
        )
    try:
        said["config"], said["quantization"] = QSTConfig(**said["config"]), said["quantization"]
        labels = said.get("labels")
        said["labels"] = labels and {int(index): name for index, name in labels.items()}
        said["base"] = said["base"] | {name: said["base"][name] for name in _FACTS}
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG_NAME} is not what qft_hf has written ({error!r}). {DAMAGED}"
        ) from error
    return said


def _refuse_another_base(model: Any, wanted: dict[str, Any], folder: Path) -> None:
    found = _base(model)
    if wanted["config_hash"] == _config_hash(model.config, nested=False):
        wanted = {**wanted, "config_hash": found["config_hash"]}  # by an earlier version
    advice = f"Load the base that it was trained on: {wanted['name'] or 'its name is not known'}."
    version = f"another version of {wanted['name'] or 'this base'}"
    differences = {
        "architecture": f"a {wanted['architecture']}, got {found['architecture']}",
        "config_hash": f"another {wanted['architecture']}: the sizes or settings in its "
        f"configuration are not those of {found['name'] or 'this model'}",
        "vectors_hash": f"{version}: its norms and biases have other values",
    }
    is_float = found["quantization"] is None and wanted["quantization"] is None
    if is_float and "rows_hash" in wanted:  # older folders do not have it
        differences["rows_hash"] = f"{version}: its weights have other values"
    for fact, difference in differences.items():
        if found[fact] != wanted[fact]:
            raise ValueError(f"{folder} holds a side network of {difference}. {advice}")
    if found["quantization"] != wanted["quantization"]:
        logger.warning(
            "The side network in %s was trained on a base with quantization %s, and this one has "
            "%s: hidden states differ a little, and so do results",
            folder,
            wanted["quantization"],
            found["quantization"],
        )


def _refuse_another_network(
    network: SideNetwork | None, config: QSTConfig, quantization: Any, folder: Path
) -> None:
    if network is None:
        return
    if network.config != config:
        raise ValueError(
            f"The model has a side network with {network.config}, and {folder} holds one with "
            f"{config}. Load the base again, or attach one of that configuration."
        )
    own = quantization_config_of(network)
    if own is not None and own.to_dict() != quantization:
        raise ValueError(
            f"The side network of the model is INT8 with {own}, and {folder} holds one with "
            f"{quantization or 'float weights'}. Load the base again."
        )


def _refuse_other_tensors(
    model: Any, said: dict[str, Any], state: dict[str, Tensor], folder: Path
) -> None:
    """Raise if the tensors in a folder are not those of the side network that it describes."""
    config, quantization, network = said["config"], said["quantization"], side_network_of(model)
    if network is None or quantization_config_of(network) is None:
        layers = layer_stack(model)[1] if network is None else list(network.layers)
        with torch.device("meta"):
            network = SideNetwork(layers, model.config, config)
        if quantization is not None:
            quantize_modules_(network, QFTConfig.from_dict(quantization))
    wanted = {f"{NAME}.{name}": tensor.shape for name, tensor in network.state_dict().items()}
    for place, head in trained_heads(model).items():
        saved = head.state_dict()
        buffers = {name: value for name, value in head.named_buffers() if name in saved}
        for name, value in (dict(head.named_parameters()) | buffers).items():
            wanted[f"{place}.{name}"] = value.shape
    found = {name: tensor.shape for name, tensor in state.items()}
    wrong = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    for name in wrong:
        if name in found and not name.startswith(f"{NAME}."):
            shape = tuple(wanted[name]) if name in wanted else "none"
            raise ValueError(
                f"{folder} has a head with {name} of shape {tuple(found[name])}, and its shape in "
                f"the model is {shape}. Load the base with the num_labels of the trained head."
            )
    if wrong:
        raise ValueError(
            f"{folder} does not hold the tensors of a side network with {config}: "
            f"{and_more(wrong)} is missing, has another shape, or does not belong to it. qft_hf "
            f"{said['qft_hf']} wrote it, and this is {__version__}. {DAMAGED}"
        )


def _card(model: Any) -> ModelCard:
    """Return a card with metadata for the Hub and an example of loading."""
    base, network = _base(model), side_network_of(model)
    on_hub = bool(base["name"]) and not Path(str(model.config._name_or_path)).exists()
    data = ModelCardData(
        base_model=base["name"] if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="transformers",
        tags=["qft_hf", "qst", "side-tuning"],
    )
    count = sum(parameter.numel() for parameter in side_parameters(model).values())
    place = base["name"] or "PATH_OF_THE_BASE"
    text = f"""\
# A side network for {place}

{count:,} parameters that were trained beside a frozen `{base["architecture"]}` by quantized side
tuning (QST, arXiv:2401.07159), with qft_hf {__version__}: `{network and network.config}`. The base
is not in this folder; it was loaded with quantization `{base["quantization"]}`.

```python
from qft_hf import load_side_network
from transformers import {base["architecture"]}

model = {base["architecture"]}.from_pretrained("{place}")
load_side_network(model, "FOLDER")
```
"""
    return marked_card(data, text)
