"""Files that ship with the package: configs of runs, chat templates, and architectures."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "configs"


def config_file(name: str) -> Path | None:
    """Return the shipped run config called `name`, with or without `.yaml`; None if absent."""
    path = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    return path if path.parent == FOLDER and path.is_file() else None


def config_names() -> list[str]:
    """Return the names of all shipped run configs."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def chat_template(name: str) -> Path | None:
    """Return the shipped chat template called `name`, or None."""
    path = FOLDER / f"{name.removesuffix('.jinja')}.jinja"
    return path if path.parent == FOLDER and path.is_file() else None


def chat_template_names() -> list[str]:
    """Return the names of all shipped chat templates."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def architecture(name: str) -> Path | None:
    """Return the folder of a shipped architecture, which has a `config.json`, or None."""
    path = FOLDER / "architectures" / name
    return path if path.parent.parent == FOLDER and path.is_dir() else None
