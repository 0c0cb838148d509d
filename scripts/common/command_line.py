"""The command-line flags that several commands share: one name and one meaning for each."""

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from qft_hf.config import MATMULS

from .shapes import MODELS

T = TypeVar("T")

FLAGS: dict[str, dict[str, Any]] = {
    "device": {"help": "cpu or cuda"},
    "config": {"choices": list(MODELS), "help": "the model's shapes"},
    "layers": {"type": int, "help": "cut the model to this many layers"},
    "hidden": {"type": int, "help": "width of the model"},
    "batch_size": {"type": int, "help": "sequences per batch"},
    "sequence_length": {"type": int, "help": "tokens per sequence"},
    "steps": {"type": int, "help": "training steps"},
    "repeats": {"type": int, "help": "number of measurements of each"},
    "pretraining_steps": {"type": int, "help": "steps before tuning"},
    "seeds": {"type": int, "nargs": "+", "help": "seeds, each an order of the data"},
    "held_out": {"type": int, "help": "held-out sequences to score"},
    "learning_rate": {"type": float, "help": "learning rate of Lion"},
    "adamw_learning_rate": {"type": float, "help": "AdamW's, 3 to 10 times that of Lion"},
    "lora_learning_rate": {"type": float, "help": "that of adapters, 10 times AdamW's"},
    "dtype": {"help": "torch's name of the dtype of all that is not INT8"},
    "matmul": {"choices": MATMULS, "help": "how linear layers multiply"},
    "threads": {"type": int, "help": "CPU threads"},
    "data": {"type": Path, "help": "folder of the fetched assets"},
    "only": {"nargs": "+", "metavar": "WORD", "help": "run only those with a word in the name"},
    "output": {"type": Path, "help": "folder of the report"},
}


def command_line(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with `--output` and the flags of `FLAGS` that are named in `defaults`.

    Args:
        description: The script's docstring.
        defaults: Default by flag. A list means that the flag accepts several values.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output = {"output": Path("runs") / Path(sys.argv[0]).stem}
    for name, default in (output | defaults).items():
        options = {**FLAGS[name], "default": default}
        if isinstance(default, list):
            options["nargs"] = "+"
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            options["help"] += f" (default {shown})"
        parser.add_argument(f"--{name}", **options)
    return parser


def default_device() -> str:
    """Return "cuda" if there is a GPU, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen(ways: Mapping[str, T], words: Iterable[str] | None) -> dict[str, T]:
    """Return the ways whose name contains one of the words; all if no words are given."""
    return {n: way for n, way in ways.items() if not words or any(word in n for word in words)}
