"""The host's cost is measured at toy size, where the figures mean nothing.

It runs in a process of its own, because Triton takes the driver for an H100's from then on.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.scripts.commands import COMMANDS, SCRIPTS, load

LINEARS = 7  # linear layers in a layer of Llama
MODES = ("float", "stack", "release", "int8-release")
OF_EXPERTS = ("stack", "release")
RUNS = {
    "1 layer": ("--layers", "1", "--modes", *MODES),
    "2 layers": ("--layers", "2", "--modes", *MODES),
    "2 compiled": ("--layers", "2", "--modes", "stack", "--compile"),
    "1 of experts": ("--layers", "1", "--experts", "16", "--modes", *OF_EXPERTS),
    "2 of experts": ("--layers", "2", "--experts", "16", "--modes", *OF_EXPERTS),
}
# Imports the script once, and forks a process for each run.
PROGRAM = """
import json, os, runpy, sys
script, folder, runs = sys.argv[1:]
main = runpy.run_path(script)["main"]
for name, flags in json.loads(runs).items():
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, name
    else:
        sys.argv = [script, "--output", f"{folder}/{name}", "--rounds", "1", *flags]
        main()
        break
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of the script for models of one and two layers, in a folder for each run."""
    load("host_cost")  # for its neighbours
    from common.absent_gpu import COMPILERS, c_compiler

    if c_compiler() is None:
        pytest.skip(f"none of {', '.join(COMPILERS)} is installed")
    if torch.cuda.is_available():
        pytest.skip("NVIDIA's libcuda is there and does not stand in for itself")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = tmp_path_factory.mktemp("host_cost")
    command = [sys.executable, "-c", PROGRAM, str(COMMANDS["host_cost"]), str(folder)]
    subprocess.run(
        [*command, json.dumps(RUNS)], env=environment | {"PYTHONPATH": str(SCRIPTS.parent)},
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def figures(folder, run: str) -> dict[str, dict[str, float]]:
    return json.loads((folder / run / "figures.json").read_text())["modes"]


def test_every_mode_is_measured_on_an_absent_gpu(folder):
    modes = figures(folder, "1 layer")

    assert list(modes) == list(MODES)
    launches = {name: found["launches"] for name, found in modes.items()}
    assert launches["float"] == 0 < launches["release"] < launches["stack"]
    assert launches["stack"] < launches["int8-release"]
    for found in modes.values():
        assert found["adds"] == sum(found[part] for part in ("forward", "backward", "step"))
        assert found["device_operations"] > found["launches"]
    assert "| int8-release | " in (folder / "1 layer" / "table.md").read_text()


def test_a_layer_starts_what_it_has_to_and_nothing_else(folder):
    """Every additional launch or operation of a step is paid in each layer."""
    one, two = figures(folder, "1 layer"), figures(folder, "2 layers")

    def of_a_layer(mode: str, figure: str) -> float:
        return two[mode][figure] - one[mode][figure]

    # Dequantize twice, quantize, step; with release the last two are one.
    assert of_a_layer("stack", "launches") == 4 * LINEARS
    assert of_a_layer("release", "launches") == 3 * LINEARS
    # Other than these, a step has the device operations of a float model.
    for mode in ("stack", "release"):
        own = of_a_layer(mode, "device_operations") - of_a_layer("float", "device_operations")
        assert own == of_a_layer(mode, "launches")
    # INT8 products start many: these are upper bounds.
    assert of_a_layer("int8-release", "launches") <= 70
    assert of_a_layer("int8-release", "device_operations") <= 176
    # Views and allocations start nothing, and each costs the host half as much as a launch.
    assert of_a_layer("int8-release", "torch_operations") <= 606


def test_compiled_layers_start_as_many_kernels_of_ours_and_fewer_others(folder):
    eager, compiled = (figures(folder, run)["stack"] for run in ("2 layers", "2 compiled"))

    assert compiled["launches"] == eager["launches"]
    assert compiled["device_operations"] < eager["device_operations"] - compiled["launches"]


def test_experts_start_what_two_linear_layers_do_however_many_they_are(folder):
    one, two = figures(folder, "1 of experts"), figures(folder, "2 of experts")

    launches = {mode: two[mode]["launches"] - one[mode]["launches"] for mode in OF_EXPERTS}

    # Four weights of attention and both weights of all experts start as many each as above.
    assert launches == {"stack": 4 * (4 + 2), "release": 3 * (4 + 2)}
