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


LINEARS = 7  # of a layer of Llama


def figures(folder, layers: int, *modes: str, experts: int = 0) -> dict[str, dict[str, float]]:
    """What the script finds out about models of so many layers, and experts in each."""
    load("host_cost")  # for its neighbours
    from common.absent_gpu import COMPILERS, c_compiler

    if c_compiler() is None:
        pytest.skip(f"none of {', '.join(COMPILERS)} is installed")
    if torch.cuda.is_available():
        pytest.skip("NVIDIA's libcuda is there and does not stand in for itself")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMMANDS["host_cost"]), "--output", str(folder)]
    flags = ["--layers", str(layers), "--rounds", "1", "--modes", *modes]
    flags += ["--experts", str(experts)]
    subprocess.run(
        [*command, *flags], env=environment | {"PYTHONPATH": str(ROOT)}, check=True,
        capture_output=True,
    )  # fmt: skip
    return json.loads((folder / "figures.json").read_text())["modes"]


def test_every_mode_is_measured_on_an_absent_gpu(tmp_path):
    modes = figures(tmp_path, 1, "float", "stack", "int8-release")

    assert list(modes) == ["float", "stack", "int8-release"]
    launches = [found["launches"] for found in modes.values()]
    assert launches[0] == 0 < launches[1] < launches[2]
    for found in modes.values():
        assert found["adds"] == sum(found[part] for part in ("forward", "backward", "step"))
        assert found["device_operations"] > found["launches"]
    assert "| int8-release | " in (tmp_path / "table.md").read_text()


def test_a_layer_starts_what_it_has_to_and_nothing_else(tmp_path):
    """Each launch that a step makes more, and each operation around it, is paid in every layer."""
    names = ("float", "stack", "release", "int8-release")
    one, two = (figures(tmp_path / str(layers), layers, *names) for layers in (1, 2))

    def of_a_layer(mode: str, figure: str) -> float:
        return two[mode][figure] - one[mode][figure]

    # Dequantize twice and quantize, then step; with release these two are one.
    assert of_a_layer("stack", "launches") == 4 * LINEARS
    assert of_a_layer("release", "launches") == 3 * LINEARS
    # Beside them a step has no operation that a float model's has not.
    for mode in ("stack", "release"):
        own = of_a_layer(mode, "device_operations") - of_a_layer("float", "device_operations")
        assert own == of_a_layer(mode, "launches")
    # Of INT8 products there are many; there may be fewer, and not more.
    assert of_a_layer("int8-release", "launches") <= 70
    assert of_a_layer("int8-release", "device_operations") <= 176
    # Views and allocations start nothing, and each takes the host as long as half a launch.
    assert of_a_layer("int8-release", "torch_operations") <= 606


def test_experts_start_what_two_linear_layers_do_however_many_they_are(tmp_path):
    names = ("stack", "release")
    one, two = (figures(tmp_path / str(n), n, *names, experts=16) for n in (1, 2))

    launches = {mode: two[mode]["launches"] - one[mode]["launches"] for mode in names}

    # Four of attention, and both weights of all experts, in as many launches each as above.
    assert launches == {"stack": 4 * (4 + 2), "release": 3 * (4 + 2)}
