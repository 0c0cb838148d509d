"""Scripts as `python scripts/<folder>/<name>.py` finds them: beside their neighbours."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = {
    path.stem: path
    for path in sorted(SCRIPTS.rglob("*.py"))
    if path.parent.name != "common" and path.stem not in ("byte_llama", "every_kernel")
}


def load(name: str) -> ModuleType:
    """Import a script with its own folder on the path, as Python does."""
    folder = str(COMMANDS[name].parent)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
