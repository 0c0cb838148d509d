"""Writes the model card of a run from the files in its output folder."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME

from ..card import is_card, write_card
from ..card_facts import CardFacts
from ..config import QFTConfig
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
        ValueError: The run is from a version of qft_hf whose summary has too little for a card.
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
    summary = read_json(output_dir / SUMMARY)
    side = summary.get("side")
    form: QFTConfig | None = None
    config: dict[str, Any] = {}
    if side is None:
        config, _ = PreTrainedConfig.get_config_dict(output_dir)
        form = QFTConfig.from_dict(config["quantization_config"])
    export = recorded_settings(output_dir).get("export_dtype")
    counts = summary["train_data"]
    if "origin" not in summary:
        raise ValueError(
            f"{output_dir / SUMMARY} is from qft_hf {summary['versions'].get('qft_hf')}, which "
            "recorded less than a card needs. The card of the run stays as it is."
        )
    return {
        "name": recorded_settings(output_dir).get("hub_model_id") or output_dir.resolve().name,
        "parameters": (summary["parameters"], summary["trained_parameters"]),
        **{name: summary[name] for name in _OF_SUMMARY},
        **summary["origin"],
        "auto_class": auto_class(config),
        "format": form,
        "side": side,
        "history": read_json(output_dir / TRAINER_STATE_NAME)["log_history"],
        "counts": ", ".join(counted(counts[f"{noun}s"], noun) for noun in _COUNTED),
        "export_dtype": export if export and (output_dir / export).is_dir() else None,
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file that a finished run has written.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} holds no finished run: it has no {path.name}. Give the output folder "
            "of `qft-hf finetune`."
        )
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


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
