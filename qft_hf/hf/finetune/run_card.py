"""Writes the model card of a run from the files in its output folder."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME

from ..card import is_card, write_card
from ..card_facts import CardFacts
from ..config import QFTConfig
from ..json_object import json_object
from ..remote_code import auto_class
from ..wording import counted
from .output_folder import CARD, SUMMARY, recorded_settings

_COUNTED = ("row", "example", "token")
_OF_SUMMARY = ("architecture", "optimizer", "hyperparameters", "state_bytes", "versions")


def write_run_card(output_dir: Path, **known: Any) -> Path:
    """Write `README.md` into the output folder of a finished run.

    Args:
        output_dir: Output folder of the run.
        **known: Fields of `CardFacts` that the run does not know or that override what it knows,
            such as its license, or the Hub name of the model that it started from.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: The folder holds no finished run.
        FileExistsError: Its `README.md` was not written by qft_hf.
        ValueError: A file of the run is damaged, or from a version of qft_hf whose summary has too
            little for a card.
    """
    path = output_dir / CARD
    if path.exists() and not is_card(path):
        raise FileExistsError(
            f"{path} was not written by qft_hf, and stays as it is. Move it away first."
        )
    facts = facts_of_run(output_dir)
    write_card(path, CardFacts(**{**facts, **known}))
    return path


def facts_of_run(output_dir: Path) -> dict[str, Any]:
    """Return the fields of `CardFacts` that the files of a run contain.

    Raises:
        FileNotFoundError: The folder holds no finished run.
        ValueError: As `write_run_card`.
    """
    summary = _read(output_dir / SUMMARY)
    if "origin" not in summary:
        version = (summary.get("versions") or {}).get("qft_hf")
        raise ValueError(
            f"{output_dir / SUMMARY} is from qft_hf {version}, which recorded less than a card "
            "needs. The card of the run stays as it is."
        )
    side = summary.get("side")
    form: QFTConfig | None = None
    config: dict[str, Any] = {}
    if side is None:
        config, _ = PreTrainedConfig.get_config_dict(output_dir)
        form = QFTConfig.from_dict(config["quantization_config"])
    export = recorded_settings(output_dir).get("export_dtype")
    counts = summary["train_data"]
    return {
        "name": recorded_settings(output_dir).get("hub_model_id") or output_dir.resolve().name,
        "parameters": (summary["parameters"], summary["trained_parameters"]),
        **{name: summary[name] for name in _OF_SUMMARY},
        **summary["origin"],
        "auto_class": auto_class(config),
        "format": form,
        "side": side,
        "history": _read(output_dir / TRAINER_STATE_NAME)["log_history"],
        "counts": ", ".join(counted(counts[f"{noun}s"], noun) for noun in _COUNTED),
        "export_dtype": export if export and (output_dir / export).is_dir() else None,
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file that a finished run has written."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} holds no finished run: it has no {path.name}. Give the output folder "
            "of `qft-hf finetune`."
        )
    try:
        return json_object(path)
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}. The card of the run stays as it is.") from error


def license_of(model: str) -> str | None:
    """Return the license that the card of a model names, None if it names none.

    Args:
        model: A folder, or a name on the Hub, which is queried unless it is in offline mode.
    """
    try:
        path = Path(model) / CARD
        if Path(model).is_dir():
            data = ModelCard.load(path).data if path.is_file() else None
        else:
            data = ModelCard.load(model).data
    except (OSError, ValueError, HfHubHTTPError):  # absent, not readable, or not reachable
        return None
    named = getattr(data, "license", None)
    return named if isinstance(named, str) else None
