"""The emulated device detects the faults that it checks for, planted in real kernels."""

import importlib
import os
import re

import pytest
import torch

if "QFT_PTX" not in os.environ:
    pytest.skip("needs QFT_PTX=86, 90 or 120: a process of its own", allow_module_level=True)

from qft_hf.kernels import Weight
from tests.kernels.backends import reference
from tests.kernels.backends import triton as backend
from tests.kernels.devices import MARKS
from tests.kernels.states import make_state
from tests.ptx import driver, emulator
from tests.tolerances import assert_same_bits

pytestmark = MARKS
quantization = importlib.import_module("qft_hf.kernels.triton.quantization")


@pytest.fixture
def plant(monkeypatch):
    """Edit the PTX of kernels that are launched from now on."""

    def edit(pattern: str, text: str) -> None:
        kernel = emulator.Kernel

        def edited(ptx: str, shared: int) -> emulator.Kernel:
            changed, n = re.subn(pattern, text, ptx)
            assert n, f"{pattern} is not in the kernel"
            return kernel(changed, shared)

        monkeypatch.setattr(driver, "_kernels", {})
        monkeypatch.setattr(emulator, "Kernel", edited)

    return edit


def dequantize() -> torch.Tensor:
    """Dequantize: outliers are stored over results of other threads, after a barrier."""
    weight = make_state((2, 1100), group_size=None, outlier_fraction=0.03).weight
    return backend.dequantize(Weight(*weight.tensors, None))


def test_nothing_is_wrong_with_the_kernel_itself():
    weight = make_state((2, 1100), group_size=None, outlier_fraction=0.03).weight

    assert_same_bits(dequantize(), reference.dequantize(weight))


def test_a_barrier_that_is_left_out(plant):
    plant(r"\n\s*bar\.sync[^;]*;", "")

    with pytest.raises(emulator.Fault, match="two threads write different values"):
        dequantize()


def test_a_store_past_the_end():
    x = torch.ones(2, 64)
    codes = torch.empty(2 * 64 - 1, dtype=torch.int8)
    constants = quantization.row_constants(64, None, N_TAKEN=0, TAKEN_TILE=1)

    with pytest.raises(emulator.Fault, match=r"out of bounds .*codes_ptr"):
        quantization._launch_quantize(
            (2,), constants, x, None, None, codes, torch.empty(2, 1), None, 2
        )


def test_a_grid_that_no_device_launches():
    x, codes = torch.ones(2, 64), torch.empty(2, 64, dtype=torch.int8)
    constants = quantization.row_constants(64, None, N_TAKEN=0, TAKEN_TILE=1)

    with pytest.raises(emulator.Fault, match=r"\(2, 65536, 1\) is more than a device launches"):
        quantization._launch_quantize(
            (2, 65_536), constants, x, None, None, codes, torch.empty(2, 1), None, 2
        )


def test_a_result_that_is_off_by_its_last_bit(plant):
    """Tests that compare bits detect what a fused multiplication and addition would change."""
    plant(r"mul\.rn\.f32( *\t*)(%\w+), (%\w+), (%\w+);", r"fma.rn.f32\1\2, \3, \4, 0f1E3CE508;")
    weight = make_state((2, 1100), group_size=None, outlier_fraction=0.03).weight

    with pytest.raises(AssertionError):
        assert_same_bits(dequantize(), reference.dequantize(weight))
