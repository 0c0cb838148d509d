"""The largest magnitudes of columns, on every backend that a CPU runs."""

import numpy as np
import pytest
import torch

from qft_hf import kernels
from tests.kernels.backends import cpu, reference
from tests.kernels.states import random
from tests.tolerances import assert_same_bits

BACKENDS = [reference, cpu]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (64, 7), (65, 33), (700, 130)], ids=str)
def test_equals_numpy(backend, shape, dtype):
    x = random(shape, None).to(dtype)

    found = backend.column_absmax(x)

    assert_same_bits(found, torch.from_numpy(np.abs(x.float().numpy()).max(axis=0)))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_comes_through(backend, dtype):
    x = random((130, 5), None).to(dtype)
    x[100, 1], x[0, 2], x[129, 3] = float("inf"), float("-inf"), float("nan")

    found = backend.column_absmax(x)

    assert found[[0, 4]].isfinite().all()
    assert found[1] == found[2] == float("inf")
    assert found[3].isnan()


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x must be"):
        kernels.column_absmax(torch.ones(2, 2, dtype=torch.int8))
