"""What the host pays is measured at toy size; the figures mean nothing there.

In a process of its own: Triton takes the machine's driver for an H100's from then on.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.scripts.commands import COMMANDS, SCRIPTS, load

ROOT = SCRIPTS.parent


def test_every_mode_is_measured_on_an_absent_gpu(tmp_path):
    load("host_cost")  # for its neighbours
    from common.absent_gpu import COMPILERS, c_compiler

    if c_compiler() is None:
        pytest.skip(f"none of {', '.join(COMPILERS)} is installed")
    if torch.cuda.is_available():
        pytest.skip("NVIDIA's libcuda is there and does not stand in for itself")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMMANDS["host_cost"]), "--output", str(tmp_path)]
    flags = ["--layers", "1", "--rounds", "1", "--modes", "float", "stack", "int8-release"]

    subprocess.run(
        [*command, *flags], env=environment | {"PYTHONPATH": str(ROOT)}, check=True,
        capture_output=True,
    )  # fmt: skip

    modes = json.loads((tmp_path / "figures.json").read_text())["modes"]
    assert list(modes) == ["float", "stack", "int8-release"]
    launches = [figures["launches"] for figures in modes.values()]
    assert launches[0] == 0 < launches[1] < launches[2]
    for figures in modes.values():
        assert figures["adds"] == sum(figures[part] for part in ("forward", "backward", "step"))
        assert figures["device_operations"] > figures["launches"]
    assert "| int8-release | " in (tmp_path / "table.md").read_text()
