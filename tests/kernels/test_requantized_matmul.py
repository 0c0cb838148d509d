"""Requantized products of INT8 codes have the bits of the two operators in turn."""

import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels.cpu.int8_product import TILE
from qft_hf.kernels.int8_product import MAX_SUMMED
from tests.kernels.backends import cpu, reference
from tests.kernels.test_int8_matmul import codes, inside, other_order, scales
from tests.tolerances import assert_same_bits

BACKENDS = [reference, cpu]
WIDE = TILE + 300


def given(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return numbers and values of given columns, on both sides of a tile's edge if one exists."""
    numbers = torch.tensor([columns - 1, 0, TILE - 1, TILE, 5]).unique()
    numbers = numbers[numbers < columns]
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randn(len(numbers), rows, generator=generator) * 1e4
    return numbers, values.to(dtype).t()  # as they are stored in a layer


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [1, 7, 256, 3000])
@pytest.mark.parametrize(
    ("rows", "summed", "columns"), [(1, 1, 1), (5, 33, 300), (TILE + 3, 4, 9), (3, 5, WIDE)]
)
def test_equals_product_and_quantization(backend, rows, summed, columns, group_size, dtype):
    a, b = codes(rows, summed), codes(columns, summed).t()
    numbers, values = given(rows, columns, dtype)

    found = backend.requantized_matmul(
        a, b, scales(rows), columns=numbers, values=values, group_size=group_size
    )

    product = reference.int8_matmul(a, b, scales(rows), None, dtype=torch.float32)
    product[:, numbers] = values.float()
    expected = kernels.quantize(product, group_size=group_size)
    for result, wanted in zip(found, expected, strict=True):
        assert_same_bits(result, wanted)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("form", [other_order, inside])
def test_without_scales_and_columns_and_stored_in_other_ways(backend, form):
    a, b = codes(12, 70), codes(70, 40)

    found = backend.requantized_matmul(
        form(a), form(b), None, columns=None, values=None, group_size=16
    )

    product = (a.double() @ b.double()).float()
    for result, wanted in zip(found, kernels.quantize(product, group_size=16), strict=True):
        assert_same_bits(result, wanted)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_group_only(backend, fault):
    a, b = codes(4, 9), codes(9, 40)
    values = torch.ones(4, 1)
    values[2] = fault

    found, found_scales = backend.requantized_matmul(
        a, b, scales(4), columns=torch.tensor([20]), values=values, group_size=16
    )

    assert found_scales.isfinite().logical_not().nonzero().tolist() == [[2, 1]]
    assert (found[2, 16:32] == 0).all()
    assert (found[2, :16] != 0).any()


def test_a_longer_sum_is_added_in_parts():
    k = MAX_SUMMED + 50
    a, b = codes(2, k), codes(3, k).t()
    options = {"columns": torch.tensor([1]), "values": torch.tensor([[5.0], [-7.0]])}

    found = kernels.requantized_matmul(a, b, scales(2), **options, group_size=2)

    product = kernels.int8_matmul(a, b, scales(2), None, **options, dtype=torch.float32)
    for result, wanted in zip(found, kernels.quantize(product, group_size=2), strict=True):
        assert_same_bits(result, wanted)


ONES = torch.ones(2, 4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"a": ONES.float()}, TypeError, r"a must be torch\.int8"),
        ({"b": ONES}, ValueError, r"\(2, 4\).*\(2, 4\).*Pass \.t\(\) of a matrix"),
        ({"group_size": 0}, ValueError, "at least one column, got group_size=0"),
        ({"a_scales": torch.ones(3, 1)}, ValueError, r"a_scales must be float32 of shape \(2, 1\)"),
        ({"values": torch.ones(2, 1)}, ValueError, "or neither, got only the values"),
        (
            {"columns": torch.tensor([7]), "values": torch.ones(2, 1)},
            IndexError,
            r"columns must be in \[0, 2\), got 7",
        ),
    ],
)
def test_what_cannot_be_multiplied_is_refused(options, error, match):
    arguments = {"a": ONES, "b": ONES.t(), "a_scales": None, "group_size": 4, **options}
    operands = arguments.pop("a"), arguments.pop("b"), arguments.pop("a_scales")
    with pytest.raises(error, match=match):
        kernels.requantized_matmul(*operands, **arguments)
