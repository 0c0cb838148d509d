"""Comparing models bit for bit, and damaging checkpoints on purpose."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

IDS = torch.arange(3, 19)[None]


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    """Same names, dtypes and bits."""
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=lambda m, n=name: n + m)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite `model.safetensors` with what `change` did to its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    """Rewrite `config.json` with what `change` did to it."""
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
