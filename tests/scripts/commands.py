"""Load scripts as `python scripts/<folder>/<name>.py` does, with their folder on the path."""

import importlib
import runpy
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = {
    path.stem: path
    for path in sorted(SCRIPTS.rglob("*.py"))
    if path.parent.name != "common" and path.stem != "every_kernel"
}


def load(name: str) -> ModuleType:
    """Import a script with its own folder on the path, as Python does."""
    folder = str(COMMANDS[name].parent)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


@cache
def help_of(name: str) -> str:
    """Return what `--help` prints. A process of its own for each command would take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setenv("HF_HUB_OFFLINE", "1")  # so that it is as it was when the demo has set it
        patch.chdir(SCRIPTS.parent)
        # As in a process of its own, only the script's own folder is on the path.
        path = [entry for entry in sys.path if not Path(entry).is_relative_to(SCRIPTS)]
        patch.setattr(sys, "path", [str(COMMANDS[name].parent), *path])
        for module in [*sys.modules]:
            if module.partition(".")[0] in ("common", *COMMANDS):
                patch.delitem(sys.modules, module)
        patch.setattr(sys, "argv", [str(COMMANDS[name]), "--help"])
        with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(COMMANDS[name]), run_name="__main__")
    assert stopped.value.code == 0
    return printed.getvalue()
