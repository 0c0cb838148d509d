"""Arguments of a run from a config file and flags: a config is a list of flags, and flags win."""

import json
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .. import shipped
from ..arguments import QFTTrainingArguments
from .arguments import DataArguments, MethodArguments, ModelArguments, OutputArguments
from .foreign_keys import suggestion
from .side_tuning import side_flags

GROUPS: tuple[Any, ...] = (
    ModelArguments,
    MethodArguments,
    DataArguments,
    OutputArguments,
    QFTTrainingArguments,
)
CONFIG_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class RunArguments:
    """Everything that one run is told.

    Attributes:
        model: Which model, and how it is loaded.
        method: What of it is trained.
        data: What is learned and what is held out.
        output: What is written beside what the Trainer writes.
        training: The Trainer's.
        given: What config and flags have set, by name; all else has its default.
    """

    model: ModelArguments
    method: MethodArguments
    data: DataArguments
    output: OutputArguments
    training: QFTTrainingArguments
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        """Where everything is written; the Trainer has filled in its default."""
        return Path(str(self.training.output_dir))


def parse_arguments(argv: Sequence[str], *, description: str | None = None) -> RunArguments:
    """Read `[CONFIG] [--flag value ...]`.

    Args:
        argv: The command line without the program. A config comes first, a YAML file or the name of
            one that ships with the package; flags override it.
        description: Text for `--help`.

    Raises:
        FileNotFoundError: There is no such config.
        ValueError: A key or flag is unknown (names the nearest ones), or a value is not possible.
        SystemExit: `--help`, or argparse refused a value; it has printed why.
    """
    flags = list(argv)
    if flags and not flags[0].startswith("-"):
        flags = [*flags_from_config(find_config(flags[0])), *flags[1:]]
    for name in _names(flags):
        _require_known(name, "flag")
    flags = [*side_flags(flags, _names(flags)), *flags]

    parser = HfArgumentParser(
        GROUPS,
        usage="%(prog)s [CONFIG.yaml] [--flag value ...]",
        description=description,
        allow_abbrev=False,
    )
    *groups, rest = parser.parse_args_into_dataclasses(
        flags, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(
            f"cannot place {' '.join(rest)!r} on the command line. Expected at most one config, "
            "first, then flags with their values: CONFIG.yaml --flag value ..."
        )
    model, method, data, output, training = groups
    return RunArguments(model, method, data, output, training, _given(parser, flags))


def _names(flags: list[str]) -> list[str]:
    """Return the names of flags, without values."""
    return [flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag[:2] == "--"]


def _given(parser: HfArgumentParser, flags: list[str]) -> dict[str, Any]:
    """Return the values of the flags alone, without defaults."""
    for action in parser._actions:
        action.default, action.required = SUPPRESS, False
    return vars(parser.parse_args(flags))


def find_config(name: str) -> Path:
    """Return the YAML file that is meant: one that is there, else one that ships by this name.

    Raises:
        FileNotFoundError: Neither is there.
    """
    path = Path(name)
    if path.suffix in CONFIG_SUFFIXES and path.is_file():
        return path
    shipping = shipped.config_file(name)
    if shipping is None:
        raise FileNotFoundError(
            f"no config {name} (looked from {Path.cwd()}). Give a YAML file, or the name of a "
            f"config that ships: {', '.join(shipped.config_names())}."
        )
    return shipping


def flags_from_config(path: Path) -> list[str]:
    """Return a flat YAML file as flags.

    Raises:
        ValueError: It is not a mapping, a key is unknown, or a value is empty.
    """
    with path.open(encoding="utf-8") as file:
        # Every scalar stays text, and its field gives it a type: YAML itself would take `no` for
        # false and 1e-4 for a string.
        config = yaml.load(file, yaml.BaseLoader)
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} must hold keys and values, one `key: value` a line, got "
            f"{type(config).__name__}."
        )
    flags: list[str] = []
    for key, value in config.items():
        _require_known(str(key), f"key in {path}")
        flags += _as_flags(str(key), value, path)
    return flags


def _as_flags(key: str, value: Any, path: Path) -> list[str]:
    match value:
        case "" | "null" | "~":
            raise ValueError(
                f"key {key!r} in {path} has no value. Give one, or leave the key out for its "
                "default."
            )
        case list():
            return [f"--{key}", *value]
        case dict():
            return [f"--{key}={json.dumps(_typed(value))}"]
        case _:
            return [f"--{key}={value}"]


def _typed(value: Any) -> Any:
    """Return a value in a mapping, which no field gives a type: a number, true, or text."""
    match value:
        case dict():
            return {name: _typed(entry) for name, entry in value.items()}
        case list():
            return [_typed(entry) for entry in value]
    for read in (json.loads, float):  # JSON knows neither .5 nor 1.
        try:
            return read(value)
        except ValueError:
            continue
    return value


def _require_known(name: str, what: str) -> None:
    known = [field.name for group in GROUPS for field in fields(group) if field.init]
    # argparse knows `--help` and, for a switch that is on by default, `--no_<switch>`.
    if name.removeprefix("no_") in known or name in (*known, "help"):
        return
    nearest = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = suggestion(name)
    if hint is None and nearest:
        hint = f"Did you mean {' or '.join(map(repr, nearest))}?"
    raise ValueError(
        f"unknown {what}: {name!r}. {f'{hint} ' if hint else ''}`qft-hf finetune --help-all` lists "
        "all names."
    )
