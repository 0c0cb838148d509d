"""Exports an INT8 checkpoint as an ordinary one, which programs without qft_hf can load."""

from pathlib import Path
from typing import Any

import torch

from ..atomic_writes import atomic_path
from ..convert import dequantize_model_
from ..inspection import int8_config, load_int8
from ..side_network import is_side_network
from .loading import read_tokenizer


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype,
    replace: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the model of an INT8 checkpoint with float weights, and its tokenizer.

    Args:
        source: Folder of the INT8 checkpoint; not changed.
        target: Folder to write: absent or empty. It appears only when it is complete.
        dtype: Dtype of all parameters.
        replace: Whether `target` may hold files; they are replaced when the export is complete.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        FileExistsError: `target` is not empty, and `replace` is false.
        FileNotFoundError: `source` is not a checkpoint folder.
        ValueError: `source` is not INT8, or its config.json does not say so; or it holds a side
            network; or its tokenizer cannot be loaded.
    """
    if is_side_network(source):
        raise ValueError(
            f"{source} holds a side network, which is not part of its base's weights, so there is "
            "no ordinary checkpoint of both. Load it with qft_hf.load_side_network."
        )
    if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty. Choose a folder that does not exist yet.")
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = int8_config(source, advice="An ordinary checkpoint needs no export.", **trust)
    has_tokenizer = (source / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(source, **trust) if has_tokenizer else None
    model = dequantize_model_(load_int8(source, config, **trust), dtype)
    with atomic_path(target) as draft:
        model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
