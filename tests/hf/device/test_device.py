"""Runs on a device other than the CPU: the same bits, one device only, no needless waiting."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run all on CPU and device in another process, since a process cannot remove the device."""
    file = tmp_path_factory.mktemp("device") / "runs.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.hf.device", file],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(file)  # contains nothing that imports the device into this process


def of(runs, *words):
    """Return the runs with one of the words in their names; there must be one."""
    found = {name: run for name, run in runs.items() if any(word in name for word in words)}
    assert found
    return found


def test_no_run_mixes_devices(runs):
    assert {name: run["error"][-600:] for name, run in runs.items() if "error" in run} == {}


def test_a_run_has_the_bits_of_the_same_run_on_the_cpu(runs):
    for name, run in runs.items():
        here, there = run["cpu"], run["device"]
        assert here.keys() == there.keys()
        for key in here.keys() - {"waits"}:
            same = torch.equal if isinstance(here[key], Tensor) else list.__eq__
            assert same(here[key], there[key]), (name, key)


def test_a_run_that_is_resumed_there_ends_at_the_same_bits(runs):
    for name, run in of(runs, "rainer").items():
        found = run["device"]
        for key in (key for key in found if f"resumed {key}" in found):
            assert torch.equal(found[key], found[f"resumed {key}"]), (name, key)


def test_a_pass_waits_for_nothing_but_the_tokens_of_experts(runs):
    """With two layers each: the number of tokens of each expert decides the shapes of products."""
    expected = {"Qwen3-MoE": 2, "Mixtral, release": 2}
    for name, run in of(runs, "lion", "adamw", "sgd", "INT8", "bf16", "M", "G").items():
        waits = run["device"]["waits"]["pass"]
        assert len(waits) == expected.get(name, 0), (name, waits)


def test_a_step_waits_once_to_know_whether_gradients_are_finite(runs):
    for name, run in of(runs, "lion", "adamw", "sgd", "INT8", "bf16", "M", "G").items():
        waits = run["device"]["waits"]["step"]
        assert len(waits) == 1, (name, waits)
