"""Writes the model card of a run from the files in its output folder."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME

from ..card import CARD, SIDE_TAGS, TAGS, is_card, write_card
from ..card_facts import CardFacts
from ..config import QFTConfig
from ..json_object import json_object
from ..missing_model import explain_loading_errors
from ..remote_code import auto_class
from ..run_files import SUMMARY, file_of_run, recorded_settings
from ..wording import counted

logger = logging.getLogger(__name__)

_OUR_TAGS = {*TAGS, *SIDE_TAGS, "qft_hf"}
_COUNTED = ("row", "example", "token")
_OF_SUMMARY = ("architecture", "optimizer", "hyperparameters", "state_bytes", "versions")


def write_run_card(output_dir: Path, known: Mapping[str, Any]) -> Path:
    """Write `README.md` into the output folder of a finished run.

    Args:
        output_dir: Output folder of the run.
        known: Fields of `CardFacts` that the run does not know or that override what it knows, such
            as its license, or the Hub name of the model that it started from; None is left out.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: The folder holds no finished run.
        FileExistsError: Its `README.md` was not written by qft_hf, or its text was changed since.
        ValueError: A file of the run is damaged, or from a version of qft_hf whose summary has too
            little for a card.
    """
    path = output_dir / CARD
    if path.exists() and not is_card(path):
        raise FileExistsError(
            f"{path} was not written by qft_hf, or its text was changed since, so it stays as it "
            "is. Move it away first, and then what you wrote into the new one."
        )
    facts = facts_of_run(output_dir)
    facts |= {key: value for key, value in known.items() if value is not None}
    if known.get("datasets"):
        facts["files"] = []  # the same data, by their paths on this machine
    write_card(path, CardFacts(**facts))
    return path


def facts_of_card(output_dir: Path) -> dict[str, Any]:
    """Return the fields of `CardFacts` that the user has added to the card of a run."""
    path = output_dir / CARD
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s cannot be read, so nothing of it is kept: %s", path, error)
        return {}
    try:
        own = json_object(output_dir / SUMMARY)["origin"]
    except (ValueError, KeyError):
        own = {}
    found: dict[str, Any] = {}
    for key in ("license", "base_model"):
        value = data.get(key)
        if isinstance(value, str) and value != own.get(key):
            found[key] = value
    for key in ("language", "datasets", "tags"):
        values = data.get(key) or []
        values = [values] if isinstance(values, str) else list(values)
        if key == "tags":
            values = [tag for tag in values if tag not in _OUR_TAGS]
        if values and values != own.get(key):
            found[key] = values
    return found


def facts_of_run(output_dir: Path) -> dict[str, Any]:
    """Return the fields of `CardFacts` that the files of a run contain.

    Raises:
        FileNotFoundError: The folder holds no finished run.
        ValueError: As `write_run_card`.
    """
    try:
        summary, state = (file_of_run(output_dir, name) for name in (SUMMARY, TRAINER_STATE_NAME))
    except ValueError as error:
        raise ValueError(f"{error}. The card of the run stays as it is.") from error
    try:
        return _facts(output_dir, summary, state)
    except (KeyError, TypeError, AttributeError) as error:
        versions = summary.get("versions")
        known = versions.get("qft_hf") if isinstance(versions, dict) else None
        version = known or "of another program"
        raise ValueError(
            f"{output_dir / SUMMARY} (qft_hf {version}) or {TRAINER_STATE_NAME} records less than "
            f"a card needs ({error}). The card of the run stays as it is."
        ) from error


def _facts(output_dir: Path, summary: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    origin, side = summary["origin"], summary.get("side")
    form: QFTConfig | None = None
    config: dict[str, Any] = {}
    if side is None:
        with explain_loading_errors(output_dir):
            config, _ = PreTrainedConfig.get_config_dict(output_dir)
        if "quantization_config" not in config:
            raise ValueError(
                f"{output_dir} holds no INT8 weights: its config.json has no quantization_config. "
                "The card of the run stays as it is."
            )
        form = QFTConfig.from_dict(config["quantization_config"])
    settings = recorded_settings(output_dir)
    export = settings.get("export_dtype")
    counts = summary["train_data"]
    return {
        "name": settings.get("hub_model_id") or output_dir.resolve().name,
        "parameters": (summary["parameters"], summary["trained_parameters"]),
        **{name: summary[name] for name in _OF_SUMMARY},
        **origin,
        "auto_class": auto_class(config),
        "format": form,
        "side": side,
        "history": state["log_history"],
        "counts": ", ".join(counted(counts[f"{noun}s"], noun) for noun in _COUNTED),
        "export_dtype": export if export and (output_dir / export).is_dir() else None,
    }


def license_of(model: str) -> str | None:
    """Return the license that the card of a model names, None if it names none.

    Args:
        model: A folder, or a name on the Hub, which is queried unless it is in offline mode.
    """
    try:
        path = Path(model)
        named = ModelCard.load(path / CARD if path.is_dir() else model).data.get("license")
    except (OSError, ValueError, yaml.YAMLError, HfHubHTTPError):
        # Absent, not readable, or not reachable.
        return None
    return named if isinstance(named, str) else None
