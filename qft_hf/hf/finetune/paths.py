"""Which settings of a run may be paths, and where on this machine they lead."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

INPUTS = (
    "model_name_or_path", "tokenizer_name_or_path", "chat_template", "train_data", "eval_data",
)  # fmt: skip
PATHS = (*INPUTS, "output_dir", "resume_from_checkpoint")
GLOB = "glob:"  # prefix of a pattern; a path without it is never read as one


def expanded(path: str) -> str:
    """Return a path with `~` and `$NAME` expanded as in a shell; an existing path stays as it is.

    Raises:
        ValueError: A variable is not set, so that a folder of its name would be created; or the
            path is empty, and would mean the working directory.
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
            f"the path {path!r} uses the environment variable {absent[0]}, which is not set. Set "
            "it, or write the path out."
        )
    return found


def whole(path: str) -> str:
    """Return an existing path or a pattern as an absolute one; other names, as on the hub, stay."""
    if path.startswith(GLOB):
        return GLOB + os.path.abspath(path.removeprefix(GLOB))
    return os.path.abspath(path) if Path(path).exists() else path


def with_paths(values: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return settings, with `change` applied to those that may be paths or lists of paths."""
    changed = dict(values)
    for name in PATHS:
        if isinstance(value := values.get(name), str):
            changed[name] = change(value)
        elif value is not None:
            changed[name] = [change(path) for path in value]
    return changed
