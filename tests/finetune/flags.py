"""The command line of a fine-tuning run, and the rows that it reads."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qft_hf.hf.finetune import parse_arguments


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> str:
    """Write one row per line, and return the path as a string."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return `--name=value` for each value."""
    return [f"--{name}={value}" for name, value in values.items()]


def parsed(values: Mapping[str, Any], **changes: Any) -> Any:
    """Parse these flags as `qft-hf finetune` does."""
    return parse_arguments(as_flags({**values, **changes}))
