"""Side tuning in a run: the settings that it adds and refuses, and the models that it loads."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...side import QSTConfig, attach_side_network
from ..arguments import FORMAT
from ..base import DEFAULT_BASE, FORMS, base_format, form_of_base, stored_format
from ..estimate import without_storage
from ..missing_model import explain_loading_errors
from ..run_files import RUN_CONFIG, recorded_settings
from ..side_network import CONFIG_NAME, is_side_network, load_side_network, side_description
from .arguments import MethodArguments, ModelArguments
from .loading import load_config, load_model
from .packing import refuse_leaky_packing_family
from .task import Task

# Settings for training every parameter, and why a side network has no use for them.
_OF_FULL = {
    **dict.fromkeys(
        ("gradient", "clipping", "accumulation"),
        "the base has no gradients, and those of the side network are small",
    ),
    **dict.fromkeys(
        FORMAT,
        "an int8 base has the default format; for another format quantize the model, save it, and "
        "give its folder",
    ),
    "chunked_loss": "the head belongs to the frozen base",
    "new_tokens": "the embeddings of the base are frozen, so new ones would learn nothing",
    "export_dtype": "a side network is not part of its base's weights",
}
DEFAULTS = {"optim": "adamw_torch", "learning_rate": 1e-3}


def side_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a side network adds to those that are given; none without one.

    Raises:
        ValueError: A setting is for training every parameter, or an optimizer has no learning rate.
    """
    if given.get("method") != "qst":
        return {}
    for name in given:
        if name in _OF_FULL:
            raise ValueError(
                f"{name} is only for training every parameter, but method qst trains a side "
                f"network: {_OF_FULL[name]}. Leave {name} out, or set method to full."
            )
    if "optim" not in given:
        return DEFAULTS
    if "learning_rate" not in given:
        raise ValueError(
            "a side network starts from random weights, which the default rate, meant for trained "
            f"weights, does not suit. Set learning_rate; that of {DEFAULTS['optim']} is "
            f"{DEFAULTS['learning_rate']}."
        )
    return {}


@dataclass(frozen=True, slots=True)
class SideCheckpoint:
    """A folder with a side network."""

    folder: Path
    base: str  # folder or name on the Hub of the base
    revision: str | None  # of a base on the Hub
    quantization: str | None  # that the base was stored in, as `quantization_name` returns it
    config: QSTConfig  # of the side network
    architecture: str  # class of the base
    labels: dict[int, str] | None  # outputs of the head that was trained with it; None without one
    named_in: str  # key and file that name the base

    @property
    def form(self) -> str:
        """How a float base is to be stored: a value of `MethodArguments.base`.

        Raises:
            ValueError: The base was stored in a format that this package does not make.
        """
        if self.quantization not in FORMS:
            raise ValueError(
                f"{self.folder} holds a side network of a base that {self.quantization} has "
                "quantized. Load the base yourself, and call "
                f"qft_hf.load_side_network(model, {str(self.folder)!r})."
            )
        return FORMS[self.quantization]


def side_checkpoint(place: str | Path) -> SideCheckpoint | None:
    """Return the description of the side network in a folder; None if there is none.

    Raises:
        ValueError: The description is damaged.
    """
    folder = Path(place)
    if not is_side_network(folder):
        return None
    said = side_description(folder)
    base, name, revision = said["base"], said["base"]["name"], None
    named_in = f"base.name in {folder / CONFIG_NAME}"
    for home in (folder.resolve().parent, folder):  # of a checkpoint in a run, or of a run
        run = recorded_settings(home)
        if "model_name_or_path" in run:
            name, revision = run["model_name_or_path"], run.get("model_revision")
            named_in = f"model_name_or_path in {home / RUN_CONFIG}"
    # If the run started from a side network; no name would mean the working directory.
    if name and (earlier := side_checkpoint(name)) is not None:
        name, revision = earlier.base, revision or earlier.revision
        named_in = earlier.named_in
    return SideCheckpoint(
        folder,
        name,
        revision,
        base["quantization"],
        said["config"],
        base["architecture"],
        said["labels"],
        named_in,
    )


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts from, and what the other commands load: a model, or a side network.

    Attributes:
        model: The model, or the base of a side network, with the name and revision that load it.
        config: Configuration of this model. The classes of a head that was trained with a side
            network are those of its folder.
        side: The side network; None for a model.
    """

    model: ModelArguments
    config: PreTrainedConfig
    side: SideCheckpoint | None


def start_of(arguments: ModelArguments) -> Start:
    """Find what the arguments name, and load its configuration.

    Raises:
        FileNotFoundError: The model, or the base of a side network, is not found.
    """
    side = side_checkpoint(arguments.model_name_or_path)
    if side is None:
        return Start(arguments, load_config(arguments), None)
    model = replace(
        arguments,
        model_name_or_path=side.base,
        model_revision=arguments.model_revision or side.revision,
    )
    try:
        config = load_config(model)
    except OSError as error:
        raise FileNotFoundError(
            f"{side.folder} holds a side network of {side.base or 'an unnamed model'}, which is "
            f"neither here (looked from {Path.cwd()}) nor on the hub. Work in the folder where the "
            f"run was started, or set {side.named_in} to the place of the base."
        ) from error
    config.architectures = [side.architecture]
    if side.labels is not None:
        config.id2label = side.labels
        config.label2id = {name: index for index, name in side.labels.items()}
    return Start(model, config, side)


def base_form(method: MethodArguments, start: Start) -> str:
    """Return how the base of a side network is to be stored.

    A quantized base stays as it is. A float base is stored as `method` says, otherwise as the side
    network's folder says, otherwise in NF4.

    Raises:
        ValueError: The base is quantized already, in another format than was asked for.
    """
    form = form_of_base(start.config, method.base, model=start.model.model_name_or_path)
    return form or (start.side.form if start.side else DEFAULT_BASE)


def load_checkpoint(start: Start, model_class: Any) -> Any:
    """Load a model as it is stored, or a side network together with its base.

    Args:
        start: As `start_of` returns it.
        model_class: A class of transformers, such as `AutoModelForCausalLM`.

    Raises:
        ImportError: The base is to be stored in NF4, and bitsandbytes is not installed.
        ValueError: The model cannot be loaded, or the side network was trained on another base.
    """
    place = start.model.model_name_or_path
    how: dict[str, Any] = {"trust_remote_code": start.model.trust_remote_code}
    if start.side is not None and stored_format(start.config) == "float":
        skeleton = without_storage(model_class, start.config, **how)
        how["quantization_config"] = base_format(start.side.form, skeleton)
    with explain_loading_errors(place):
        model = model_class.from_pretrained(
            place, revision=start.model.model_revision, config=start.config, **how
        )
    return model if start.side is None else load_side_network(model, start.side.folder)


def load_side_model(start: Start, method: MethodArguments, task: Task) -> PreTrainedModel:
    """Load a base, and attach a side network: a new one, or the one that the run starts from.

    Args:
        start: What the run starts from; the task's head is written into its configuration.
        method: The side network, and how the base is stored.
        task: Determines the class of the model and its head.

    Raises:
        ImportError: The base is to be stored in NF4, and bitsandbytes is not installed.
        ValueError: As `base_form`, `load_model`, `attach_side_network` and `load_side_network`.
    """
    arguments, config, side = start.model, start.config, start.side
    form = base_form(method, start)
    task.configure(config)
    make, dtype = task.model_class(config), getattr(torch, arguments.dtype)
    how = {"dtype": dtype, "trust_remote_code": arguments.trust_remote_code}
    skeleton = without_storage(make, config, **how)
    # The base itself runs without autograd, which `refuse_leaky_packing` needs.
    if task.arguments.packing and not refuse_leaky_packing_family(
        make, config, torch.device("cpu"), **how
    ):
        raise ValueError(
            f"whether packed examples see each other in a {type(skeleton).__name__} cannot be "
            "checked with a frozen base. Set packing to false."
        )
    quantization = base_format(form, skeleton) if stored_format(config) == "float" else None
    model = load_model(arguments, quantization, config, task, frozen=True)
    if side is not None:
        return load_side_network(model, side.folder)
    return attach_side_network(model, method.side)
