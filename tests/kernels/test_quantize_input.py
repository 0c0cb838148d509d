"""Inputs as INT8 operands on every backend that a CPU runs: their outlier columns and codes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from tests.kernels.backends import cpu, reference
from tests.kernels.states import random
from tests.tolerances import assert_same_bits

BACKENDS = [reference, cpu]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One; fewer rows than a block of the CPU; more rows, with more columns than run side by side.
SHAPES = [(1, 1), (3, 300), (64, 7), (65, 33), (700, 130)]


def largest_columns(x: Tensor, n: int) -> list[int]:
    """Return the `n` largest columns, by sorting all of them in plain Python."""
    maxima = np.abs(x.double().numpy()).max(axis=0)
    keys = [(-np.inf if np.isnan(m) else -m, not np.isnan(m), c) for c, m in enumerate(maxima)]
    return sorted(c for _, _, c in sorted(keys)[:n])


def assert_is_split(x: Tensor, n: int, results: tuple[Tensor, ...]) -> None:
    """Check the promises of `quantize_input` with numpy, and with `quantize` of other columns."""
    codes, scales, columns, values = results
    assert columns.dtype == torch.int64
    assert columns.tolist() == largest_columns(x, n)
    assert_same_bits(values, x[:, columns])
    assert values.stride() == (1, x.shape[0])  # on all backends, as compilers are told
    others = x.float().index_fill(1, columns, 0.0)
    expected = kernels.quantize(others, group_size=None)
    for found, wanted in zip((codes, scales), expected, strict=True):
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_columns_are_float_and_the_others_are_quantized(backend, shape, dtype, share):
    x = random(shape, None).to(dtype)
    before = x.clone()
    n = round(share * shape[1])

    assert_is_split(x, n, backend.quantize_input(x, n_outliers=n))

    assert_same_bits(x, before)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("n", range(8))
def test_of_equal_columns_the_first_are_taken(backend, n):
    """In BF16 a hundred columns may share the largest magnitude, with either sign, in any row."""
    x = torch.full((70, 7), 0.25)
    for row, column, value in ((69, 1, 3.0), (0, 2, -2.0), (3, 4, 2.0), (68, 5, -2.0), (9, 6, -3)):
        x[row, column] = value
    order = [1, 6, 2, 4, 5, 0, 3]

    columns = backend.quantize_input(x, n_outliers=n)[2]

    assert columns.tolist() == sorted(order[:n])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_largest_and_spoils_no_code(backend, dtype):
    x = random((130, 9), None).to(dtype)
    x[100, 1], x[0, 2], x[129, 3] = float("inf"), float("-inf"), -float("nan")

    results = backend.quantize_input(x, n_outliers=3)

    assert_is_split(x, 3, results)
    assert results[2].tolist() == [1, 2, 3]
    assert results[1].isfinite().all()
    # NaN is larger than infinity, and of two infinite columns the first one is chosen.
    assert backend.quantize_input(x, n_outliers=2)[2].tolist() == [1, 3]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_token_that_is_not_finite_elsewhere_shows(backend):
    x = random((5, 40), None)
    x[:, 7], x[3, 8], x[3, 9] = 1000.0, float("inf"), float("nan")

    codes, scales, _, _ = backend.quantize_input(x, n_outliers=1)

    assert scales.isfinite().flatten().tolist() == [True, True, True, False, True]
    assert (codes[3] == 0).all()
    assert (codes[[0, 1, 2, 4]] != 0).any(dim=1).all()


def test_zeros_have_outlier_columns_too():
    assert_is_split(torch.zeros(3, 5), 2, kernels.quantize_input(torch.zeros(3, 5), n_outliers=2))


@pytest.mark.parametrize(
    ("x", "n", "error", "match"),
    [
        (torch.ones(2, 2, dtype=torch.int8), 1, TypeError, "x must be .*got torch.int8"),
        (torch.ones(2), 1, ValueError, r"non-empty \[rows, columns\] matrix"),
        (torch.ones(2, 4).t(), 1, ValueError, r"x must be contiguous.*\.contiguous\(\) first"),
        (torch.ones(2, 4), 5, ValueError, r"n_outliers must be in \[0, 4\].*got 5"),
        (torch.ones(2, 4), -1, ValueError, r"n_outliers must be in \[0, 4\].*got -1"),
    ],
)
def test_what_has_no_such_columns_is_refused(x, n, error, match):
    with pytest.raises(error, match=match):
        kernels.quantize_input(x, n_outliers=n)
