"""The files by which other commands learn about a run: its settings, its log and its results."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..version import __version__
from .atomic_writes import atomic_path
from .json_object import json_object

logger = logging.getLogger(__name__)

RUN_CONFIG = "run.yaml"
SUMMARY = "summary.json"
# Settings that run.yaml leaves out: two that belong to one start of a run, and a secret.
_OF_A_PROCESS = ("resume_from_checkpoint", "overwrite_output", "hub_token")


def record_settings(output_dir: Path, given: Mapping[str, Any]) -> None:
    """Write the settings of the run to `run.yaml`, which is its first file.

    `qft-hf finetune <output_dir>/run.yaml` repeats the run.

    Args:
        output_dir: Output folder; created if it does not exist.
        given: Keys and values that were set; all others have their defaults.

    Raises:
        OSError: The folder cannot be written to.
    """
    values = {key: _plain(value) for key, value in given.items() if key not in _OF_A_PROCESS}
    before = recorded_settings(output_dir)
    if before == values:
        return  # a resumed run
    if before:
        changed = [key for key in before | values if before.get(key) != values.get(key)]
        logger.warning(
            "the run in %s continues with other settings than before: %s. Its result is not that "
            "of a run with one set of settings. %s has the new ones",
            output_dir,
            "; ".join(f"{key} {_shown(values, key)}, was {_shown(before, key)}" for key in changed),
            RUN_CONFIG,
        )
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with atomic_path(output_dir / RUN_CONFIG) as draft:
        draft.write_text(f"# qft_hf {__version__}: the settings of this run.\n{text}", "utf-8")


def recorded_settings(output_dir: Path) -> dict[str, Any]:
    """Return the settings in the folder's `run.yaml`, none if it is absent or damaged."""
    try:
        return _settings(output_dir / RUN_CONFIG)
    except (OSError, ValueError):
        return {}


def file_of_run(output_dir: Path, name: str) -> dict[str, Any]:
    """Return the contents of a file that a finished run has written, in JSON or YAML.

    Raises:
        FileNotFoundError: The folder has no such file.
        ValueError: The file is damaged.
    """
    path = output_dir / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{output_dir} holds no finished run: it has no {name}. Give the output folder of "
            "`qft-hf finetune`."
        )
    try:
        return _settings(path) if name == RUN_CONFIG else json_object(path)
    except ValueError as error:
        raise ValueError(f"{output_dir}: {error}") from error


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} does not hold keys with values")
    return content


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "by default"


def _plain(value: Any) -> Any:
    """Return a value in types that YAML has: members of enumerations become text."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)
