"""Values that operators take together are checked when they are constructed."""

from typing import Any

import pytest
import torch

from qft_hf.kernels import Quantized, Weight
from tests.kernels.states import LionState, assert_same_state, make_state
from tests.tolerances import assert_same_bits


def make() -> LionState:
    return make_state((6, 50), group_size=16, outlier_fraction=0.03)


def column_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        ("codes", lambda t: t.int(), TypeError, r"weight codes must be torch\.int8, got .*int32"),
        ("codes", lambda t: t.float(), TypeError, r"weight codes must be torch\.int8"),
        ("codes", lambda t: t.t(), ValueError, r"weight codes must be contiguous.*\.contiguous\("),
        ("codes", lambda t: t[0], ValueError, r"non-empty \[rows, columns\].*\.view\(-1, columns"),
        ("codes", lambda t: t[:0], ValueError, r"non-empty \[rows, columns\]"),
        ("scales", lambda t: t.double(), ValueError, "scales must be float32 of shape"),
        ("scales", lambda t: t[:, :-1], ValueError, r"shape \(6, 4\), .*one per row and group"),
        ("scales", lambda t: t[:-1], ValueError, r"shape \(6, 4\), .*one per row and group"),
        ("scales", column_order, ValueError, "scales must be contiguous and on cpu"),
        ("scales", lambda t: t.to("meta"), ValueError, "contiguous and on cpu, got .* on meta"),
        ("outlier_values", lambda t: t.to("meta"), ValueError, r"on cpu, .* on meta and .* on cpu"),
        ("outlier_columns", lambda t: t.to("meta"), ValueError, "on cpu and .* on meta"),
        ("outlier_values", lambda t: t.bfloat16(), TypeError, r"outlier values must be .*float32"),
        ("outlier_values", lambda t: t.half(), TypeError, r"outlier values must be .*float32"),
        ("outlier_values", lambda t: t[:, :-1], ValueError, "matrices of the same shape"),
        ("outlier_values", lambda t: t[:, 0], ValueError, "matrices of the same shape"),
        ("outlier_values", column_order, ValueError, "outlier values must be contiguous"),
        ("outlier_columns", column_order, ValueError, "outlier columns must be contiguous"),
        ("outlier_columns", lambda t: t.long(), TypeError, r"torch\.int16 or torch\.int32"),
        ("group_size", lambda _: 0, ValueError, "at least one column, got group_size=0"),
        ("group_size", lambda _: 10, ValueError, r"scales must be float32 of shape \(6, 5\)"),
        ("group_size", lambda _: None, ValueError, r"scales must be float32 of shape \(6, 1\)"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(name, change, error, match):
    state, before = make(), make()
    parts: dict[str, Any] = dict(
        zip(("codes", "scales", "outlier_values", "outlier_columns"), state.weight.tensors,
            strict=True),
        group_size=16,
    )  # fmt: skip
    Weight(**parts)

    with pytest.raises(error, match=match):
        Weight(**{**parts, name: change(parts[name])})

    assert_same_state(state, before)


def test_outliers_for_another_number_of_rows_are_refused():
    """Compiled code does not check bounds: with too few rows of outliers it wrote out of bounds."""
    codes, scales, values, columns = make().weight.tensors

    with pytest.raises(ValueError, match="one row for each of the 6 rows"):
        Weight(codes, scales, values[:-1], columns[:-1], 16)
    with pytest.raises(ValueError, match="one row for each of the 6 rows"):
        Weight(codes, scales, values[:-1, :0], columns[:-1, :0], 16)


@pytest.mark.parametrize(
    ("bits", "name", "change", "error", "match"),
    [
        (8, "codes", lambda t: t.float(), TypeError, r"codes must be torch\.int8, got .*float32"),
        (8, "codes", lambda t: t.view(torch.uint8), TypeError, r"codes must be torch\.int8"),
        (8, "codes", lambda t: t[:-1], ValueError, r"scales must be float32 of shape \(5, 1\)"),
        (8, "codes", lambda t: t.flatten(), ValueError, r"non-empty \[rows, columns\]"),
        (8, "codes", column_order, ValueError, r"codes must be contiguous.*\.contiguous\(\) first"),
        (8, "scales", lambda t: t[:-1], ValueError, r"scales must be float32 of shape \(6, 1\)"),
        (8, "scales", lambda t: t.double(), ValueError, "scales must be float32 .*float64"),
        (8, "scales", lambda t: t.to("meta"), ValueError, "and on cpu, got .* on meta"),
        (8, "group_size", lambda _: 0, ValueError, "at least one column, got group_size=0"),
        (8, "group_size", lambda _: 25, ValueError, r"scales must be float32 of shape \(6, 3\)"),
        (4, "codes", lambda t: t.view(torch.int8), TypeError, r"codes must be torch\.uint8, got"),
        (4, "codes", lambda t: t[:-1], ValueError, r"scales must be float32 of shape \(5, 1\)"),
        (4, "codes", column_order, ValueError, "codes must be contiguous"),
        (4, "codes", lambda t: t.repeat(1, 2), ValueError, r"scales must be .* shape \(6, 2\)"),
        (4, "scales", lambda t: t[:-1], ValueError, r"float32 of shape \(6, 1\), .* \(5, 1\)"),
        (4, "scales", lambda t: t.double(), ValueError, "scales must be float32 .*float64"),
        (4, "group_size", lambda _: 256, ValueError, "groups of 64 columns, got group_size=256"),
        (4, "group_size", lambda _: None, ValueError, "groups of 64 columns, got group_size=None"),
    ],
)
def test_a_quantized_matrix_that_does_not_fit_is_refused(bits, name, change, error, match):
    state = make_state((6, 51), group_size=16, momentum_bits=bits)
    momentum, before = state.momentum, state.clone()
    parts: dict[str, Any] = {
        "codes": momentum.codes,
        "scales": momentum.scales,
        "group_size": momentum.group_size,
    }
    changed = {**parts, name: change(parts[name])}

    with pytest.raises(error, match=match):
        Quantized(**changed, bits=bits)

    assert_same_state(state, before)


def test_some_rows_share_memory_and_groups():
    state = make_state((6, 150), group_size=40, outlier_fraction=0.02, momentum_bits=4)
    for value in state.arguments():
        part = value.rows(slice(2, 5))
        assert part.group_size == value.group_size
        for tensor, whole in zip(part.tensors, value.tensors, strict=True):
            assert_same_bits(tensor, whole[2:5])
            assert tensor.data_ptr() == whole[2:].data_ptr()
    assert state.momentum.rows(slice(0, 1)).bits == 4


def test_a_dense_weight_has_the_tensors_of_its_matrix_and_no_outliers():
    matrix = make_state((6, 50), group_size=16).gradient

    weight = Weight.dense(matrix)

    assert weight.codes is matrix.codes
    assert weight.scales is matrix.scales
    assert weight.group_size == matrix.group_size == 256
    assert weight.outlier_values.shape == weight.outlier_columns.shape == (6, 0)
    assert weight.device == matrix.device == torch.device("cpu")


def test_around_fields_there_is_the_weight_that_is_alive():
    """The live weight keeps its plans; other fields, or a weight that is dead, make a new one."""
    weight = make().weight
    fields = (*weight.tensors, weight.group_size)

    assert Weight.around(*fields) is weight
    other = Weight.around(weight.codes, weight.scales.clone(), *fields[2:])
    assert other is not weight
    assert other.scales is not weight.scales
    assert Weight(*fields) is not weight
    assert Weight.around(*fields) is weight  # the first one made
    del weight
    assert Weight.around(*fields).codes is fields[0]
