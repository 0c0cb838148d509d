"""Runs end in the bits that were recorded when the behavior was last changed on purpose.

    python -m tests.golden.test_golden    # write the bits of this machine to hashes.json

Run this only after such a change, or to add the bits of `llama` in another environment.
"""

import json
from pathlib import Path

import pytest
import torch

from qft_hf.kernels import backend
from tests.golden.runs import cases, environment

FILE = Path(__file__).with_name("hashes.json")
KNOWN = json.loads(FILE.read_text()) if FILE.exists() else {}
CASES = dict(cases())
# The reference takes half a second a run; these go through each of its operators.
REFERENCE_CASES = [
    name
    for name in CASES
    if name.startswith("integers") and ", tied" in name and "parts" not in name
]


def expected(name: str) -> str:
    if name.startswith("integers"):
        return KNOWN["any machine"][name]
    if environment() not in KNOWN:
        pytest.skip(f"the bits of float products are not known for {environment()}")
    return KNOWN[environment()][name]


@pytest.fixture
def one_thread():
    """Use one thread: with several, float sums are split among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_a_run_ends_in_the_bits_that_are_known(name):
    assert CASES[name]() == expected(name)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", REFERENCE_CASES)
def test_the_reference_ends_in_the_same_bits(name):
    with backend.use("reference"):
        assert CASES[name]() == expected(name)


def write() -> None:
    """Write the bits of this machine next to those of others."""
    torch.set_num_threads(1)
    found = {"any machine": {}, environment(): {}}
    for name, run in CASES.items():
        key = "any machine" if name.startswith("integers") else environment()
        found[key][name] = run()
    FILE.write_text(json.dumps({**KNOWN, **found}, indent=1) + "\n")


if __name__ == "__main__":
    write()
