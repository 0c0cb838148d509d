"""Models whose code comes with the checkpoint and runs if `trust_remote_code` is set."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_relative_import_files


def auto_class(config: Mapping[str, Any]) -> str | None:
    """Return the name of the auto class for a model whose code comes with it; None without code.

    Args:
        config: Contents of `config.json`.
    """
    (architecture, *_) = config.get("architectures") or [None]
    for name, place in (config.get("auto_map") or {}).items():
        if isinstance(place, str) and place.rpartition(".")[2] == architecture:
            return str(name)
    return None


def loading_class(config: Any) -> Any:
    """Return the class of transformers whose `from_pretrained` loads a checkpoint.

    Args:
        config: Configuration of the checkpoint.

    Raises:
        ValueError: The class is neither in code that comes with the checkpoint nor in transformers.
    """
    said = vars(config)
    name = auto_class(said) or said["architectures"][0]
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"config.json names the class {name}, which transformers does not have and whose code "
            "does not come with the checkpoint. Load it by from_pretrained of that class in "
            "Python, where qft_hf.dequantize_model_(model).save_pretrained(...) exports it; or "
            "call its register_for_auto_class before it is saved."
        )
    return found


def code_files(folder: Path) -> set[Path]:
    """Return the files with the code that a checkpoint's configurations name, and their imports."""
    found = set()
    for name in ("config.json", "tokenizer_config.json"):
        try:
            places = json.loads((folder / name).read_text(encoding="utf-8"))["auto_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # the file is absent or damaged, or names no code
        for place in places:
            # A tokenizer has a list of two classes, one of which may be absent.
            for of_class in place if isinstance(place, list) else [place]:
                module = folder / f"{str(of_class).rpartition('--')[2].partition('.')[0]}.py"
                if module.is_file():
                    found |= {module, *map(Path, get_relative_import_files(module))}
    return found
