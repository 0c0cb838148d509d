"""BF16 in numba against PyTorch's: every value, and every kind of tie."""

import numpy as np
import pytest
import torch
from numba import njit

from qft_hf.kernels.cpu.bf16 import float_array, store_row, widen
from tests.tolerances import assert_same_bits

HIGH_HALVES = np.arange(2**16, dtype=np.uint32) << 16


@njit
def load(row, values):
    for j in range(row.shape[0]):
        values[j] = widen(row[j])


@njit
def store(values, row):
    store_row(values, row)


def test_every_value_is_read():
    x = torch.from_numpy(HIGH_HALVES.view(np.float32)).bfloat16()
    values = torch.empty(len(x))

    load(float_array(x), values.numpy())

    assert_same_bits(values, x.float())


@pytest.mark.parametrize("low_half", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_is_that_of_pytorch(low_half):
    """NaN, infinities, subnormal numbers and both signs are among the high halves."""
    values = torch.from_numpy((HIGH_HALVES | np.uint32(low_half)).view(np.float32))
    x = torch.empty(len(values), dtype=torch.bfloat16)

    store(values.numpy(), float_array(x))

    assert_same_bits(x, values.bfloat16())


def test_fp32_stays_as_it_is():
    values = torch.from_numpy(HIGH_HALVES.view(np.float32))
    loaded, stored = torch.empty_like(values), torch.empty_like(values)

    load(float_array(values), loaded.numpy())
    store(values.numpy(), float_array(stored))

    assert_same_bits(loaded, values)
    assert_same_bits(stored, values)
