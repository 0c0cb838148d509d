"""The command line of a fine-tuning run, and the rows that it reads."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qft_hf.hf.finetune import parse_arguments
from tests.finetune.chats import chat, tiny_tokenizer


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> str:
    """Write one row per line, and return the path as a string."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def leave_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write a tokenizer and conversations, and return the flags of a short run on `folder / model`.

    Args:
        folder: Folder of the files, relative to the current one as the flags shall be.
        **changes: Flags that differ, or that are added.
    """
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"messages": chat("how are you?", "fine, " * n)} for n in range(8)]
    return {
        "model_name_or_path": folder / "model",
        "train_data": write_jsonl(folder / "train.jsonl", rows),
        "eval_data": write_jsonl(folder / "eval.jsonl", rows[:3]),
        "max_length": 48,
        "output_dir": folder / "run",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": "true",
        "disable_tqdm": "true",
        **changes,
    }


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return `--name=value` for each value."""
    return [f"--{name}={value}" for name, value in values.items()]


def parsed(values: Mapping[str, Any], **changes: Any) -> Any:
    """Parse these flags as `qft-hf finetune` does."""
    return parse_arguments(as_flags({**values, **changes}))
