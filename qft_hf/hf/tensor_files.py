"""The safetensors files of a model: names of tensors, and check sums in the metadata.

A flipped bit turns a code into another valid code, which only a check sum detects. Each file of a
checkpoint has the check sums of all its tensors, so a shard of another checkpoint is detected too.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

logger = logging.getLogger(__name__)

KEY = "qft_checksums"  # key in the metadata; the value is JSON, by name of the tensor
SWITCH = "QFT_CHECKSUMS"  # environment variable; 0 loads without comparing check sums

DAMAGED = (
    "It is damaged, or was cut off when it was copied or saved: copy it again, or load an earlier "
    "checkpoint."
)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the XXH3 hash of bytes, dtype and shape of each tensor: 16 hexadecimal digits."""
    known: dict[Any, str] = {}  # a tied tensor is read once
    return {
        name: known.get(identity := memory(tensor)) or known.setdefault(identity, _sum(tensor))
        for name, tensor in tensors.items()
    }


def metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata for each file that holds some of these tensors: check sums of all."""
    return {KEY: json.dumps(checksums(tensors))}


def tensor_names(files: Iterable[str | Path]) -> list[str]:
    """Return the names in the headers of safetensors files; other files are skipped.

    Raises:
        ValueError: A file cannot be read.
    """
    return [name for file in _safetensors(files) for name in _opened(file).keys()]


def damaged(files: Sequence[str | Path]) -> list[str]:
    """Return the faults of the tensors in the safetensors files of one checkpoint, by name.

    Files without check sums, as written by earlier versions, cannot be checked.

    Raises:
        ValueError: A file cannot be read.
    """
    if os.environ.get(SWITCH) == "0":
        places = ", ".join(map(str, files))
        logger.warning("%s=0: check sums of %s are not compared", SWITCH, places)
        return []
    wanted: dict[str, str] = {}
    found: list[str] = []
    for file in _safetensors(files):
        for name, value in _listed(file).items():
            if wanted.setdefault(name, value) != value:
                return [f"{file} and another of {len(files)} are shards of two checkpoints"]
    for file in _safetensors(files) if wanted else []:
        tensors = _opened(file)
        found += [
            f"{name} in {file} is not what was saved"
            for name in tensors.keys()
            if name in wanted and _sum(tensors.get_tensor(name)) != wanted[name]
        ]
    return found


def memory(tensor: Any) -> Any:
    """Return a key that tied tensors share."""
    if not isinstance(tensor, Tensor):
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def _sum(tensor: Tensor) -> str:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy(force=True)  # on the CPU, detached
    digest = xxhash.xxh3_64(data)  # type: ignore[arg-type]  # numpy arrays are buffers
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    return digest.hexdigest()


def _safetensors(files: Iterable[str | Path]) -> list[str]:
    return [name for name in map(str, files) if name.endswith(".safetensors")]


def _opened(file: str) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        if os.path.exists(file) and not os.access(file, os.R_OK):  # safetensors calls it missing
            raise ValueError(
                f"{file} may not be read. Ask its owner for permission, or copy it."
            ) from error
        raise ValueError(f"{file} cannot be read ({error}). {DAMAGED}") from error


def _listed(file: str) -> dict[str, str]:
    """Return the check sums in a file; empty if an earlier version wrote it."""
    text = (_opened(file).metadata() or {}).get(KEY, "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{KEY} of {file} cannot be read ({error}). {DAMAGED}") from error
