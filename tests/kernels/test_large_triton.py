"""Matrices of more than 2**31 elements: Triton's kernels find the rows that are beyond them.

In Triton's interpreter only: there the programs of these rows can run alone.
"""

import importlib

import numpy as np
import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels import Quantized, Weight
from qft_hf.kernels.operators import Operator
from tests.kernels.backends import reference
from tests.kernels.backends import triton as backend
from tests.kernels.devices import INTERPRETED
from tests.kernels.states import ROUNDING, LionState, arguments, coded, make_state, random
from tests.tolerances import assert_same_bits, assert_same_norms, dequantized_matmul_bound

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

COLUMNS = 2**13
FIRST, N = 2**18, 3  # the last N rows begin at element 2**31
OPERATORS = [value for value in vars(kernels).values() if isinstance(value, Operator)]
LAST = slice(FIRST, FIRST + N)


@pytest.fixture(autouse=True)
def _last_programs_only(monkeypatch):
    """Run the last N programs of both axes of each launch."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    launch = importlib.import_module("qft_hf.kernels.triton.launch")
    builder, skipped = interpreter.interpreter_builder, [0, 0, 0]

    def run(launcher, grid, constants, *given):
        skipped[: len(grid)] = [max(size - N, 0) for size in grid]
        few = tuple(size - less for size, less in zip(grid, skipped, strict=False))
        launcher._kernel[few](*given, **constants.values)

    def shifted(method):
        return lambda *numbers: method(*(a + b for a, b in zip(numbers, skipped, strict=True)))

    for name in ("set_grid_dim", "set_grid_idx"):
        monkeypatch.setattr(builder, name, shifted(getattr(builder, name)))
    monkeypatch.setattr(launch.Launcher, "__call__", run)
    for operator in OPERATORS:
        monkeypatch.setattr(operator, "_check_values", None)  # all others are zeros
    # It would copy all of the memory to itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


def buried(tensor: Tensor) -> Tensor:
    """Return a matrix of zeros that ends with these rows; the zeros take no memory until read.

    As many zeros come before it, so that an address that lost its high bits is a wrong row, and not
    the end of the process.
    """
    rows, columns = FIRST + len(tensor), tensor.shape[1]
    zeros = np.zeros(2 * rows * columns * tensor.element_size(), np.uint8)
    matrix = torch.from_numpy(zeros).view(tensor.dtype).view(2 * rows, columns)[rows:]
    matrix[LAST] = tensor
    return matrix


def buried_matrix(matrix: Quantized) -> Quantized:
    return Quantized(*map(buried, matrix.tensors), matrix.group_size, matrix.bits)


def buried_weight(weight: Weight) -> Weight:
    return Weight(*map(buried, weight.tensors), weight.group_size)


def state(**options) -> LionState:
    return make_state((N, COLUMNS), group_size=None, outlier_fraction=0.001, **options)


def assert_same_rows(large: tuple[Tensor, ...], small: tuple[Tensor, ...]) -> None:
    for tensor, wanted in zip(large, small, strict=True):
        assert_same_bits(tensor[LAST], wanted)


def test_quantize():
    x = random((N, COLUMNS), None).bfloat16()
    large = backend.quantize(buried(x), group_size=256)
    assert_same_rows(large, reference.quantize(x, group_size=256))


def test_dequantize():
    weight = state().weight
    values = backend.dequantize(buried_weight(weight))
    assert_same_bits(values[LAST], reference.dequantize(weight))


def test_dequantize_some_rows():
    weight, ids = state().weight, torch.tensor([2, 0])
    values = backend.dequantize(buried_weight(weight), rows=ids + FIRST)
    assert_same_bits(values, reference.dequantize(weight, rows=ids))


@pytest.mark.parametrize("momentum_bits", [8, 4])
def test_lion(momentum_bits):
    small = state(momentum_bits=momentum_bits)
    large = small.map(buried)
    backend.lion_step_(*large.arguments(), **arguments())
    first_row = ROUNDING.first_row + FIRST
    reference.lion_step_(*small.arguments(), **arguments(first_row=first_row))
    assert_same_rows(tuple(large.tensors().values()), tuple(small.tensors().values()))


def test_quantize_and_lion():
    small = state()
    large = LionState(buried_weight(small.weight), buried_matrix(small.momentum), small.gradient)
    x = random((N, COLUMNS), None).bfloat16() * 1e-3
    squares = backend.quantize_and_lion_step_(
        large.weight, large.momentum, buried(x), group_size=256, **arguments()
    )
    first_row = ROUNDING.first_row + FIRST
    wanted = reference.quantize_and_lion_step_(
        small.weight, small.momentum, x, group_size=256, **arguments(first_row=first_row)
    )
    assert_same_norms(squares[LAST], wanted, COLUMNS // 256)
    assert_same_rows(large.weight.tensors, small.weight.tensors)
    assert_same_rows(large.momentum.tensors, small.momentum.tensors)


def test_accumulate_and_norms():
    small, other = (coded(random((N, COLUMNS), None).roll(i), 256) for i in range(2))
    large = buried_matrix(small)
    backend.accumulate_(large, buried_matrix(other))
    reference.accumulate_(small, other)
    assert_same_rows(large.tensors, small.tensors)
    norms = backend.squared_norms(large)[LAST]
    assert_same_norms(norms, reference.squared_norms(small), COLUMNS // 256)


def test_embedding_gradient():
    table = coded(torch.zeros(N, COLUMNS), 256)
    large = buried_matrix(table)
    ids, x = torch.tensor([2, 0, 2]), random((3, COLUMNS), None)
    backend.embedding_gradient_(large, ids + FIRST, x, padding_idx=FIRST + 1)
    reference.embedding_gradient_(table, ids, x, padding_idx=1)
    assert_same_rows(large.tensors, table.tensors)


def test_dequantized_matmul():
    weight, x = state().weight, random((1, COLUMNS), None)
    product = backend.dequantized_matmul(x, buried_weight(weight), bias=None)
    expanded = reference.dequantize(weight)
    bound = dequantized_matmul_bound(x, expanded, None)
    exact = x.double() @ expanded.double().T
    assert ((product[:, LAST].double() - exact).abs() <= bound).all()


def test_output_gradient():
    """Logits of a few thousand tokens and a large vocabulary are so many."""
    x = random((N, COLUMNS), None)
    x[:, : -N * 64] = 0.0  # of the last N tiles
    of_rows, of_columns = torch.rand(COLUMNS, 1) + 0.5, torch.rand(N, 1) + 0.5
    nearest = {"stochastic": False, "seed": 0}
    large = backend.quantize_gradient(buried(x), of_rows, buried(of_columns), **nearest)
    small = reference.quantize_gradient(x, of_rows, of_columns, **nearest)
    # The programs that store scales are not among the last.
    assert_same_bits(large[0][LAST, -N * 64 :], small[0][:, -N * 64 :])
    assert_same_bits(large[2][-N * 64 :, LAST], small[2][-N * 64 :])
