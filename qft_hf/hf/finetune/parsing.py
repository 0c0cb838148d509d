"""Reads the arguments of a run: a config file is turned into flags, and later flags override it."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import inf, isfinite
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..arguments import QFTTrainingArguments
from ..shipped import shipped_file, shipped_names
from .arguments import DataArguments, MethodArguments, ModelArguments, OutputArguments
from .foreign_keys import suggestion
from .paths import INPUTS, expanded, whole, with_paths
from .side_tuning import side_settings

GROUPS: tuple[Any, ...] = (
    ModelArguments,
    MethodArguments,
    DataArguments,
    OutputArguments,
    QFTTrainingArguments,
)
_KEYS = [field.name for group in GROUPS for field in fields(group) if field.init]
_LISTS = [
    field.name
    for group in GROUPS
    for field in fields(group)
    if str(field.type).startswith("list")  # the parser takes one value for `str | list[str]`
]
NOTHING = ("", "null", "~")  # how YAML writes no value
CONFIG_SUFFIXES = (".yaml", ".yml")
# Settings for which 0 or less would be misread, or would fail later.
_ABOVE_ZERO = (
    "max_train_rows", "max_eval_rows", "preprocessing_workers", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "eval_accumulation_steps",
    "dataloader_prefetch_factor", "ddp_timeout", "num_train_epochs", "max_steps", "logging_steps",
    "eval_steps", "save_steps", "save_total_limit",
)  # fmt: skip
# Arguments of the Trainer that would falsify the scores of a run, and how.
_FALSIFIES = {
    "batch_eval_metrics": "scores are computed from all held-out rows at once",
    "bf16_full_eval": "the score before the first step would leave float parameters in bf16",
    "dataloader_drop_last": "rows of the evaluation would be left out, too",
    "eval_do_concat_batches": "scores are computed from all held-out rows at once",
    "label_names": "labels are always called `labels`",
    "prediction_loss_only": "there would be no scores",
}
# What a flag overrules in a config, in addition to its own key.
_INSTEAD_OF = {
    "eval_data": ("eval_fraction", "eval_split", "eval_config", "max_eval_rows"),
    "eval_fraction": ("eval_data",),
}


@dataclass(frozen=True, slots=True)
class RunArguments:
    """All settings of one run.

    Attributes:
        model: Which model is tuned, and how it is loaded.
        method: What is trained.
        data: What is learned and what is held out.
        output: What is written in addition to the Trainer's files.
        training: Arguments of the Trainer.
        given: Values that the config and flags have set, by name; all others are defaults.
    """

    model: ModelArguments
    method: MethodArguments
    data: DataArguments
    output: OutputArguments
    training: QFTTrainingArguments
    given: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        """The folder that everything is written to; the Trainer has filled in its default."""
        return Path(str(self.training.output_dir))

    @property
    def inputs(self) -> dict[str, str]:
        """What is read and may be a path, by key; several of one key are numbered."""
        values, found = vars(self.model) | vars(self.data), {}
        for key in INPUTS:
            value = values[key] or []
            paths = [value] if isinstance(value, str) else value
            for number, path in enumerate(paths):
                found[f"{key}[{number}]" if len(paths) > 1 else key] = path
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """Values that the config and flags have set, with absolute paths."""
        output_dir = {"output_dir": str(self.output_dir.absolute())}
        return with_paths(self.given, whole) | (output_dir if "output_dir" in self.given else {})


def parse_arguments(argv: Sequence[str], *, command: str = "finetune") -> RunArguments:
    """Read `[CONFIG] [--flag value ...]`.

    Args:
        argv: The command line without the program. A config comes first, a YAML file or the name of
            one that ships with the package; flags override it.
        command: The command of `qft-hf` that errors of argparse name.

    Raises:
        FileNotFoundError: The config does not exist.
        ValueError: A key or flag is unknown (the text names the nearest ones), or a value is
            invalid.
        SystemExit: `--help` was given, or argparse refused a value and has printed why.
    """
    flags = list(argv)
    if flags and not flags[0].startswith("-"):
        overruled = {key for name in _names(flags[1:]) for key in _INSTEAD_OF.get(name, ())}
        flags = [*flags_from_config(find_config(flags[0]), without=overruled), *flags[1:]]
    elif (late := [word for word in flags if word.endswith(CONFIG_SUFFIXES)]) and (
        "model_name_or_path" not in _names(flags)
    ):
        raise ValueError(f"the config must come first, then flags: {late[0]} {flags[0]} ...")
    for name in _names(flags):
        _require_known(name, "flag")
    parser = HfArgumentParser(
        GROUPS,
        prog=f"qft-hf {command}",
        usage="%(prog)s [CONFIG.yaml] [--flag value ...]",
        description="Train every parameter of a model in INT8, or a side network.",
        allow_abbrev=False,
    )
    values, rest = parser.parse_known_args(flags)
    if rest:
        raise ValueError(
            f"cannot place {' '.join(rest)!r} on the command line. Expected at most one config, "
            "first, then flags with their values: CONFIG.yaml --flag value ..."
        )
    names = (name if hasattr(values, name) else name.removeprefix("no_") for name in _names(flags))
    given = {name: getattr(values, name) for name in names}  # without defaults
    given = with_paths(side_settings(given) | _launched(given) | given, expanded)
    _require_possible(given)
    try:
        model, method, data, output, training = parser.parse_dict(given)
    except (ImportError, TypeError, ValueError) as error:  # of transformers, too: for the user
        raise ValueError(str(error)) from error
    if training.mixed_precision == "bf16" and not training.bf16:
        raise ValueError(
            "bf16 is false, and accelerate launch was given --mixed_precision bf16, which would "
            "prevail. Leave bf16 out, or launch with --mixed_precision no."
        )
    return RunArguments(model, method, data, output, training, given)


def _launched(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `accelerate launch` has set and nobody else, so that it is recorded."""
    settings: dict[str, Any] = {}
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" and "bf16" not in given:
        settings["bf16"] = True
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no" and not any(name.startswith("torch_compile") for name in given):
        settings["torch_compile_backend"] = backend
        mode = os.environ.get("ACCELERATE_DYNAMO_MODE", "default")
        settings |= {} if mode == "default" else {"torch_compile_mode": mode}
    return settings


def _names(flags: list[str]) -> list[str]:
    """Return the names of flags, without values."""
    return [flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag[:2] == "--"]


def _require_possible(given: dict[str, Any]) -> None:
    """Raise for a value that transformers would misread, fail on later, or falsify scores by."""
    for name in _ABOVE_ZERO:
        value = given.get(name)
        # -1 is how transformers writes that the number of epochs determines the length
        if value is not None and value <= 0 and (name, value) != ("max_steps", -1):
            raise ValueError(
                f"{name} must be above 0, got {value:g}. Leave it out for its default, which "
                "`qft-hf finetune --help-all` shows."
            )
    for name, value in given.items():
        # With an infinite limit, PyTorch measures the norm and clips nothing.
        measures_alone = (name, value) == ("max_grad_norm", inf)
        if isinstance(value, float) and not isfinite(value) and not measures_alone:
            raise ValueError(
                f"{name} must be a finite number, got {value}. Give one, or leave it out."
            )
    for name in ("dataloader_num_workers", "eval_delay", "neftune_noise_alpha"):
        if given.get(name, 0) < 0:
            raise ValueError(
                f"{name} must be 0 or more, got {given[name]:g}. Leave it out for none."
            )
    if not 0 <= given.get("label_smoothing_factor", 0) < 1:
        raise ValueError(
            "label_smoothing_factor is the share of a label that is spread over all others, in "
            f"[0, 1), got {given['label_smoothing_factor']:g}. Leave it out for none."
        )
    for name in QFTTrainingArguments._VALID_DICT_FIELDS:
        if name == "deepspeed":
            continue  # it is refused in any form, so nobody is told to rewrite its config
        value = given.get(name)
        if value is not None and not _is_mapping(value) and not Path(value).is_file():
            raise ValueError(
                f"{name} takes a mapping of names to values, got {value!r}. Write it in JSON as a "
                f"flag: --{name}='{{\"name\": 1}}'; in a config write a YAML mapping."
            )
    for name, reason in _FALSIFIES.items():
        default = getattr(QFTTrainingArguments, name)
        if given.get(name, default) != default:
            raise ValueError(f"{name} cannot be set: {reason}. Leave it out.")
    if not 0 <= given.get("seed", 0) < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {given['seed']}. Choose another.")


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def find_config(name: str) -> Path:
    """Return the YAML file of this name: an existing one, otherwise one that ships.

    Raises:
        FileNotFoundError: There is neither.
    """
    path = Path(name)
    if path.suffix in CONFIG_SUFFIXES and path.is_file():
        return path
    shipping = shipped_file(name, ".yaml")
    if shipping is None:
        raise FileNotFoundError(
            f"no config {name} (looked from {Path.cwd()}). Give a YAML file, or the name of a "
            f"config that ships: {', '.join(shipped_names('.yaml'))}."
        )
    return shipping


class _Loader(yaml.BaseLoader):
    """Loads every scalar as text, which gets its type from its field.

    YAML itself would read `no` as false and 1e-4 as a string, and keep the last of two equal keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key is not a name", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} occurs more than once", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def flags_from_config(path: Path, *, without: Collection[str] = ()) -> list[str]:
    """Return the settings in a flat YAML file as flags.

    Args:
        path: The file, in UTF-8 or UTF-16.
        without: Keys to leave out.

    Raises:
        ValueError: The file is not YAML or not a mapping, a key is unknown or occurs twice, or a
            value is empty.
    """
    try:
        with path.open("rb") as file:
            config = yaml.load(file, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Expected YAML: one `key: value` per line, each key "
            "once, a space after the colon, and no tabs."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} must hold keys and values, one `key: value` per line, got "
            f"{type(config).__name__}."
        )
    flags: list[str] = []
    for key, value in config.items():
        _require_known(str(key), f"key in {path}")
        flags += _as_flags(str(key), value, path) if key not in without else []
    return flags


def _as_flags(key: str, value: Any, path: Path) -> list[str]:
    match value:
        case str() if value in NOTHING:
            raise ValueError(
                f"key {key!r} in {path} has no value. Give one, or leave the key out for its "
                "default."
            )
        case list() if key not in _LISTS:
            raise ValueError(f"key {key!r} in {path} takes one value, got {value}.")
        case list() if not value or not all(isinstance(v, str) and v not in NOTHING for v in value):
            raise ValueError(f"key {key!r} in {path} takes names or numbers, got {value}.")
        case list():
            return [f"--{key}", *value]
        case dict():
            return [f"--{key}={json.dumps(_typed(value))}"]
        case _:
            return [f"--{key}={value}"]


def _typed(value: Any) -> Any:
    """Return a value in a mapping, for which no field declares a type: a number, true, or text."""
    match value:
        case dict():
            return {name: _typed(entry) for name, entry in value.items()}
        case list():
            return [_typed(entry) for entry in value]
    for read in (json.loads, float):  # JSON accepts neither .5 nor 1.
        try:
            return read(value)
        except ValueError:
            continue
    return value


def _require_known(name: str, what: str) -> None:
    # argparse adds `--help` and, for a switch that is on by default, `--no_<switch>`.
    if name.removeprefix("no_") in _KEYS or name in (*_KEYS, "help"):
        return
    nearest = get_close_matches(name, _KEYS, n=3, cutoff=0.5)
    hint = suggestion(name)
    if hint is None and nearest:
        hint = f"Did you mean {' or '.join(map(repr, nearest))}?"
    raise ValueError(
        f"unknown {what}: {name!r}. {f'{hint} ' if hint else ''}`qft-hf finetune --help-all` lists "
        "all names."
    )
