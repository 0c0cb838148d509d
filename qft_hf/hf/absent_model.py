"""A model that is not there: one text for it, wherever a model is loaded by its name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def refused_if_absent(name: str | Path) -> Iterator[None]:
    """Say what to do where a model cannot be loaded in this block.

    Raises:
        FileNotFoundError: There is no such folder, and no such model that the hub lets us see.
        ValueError: The folder lacks a file, or what is there cannot be loaded.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or Path(name, "config.json").is_file():
            raise ValueError(f"{name} cannot be loaded: {error}") from error
        text = (
            f"No model {str(name)!r}: neither a folder with a config.json nor a model that the hub "
            "shows. Check the path, or log in with `hf auth login` if it is gated."
        )
        if str(name).startswith("data/"):
            text += (
                " Configs that ship read models and data from the folder data, which `python "
                "scripts/fetch_demo.py smollm2 chitchat minilm boolq` fills in a clone of qft_hf."
            )
        raise FileNotFoundError(text) from error
