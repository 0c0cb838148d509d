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

LINEARS = 7  # of a layer of Llama
MODES = ("float", "stack", "release", "int8-release")
OF_EXPERTS = ("stack", "release")
RUNS = {
    "1 layer": ("--layers", "1", "--modes", *MODES),
    "2 layers": ("--layers", "2", "--modes", *MODES),
    "2 compiled": ("--layers", "2", "--modes", "stack", "--compile"),
    "1 of experts": ("--layers", "1", "--experts", "16", "--modes", *OF_EXPERTS),
    "2 of experts": ("--layers", "2", "--experts", "16", "--modes", *OF_EXPERTS),
}
# Imports what the script needs once, and does each run in a fork.
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
    """What the script finds out about models of so many layers, in a folder for each run."""
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
    """Each launch that a step makes more, and each operation around it, is paid in every layer."""
    one, two = figures(folder, "1 layer"), figures(folder, "2 layers")

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


def test_compiled_layers_start_as_many_kernels_of_ours_and_fewer_others(folder):
    eager, compiled = (figures(folder, run)["stack"] for run in ("2 layers", "2 compiled"))

    assert compiled["launches"] == eager["launches"]
    assert compiled["device_operations"] < eager["device_operations"] - compiled["launches"]


def test_experts_start_what_two_linear_layers_do_however_many_they_are(folder):
    one, two = figures(folder, "1 of experts"), figures(folder, "2 of experts")

    launches = {mode: two[mode]["launches"] - one[mode]["launches"] for mode in OF_EXPERTS}

    # Four of attention, and both weights of all experts, in as many launches each as above.
    assert launches == {"stack": 4 * (4 + 2), "release": 3 * (4 + 2)}
