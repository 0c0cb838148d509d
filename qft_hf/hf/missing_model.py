"""One error text for a model that cannot be found, wherever a model is loaded by its name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .checkpoint import weight_files
from .run_files import RUN_CONFIG
from .side_network import is_side_network


@contextmanager
def explain_loading_errors(name: str | Path, *, advice: str = "") -> Iterator[None]:
    """Raise an error that says what to do if a model cannot be loaded in this block.

    Args:
        name: Folder, or name on the hub.
        advice: Appended to the error if the model exists and cannot be loaded.

    Raises:
        FileNotFoundError: Neither a folder with a config.json nor a model visible on the hub has
            this name.
        ValueError: The model cannot be loaded, or the path holds something other than a model.
    """
    try:
        yield
    except (ImportError, OSError, ValueError) as error:  # an attention kernel may be missing
        refuse_what_is_no_model(Path(name), cause=error)
        is_model = Path(name, "config.json").is_file()
        if is_model or (not isinstance(error, OSError) and not Path(name).is_dir()):
            raise ValueError(f"{name} cannot be loaded: {error}{advice}") from error
        text = (
            f"No model {str(name)!r}: neither a folder with a config.json nor a model visible on "
            "the hub. Check the path, or log in with `hf auth login` if it is gated."
        )
        if str(name).startswith("data/"):
            text += (
                " Configs that ship with qft_hf read the folder data, which `python scripts/"
                "fetch_demo.py smollm2 chitchat minilm boolq` fills in a clone of qft_hf."
            )
        raise FileNotFoundError(text) from error
    except (AttributeError, KeyError, TypeError) as error:
        if Path(name, SAFE_WEIGHTS_INDEX_NAME).is_file():  # transformers does not check it
            try:
                weight_files(Path(name))
            except ValueError as fault:
                raise ValueError(f"{name} cannot be loaded: {fault}{advice}") from error
        raise


def refuse_what_is_no_model(place: Path, *, cause: Exception | None = None) -> None:
    """Raise ValueError, because of `cause`, if a path that may not be a model is known as other."""
    if other := _what_else(place):
        raise ValueError(f"{place} {other}") from cause


def _what_else(place: Path) -> str | None:
    """Return what a path mistaken for a model is, and what to do; None if it may be a model."""
    if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
        return (
            "holds a PEFT adapter and no model. Merge it into its base with merge_and_unload() and "
            "save_pretrained(), and pass that folder."
        )
    if place.suffix == ".gguf" or (
        next(place.glob("*.gguf"), None) and not any(place.glob("*.safetensors"))
    ):
        return (
            "is in GGUF, which cannot be trained. Convert it once: load it with from_pretrained("
            "FOLDER, gguf_file=NAME) of AutoModelForCausalLM and of AutoTokenizer, and call "
            "save_pretrained()."
        )
    if is_side_network(place):
        return (
            "holds a side network without the model beside which it was trained. Pass that model."
        )
    if snapshots := sorted(place.glob("snapshots/*/config.json")):
        return (
            "is where the hub's cache keeps all versions of a model. Pass the folder of one, such "
            f"as {snapshots[-1].parent}."
        )
    if (place / RUN_CONFIG).is_file() and not (place / "config.json").is_file():
        return (
            "is of a run that has not finished, and has no model yet. Resume the run with "
            "--resume_from_checkpoint true, or pass one of its checkpoint-<step> folders."
        )
    return "is a file. Pass the folder that it is in." if place.is_file() else None
