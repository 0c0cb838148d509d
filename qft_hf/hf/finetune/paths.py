"""What of a run's settings may be a path, and where on this machine that is."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

INPUTS = (
    "model_name_or_path",
    "tokenizer_name_or_path",
    "chat_template",
    "train_data",
    "eval_data",
)
PATHS = (*INPUTS, "output_dir", "resume_from_checkpoint")
GLOB = "glob:"  # before a pattern; a path without it is a path, whatever its characters are


def expanded(path: str) -> str:
    """Return a path with `~` and `$NAME` in place, as a shell does it; what is there is left alone.

    Raises:
        ValueError: There is no such variable: a folder of its name would be made. Or it is empty,
            and would be the folder that one works in.
    """
    if path.startswith(GLOB):
        return GLOB + expanded(path.removeprefix(GLOB))
    if not path.strip():
        raise ValueError("a path is empty. Is it a variable that is not set? Write the path out.")
    if Path(path).exists():
        return path
    found = os.path.expanduser(os.path.expandvars(path))
    if absent := re.search(r"\$(\w+|\{.*?\})", found):
        raise ValueError(
            f"the path {path!r} has the environment variable {absent[0]}, which is not set. Set "
            "it, or write the path out."
        )
    return found


def whole(path: str) -> str:
    """Return a path that means the same in any folder, or a name on the hub as it is."""
    if path.startswith(GLOB):
        return GLOB + os.path.abspath(path.removeprefix(GLOB))
    return os.path.abspath(path) if Path(path).exists() else path


def with_paths(values: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return settings with those that may be paths changed, one or a list of them."""
    return {
        name: value
        if name not in PATHS or value is None
        else change(value)
        if isinstance(value, str)
        else [change(path) for path in value]
        for name, value in values.items()
    }


def inputs(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what may be a path of what is read, by its key, numbered if there are several."""
    found = {}
    for key in INPUTS:
        value = values.get(key) or []
        paths = [value] if isinstance(value, str) else value
        for number, path in enumerate(paths):
            found[f"{key}[{number}]" if len(paths) > 1 else key] = path
    return found
