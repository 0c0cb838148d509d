"""The files that come with the package: configs of runs, and architectures to plan with."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "configs"


def config_file(name: str) -> Path | None:
    """Return the config of a run that ships under this name, or None; `demo` and `demo.yaml`."""
    path = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    return path if path.parent == FOLDER and path.is_file() else None


def config_names() -> list[str]:
    """Return the names of all configs of runs that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def chat_template(name: str) -> Path | None:
    """Return the chat template that ships under this name, or None."""
    path = FOLDER / f"{name.removesuffix('.jinja')}.jinja"
    return path if path.parent == FOLDER and path.is_file() else None


def chat_template_names() -> list[str]:
    """Return the names of all chat templates that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def architecture(name: str) -> Path | None:
    """Return the folder of an architecture that ships, which has a `config.json`, or None."""
    path = FOLDER / "architectures" / name
    return path if path.parent.parent == FOLDER and path.is_dir() else None
