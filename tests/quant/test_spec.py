"""The storage format: its limits, and what it costs."""

import pytest

from qft_hf import layout
from qft_hf.config import QuantizationSpec
from qft_hf.layout import STATE_GROUP_SIZE, outliers_per_row, quantized_bytes


def test_the_defaults_are_the_published_ones():
    spec = QuantizationSpec()

    assert (spec.group_size, spec.outlier_fraction, spec.matmul) == (None, 0.01, "dequantize")
    assert (spec.modules_to_not_convert, spec.seed) == (None, 0)


@pytest.mark.parametrize("group_size", [0, -1])
def test_group_size_must_be_positive(group_size):
    with pytest.raises(
        ValueError, match="positive number of columns or None for one scale per row"
    ):
        QuantizationSpec(group_size=group_size)


@pytest.mark.parametrize("fraction", [-0.01, 1.0, float("nan")])
def test_outlier_fraction_is_a_share(fraction):
    with pytest.raises(
        ValueError, match=r"in \[0, 1\).*usual value is 0\.01; 0 turns outliers off"
    ):
        QuantizationSpec(outlier_fraction=fraction)


def test_an_unknown_product_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"matmul must be 'dequantize' or 'int8', got 'guess'"):
        QuantizationSpec(matmul="guess")


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_must_fit_63_bits(seed):
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*63\)"):
        QuantizationSpec(seed=seed)


@pytest.mark.parametrize(
    ("columns", "group_size", "n_groups"),
    [
        (1, None, 1),
        (300, None, 1),
        (300, 100, 3),
        (301, 100, 4),
        (299, 100, 3),
        (5, 9, 1),
        (5, 1, 5),
    ],
)
def test_groups_of_a_row(columns, group_size, n_groups):
    assert layout.n_groups(columns, group_size) == n_groups
    assert quantized_bytes(7, columns, group_size) == 7 * columns + 7 * n_groups * 4


@pytest.mark.parametrize(
    ("columns", "fraction", "count"),
    [(1000, 0.0, 0), (1000, 0.01, 10), (1001, 0.01, 11), (7, 0.01, 1), (7, 0.99, 7)],
)
def test_any_positive_fraction_keeps_at_least_one(columns, fraction, count):
    assert outliers_per_row(columns, fraction) == count


def test_states_of_a_llama_matrix_cost_what_the_design_says():
    """At most 3.11 bytes per parameter with 1 % outliers: 19.5 % of FP32 Adam."""
    rows, columns = 11008, 4096
    total = (
        quantized_bytes(rows, columns, None)
        + rows * outliers_per_row(columns, 0.01) * (4 + 2)  # FP32 values, 16-bit columns
        + 2 * quantized_bytes(rows, columns, STATE_GROUP_SIZE)
    )

    assert total / (rows * columns) <= 3.11
