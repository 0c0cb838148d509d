"""Helpers that compare models bit for bit and damage checkpoints on purpose."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tolerances import assert_same_tensors

IDS = torch.arange(3, 19)[None]


State = nn.Module | dict[str, Tensor]


def assert_same_state(actual: State, expected: State) -> None:
    """Assert that two models or state dicts have the same names, dtypes and bits."""
    assert_same_tensors(
        *(x.state_dict() if isinstance(x, nn.Module) else x for x in (actual, expected))
    )


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Apply `change` to the tensors of `model.safetensors` and rewrite the file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    """Apply `change` to `config.json` and rewrite the file."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def flip_bit(file: Path, name: str, *, byte: int = 0, bit: int = 0) -> None:
    """Flip one bit of a tensor in a safetensors file."""
    content = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + header_bytes])[name]["data_offsets"]
    content[8 + header_bytes + start + byte] ^= 1 << bit
    file.write_bytes(content)
