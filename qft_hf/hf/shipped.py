"""Files that ship with the package: configs of runs, chat templates, and architectures."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "configs"


def shipped_file(name: str, suffix: str) -> Path | None:
    """Return the shipped file called `name`, with or without its suffix; None if absent.

    Args:
        name: Name of a run config or a chat template.
        suffix: `.yaml` for a run config, `.jinja` for a chat template.
    """
    path = FOLDER / f"{name.removesuffix(suffix)}{suffix}"
    return path if path.parent == FOLDER and path.is_file() else None


def shipped_names(suffix: str) -> list[str]:
    """Return the names of all shipped files with a suffix."""
    return sorted(path.stem for path in FOLDER.glob(f"*{suffix}"))


def architecture(name: str) -> Path | None:
    """Return the folder of a shipped architecture, which has a `config.json`, or None."""
    path = FOLDER / "architectures" / name
    return path if path.parent.parent == FOLDER and path.is_dir() else None
