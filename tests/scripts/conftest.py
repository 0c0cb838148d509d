"""A fixture that several tests of scripts need."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.scripts.commands import load


@pytest.fixture
def run(monkeypatch, tmp_path, capsys) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run a script as its command line does; return the figures and the tables it wrote."""

    def main(name: str, *flags: str) -> tuple[dict[str, Any], str]:
        output = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, "--output", str(output)])
        load(name).main()
        assert f"written to {output}" in capsys.readouterr().out
        figures = json.loads((output / "figures.json").read_text())
        assert {"device", "date", "commit", "torch"} < set(figures["machine"])
        return figures, (output / "table.md").read_text()

    return main
