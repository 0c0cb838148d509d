"""`QFTWeight`: the hybrid quantizer, and operations that a parameter must support."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from qft_hf.config import QuantizationSpec
from qft_hf.layout import quantized_bytes
from qft_hf.quant import QFTWeight
from tests.tolerances import BF16_EPS, assert_same_bits, rounding_bound
from tests.values import scales64

SPECS = [
    QuantizationSpec(group_size=None, outlier_fraction=0.0),
    QuantizationSpec(group_size=None, outlier_fraction=0.02),
    QuantizationSpec(group_size=17, outlier_fraction=0.05),
    QuantizationSpec(group_size=1000, outlier_fraction=0.99),
]


def heavy_tailed(rows=9, columns=101, dtype=torch.float32, seed=0):
    """Return Gaussian values, some ten times larger in each row, as in real weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 0.02
    x[torch.rand(rows, columns, generator=generator) < 0.01] *= 10
    return x.to(dtype)


def assert_same_weight(actual: QFTWeight, expected: QFTWeight) -> None:
    assert actual._format() == expected._format()
    for name, field in expected.fields().items():
        assert_same_bits(getattr(actual, name), field)


# --- quantizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_are_within_half_a_scale_and_outliers_exact(spec, dtype):
    x = heavy_tailed(dtype=dtype)
    before = x.clone()

    weight = QFTWeight.from_float(x, spec)

    exact = x.double().numpy()
    stored = weight.codes.numpy() * scales64(weight).numpy()
    index = weight.outlier_columns.long().numpy()
    assert (np.take_along_axis(stored, index, axis=1) == 0).all()
    np.put_along_axis(stored, index, weight.outlier_values.double().numpy(), axis=1)
    assert (np.abs(stored - exact) <= rounding_bound(exact, scales64(weight).numpy())).all()
    np.testing.assert_array_equal(
        np.take_along_axis(stored, index, axis=1), np.take_along_axis(exact, index, axis=1)
    )
    # dequantize gives these values, rounded once to the outer dtype.
    assert weight.dtype == dtype
    assert_same_bits(weight.dequantize(), torch.from_numpy(stored).float().to(dtype))
    assert_same_bits(x, before)


@pytest.mark.parametrize("spec", SPECS[1:], ids=str)
def test_outliers_are_the_largest_of_each_row(spec):
    x = heavy_tailed()

    weight = QFTWeight.from_float(x, spec)

    count = weight.outlier_values.shape[1]
    assert count == int(np.ceil(spec.outlier_fraction * 101))
    for row in range(9):
        largest = np.sort(np.argsort(-np.abs(x[row].numpy()), kind="stable")[:count])
        np.testing.assert_array_equal(weight.outlier_columns[row].numpy(), largest)


def test_outliers_for_int8_products_are_whole_columns():
    """They are the columns that stand out most from a row, whatever the scale of that row."""
    x = torch.randn(9, 101, generator=torch.Generator().manual_seed(0)) * 0.02
    x[2, 40] = 0.5
    x[5] *= 1000  # its largest values are the largest of the matrix, and ordinary in their row
    x[7, 99] = -0.6
    x[8] = 0  # has no scale to stand out from
    spec = QuantizationSpec(matmul="int8", outlier_fraction=0.015)

    weight = QFTWeight.from_float(x, spec)

    assert weight.outlier_columns.tolist() == [[40, 99]] * 9
    assert weight.outlier_columns.is_contiguous()
    assert_same_bits(weight.outlier_values, x[:, [40, 99]])
    assert (weight.codes[:, [40, 99]] == 0).all()
    whole_rows = QFTWeight.from_float(x, QuantizationSpec(outlier_fraction=0.0))
    for row in (2, 7):  # the other columns have all codes for themselves
        assert weight.scales[row] < whole_rows.scales[row] / 5


def test_relative_error_falls_with_outliers_and_with_groups():
    x = heavy_tailed(64, 512)

    def error(**spec):
        weight = QFTWeight.from_float(x, QuantizationSpec(**spec))
        return ((weight.dequantize() - x).norm() / x.norm()).item()

    by_fraction = [error(outlier_fraction=fraction) for fraction in (0.0, 0.005, 0.02)]
    assert by_fraction[0] > 1.2 * by_fraction[1] > 1.2**2 * by_fraction[2]
    assert error(outlier_fraction=0.0, group_size=64) < by_fraction[0] / 1.2
    # Uniform noise of one quantum, predicted from the scales, is within 5 % of the measured error.
    weight = QFTWeight.from_float(x, QuantizationSpec(outlier_fraction=0.02))
    predicted = (weight.scales.square() * (512 - 11) / 12).sum().sqrt() / x.norm()
    assert by_fraction[2] == pytest.approx(predicted.item(), rel=0.05)


@pytest.mark.parametrize(("columns", "dtype"), [(32768, torch.int16), (32769, torch.int32)])
def test_column_index_type_follows_the_number_of_columns(columns, dtype):
    """The last column is an outlier: as int16 it would turn negative one column later."""
    x = torch.full((2, columns), 1e-3)
    x[0, -1], x[1, 0] = 5.0, -6.0

    weight = QFTWeight.from_float(x, QuantizationSpec(outlier_fraction=1e-5))

    assert weight.outlier_columns.dtype == dtype
    assert weight.outlier_columns.tolist() == [[columns - 1], [0]]
    values = weight.dequantize()
    assert (values[0, -1], values[1, 0]) == (5.0, -6.0)
    outlier_bytes = 2 * 1 * (4 + dtype.itemsize)
    assert weight.stored_bytes == quantized_bytes(2, columns, None) + outlier_bytes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_row_of_zeros_is_stored_exactly(spec):
    x = heavy_tailed()
    x[3] = 0.0

    weight = QFTWeight.from_float(x, spec)

    assert (weight.dequantize()[3] == 0).all()
    assert weight.scales.isfinite().all()
    assert (weight.scales > 0).all()


def test_a_transposed_matrix_is_quantized_by_its_own_rows():
    x = heavy_tailed(11, 30)

    weight = QFTWeight.from_float(x.t(), SPECS[1])

    assert_same_weight(weight, QFTWeight.from_float(x.t().contiguous(), SPECS[1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    x = heavy_tailed()
    x[2, 5] = x[8, 100] = bad

    with pytest.raises(
        ValueError, match=r"layers\.3\.weight has 2 of 909 values.*: load a good one"
    ):
        QFTWeight.from_float(x, SPECS[1], name="layers.3.weight")


def test_a_weight_of_too_many_values_is_named():
    """The error once named only the operand of a kernel."""
    x = torch.empty(33, 2**15, 2**14, device="meta")
    with pytest.raises(ValueError, match=r"experts has 17,716,740,096 values.*List its module in"):
        QFTWeight.from_float(x, SPECS[0], name="experts")
    QFTWeight.from_float(x[:32], SPECS[0])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_are_quantized_a_few_at_a_time(spec, monkeypatch):
    """A large table took three times its size in FP32 beside it."""
    x = heavy_tailed(dtype=torch.bfloat16)
    whole = QFTWeight.from_float(x, spec)
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", 3 * x.shape[1])
    assert_same_weight(QFTWeight.from_float(x, spec), whole)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_on_the_meta_device_only_shapes_are_made(spec):
    real = QFTWeight.from_float(heavy_tailed(dtype=torch.bfloat16), spec)

    weight = QFTWeight.from_float(heavy_tailed(dtype=torch.bfloat16).to("meta"), spec)

    assert weight.is_meta
    assert weight._format() == real._format()
    for name, field in real.fields().items():
        meta = getattr(weight, name)
        assert (meta.is_meta, meta.shape, meta.dtype) == (True, field.shape, field.dtype)
    assert weight.stored_bytes == real.stored_bytes


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_are_those_of_the_whole(spec):
    weight = QFTWeight.from_float(heavy_tailed(), spec)
    whole = weight.dequantize()

    assert_same_bits(weight.dequantize_rows(slice(2, 5)), whole[2:5])
    rows = torch.tensor([8, 0, 3, 3])
    assert_same_bits(weight.dequantize_rows(rows), whole[rows])


@pytest.mark.parametrize("tile_elements", [1, 101, 250, 909, 10**6])
def test_tiles_cover_every_row_once(monkeypatch, tile_elements):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    weight = QFTWeight.from_float(heavy_tailed(), SPECS[1])

    tiles = list(weight.row_tiles())

    assert [row for tile in tiles for row in range(tile.start, tile.stop)] == list(range(9))
    assert all(tile.stop - tile.start <= max(1, tile_elements // 101) for tile in tiles)


@pytest.mark.parametrize(
    ("rows", "at_most", "wanted"),
    [(1000, None, [512, 488]), (1000, 300, [256, 256, 256, 232]), (640, 400, [320, 320]),
     (300, 64, [64, 64, 64, 64, 44]), (100, 63, [50, 50])],
)  # fmt: skip
def test_tiles_are_of_like_size_and_begin_at_multiples_of_64(monkeypatch, rows, at_most, wanted):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", 4 * 600)
    weight = QFTWeight.from_float(torch.randn(rows, 4), SPECS[0])

    sizes = [tile.stop - tile.start for tile in weight.row_tiles(at_most=at_most)]

    assert sizes == wanted


# --- as a tensor ----------------------------------------------------------------------------------


def test_it_looks_like_a_float_parameter():
    weight = nn.Parameter(QFTWeight.from_float(heavy_tailed(dtype=torch.bfloat16), SPECS[2]))

    assert isinstance(weight, QFTWeight)
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, tuple(weight.shape), weight.numel()) == (torch.bfloat16, (9, 101), 909)
    assert weight.requires_grad
    assert weight.is_leaf


def test_repr_tells_the_format_and_not_the_values():
    weight = QFTWeight.from_float(heavy_tailed(), SPECS[2])

    assert repr(weight) == (
        "QFTWeight(shape=(9, 101), group_size=17, dtype=torch.float32, device=cpu)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_another_dtype_keeps_the_fields(dtype):
    weight = QFTWeight.from_float(heavy_tailed(), SPECS[2])

    other = weight.to(dtype)

    assert isinstance(other, QFTWeight)
    assert other.dtype == dtype
    for name, field in weight.fields().items():
        assert_same_bits(getattr(other, name), field)
        assert getattr(other, name).data_ptr() != field.data_ptr()
    eps = BF16_EPS if dtype != torch.float64 else 0.0
    torch.testing.assert_close(
        other.dequantize().double(),
        weight.dequantize().double(),
        rtol=eps,
        atol=0.0 if not eps else 1e-7,
    )


def test_an_integer_dtype_is_refused():
    weight = QFTWeight.from_float(heavy_tailed(), SPECS[2])

    with pytest.raises(
        NotImplementedError, match=r"cannot be converted to torch\.int32.*codes are in \.codes"
    ):
        weight.to(torch.int32)


@pytest.mark.parametrize(
    "copy_it",
    [copy.deepcopy, torch.clone, torch.Tensor.detach],
    ids=["deepcopy", "clone", "detach"],
)
def test_copies_are_equal(copy_it):
    weight = nn.Parameter(QFTWeight.from_float(heavy_tailed(), SPECS[2]))

    other = copy_it(weight)

    assert_same_weight(other, weight)
    shared = other.codes.data_ptr() == weight.codes.data_ptr()
    assert shared == (copy_it is torch.Tensor.detach)


def test_deepcopy_keeps_a_parameter_a_trainable_parameter():
    other = copy.deepcopy(nn.Parameter(QFTWeight.from_float(heavy_tailed(), SPECS[2])))

    assert isinstance(other, nn.Parameter)
    assert other.requires_grad


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_saved_parameter_comes_back_bit_for_bit(spec):
    weight = nn.Parameter(QFTWeight.from_float(heavy_tailed(dtype=torch.bfloat16), spec))
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)

    other = torch.load(file, weights_only=False)["weight"]

    assert_same_weight(other, weight)


def test_copy_takes_the_fields_of_an_equal_format():
    source = QFTWeight.from_float(heavy_tailed(seed=1), SPECS[2])
    target = QFTWeight.from_float(heavy_tailed(seed=2), SPECS[2])

    target.copy_(source)

    assert_same_weight(target, source)
    assert target.codes.data_ptr() != source.codes.data_ptr()


def test_what_was_prepared_for_old_values_goes_with_them():
    spec = QuantizationSpec(outlier_fraction=0.02, matmul="int8")
    target = QFTWeight.from_float(heavy_tailed(seed=1), spec)
    source = QFTWeight.from_float(heavy_tailed(seed=2), spec)
    assert not torch.equal(target.stored.shared_columns, source.stored.shared_columns)

    target.copy_(source)

    assert torch.equal(target.stored.shared_columns, source.outlier_columns[0].long())


ALIASES = {
    "data": lambda weight: weight.data,
    "detach": lambda weight: weight.detach(),
    "view": lambda weight: weight.view(weight.shape),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_what_is_written_through_an_alias_is_seen_by_the_weight(alias):
    """`p.data.copy_(q.data)`, as in weight averaging, once left prepared columns of old values."""
    spec = QuantizationSpec(outlier_fraction=0.02, matmul="int8")
    target = QFTWeight.from_float(heavy_tailed(seed=1), spec)
    source = QFTWeight.from_float(heavy_tailed(seed=2), spec)
    assert not torch.equal(target.stored.shared_columns, source.stored.shared_columns)

    alias(target).copy_(alias(source))

    assert_same_weight(target, source)
    assert torch.equal(target.stored.shared_columns, source.outlier_columns[0].long())
    assert target.clone().stored.plans is not target.stored.plans


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_weight_is_scaled_in_place_by_a_number(spec):
    weight = QFTWeight.from_float(heavy_tailed(), spec)
    start, values = weight.clone(), weight.values()

    weight.div_(8)

    assert_same_bits(weight.values(), values / 8)  # a power of two: nothing is rounded
    weight.mul_(torch.tensor(8.0))
    assert_same_weight(weight, start)
    for bad in (0, -1, float("inf"), float("nan"), torch.ones(9, 1)):
        with pytest.raises(NotImplementedError, match=r"call dequantize_model_\(model"):
            weight.mul_(bad)
    assert_same_weight(weight, start)


@pytest.mark.parametrize("limits", [(-0.03, 0.02), (None, 0.01), (-1.0, 1.0), (0.0, None)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_weight_is_clamped_in_place(spec, limits):
    weight = QFTWeight.from_float(heavy_tailed(), spec)
    values = weight.values()
    exact = values.clamp(*limits)

    weight.data.clamp_(*limits)

    now = weight.values()
    is_inside = values == exact
    assert_same_bits(now[is_inside], values[is_inside])
    # Toward zero by less than a code, and never beyond the limit.
    within = (now.abs() <= exact.abs()) & ((exact - now).abs() < scales64(weight).expand_as(now))
    assert bool(within[~is_inside].all())
    assert bool((weight.codes.gather(1, weight.outlier_columns.long()) == 0).all())


def test_a_weight_is_not_clamped_away_from_zero():
    weight = QFTWeight.from_float(heavy_tailed(), SPECS[1])
    with pytest.raises(NotImplementedError, match=r"call dequantize_model_\(model"):
        weight.clamp_(0.01, 0.02)


def test_weights_are_equal_whose_values_are():
    """In transformers, this compares weights that a checkpoint should have tied."""
    weight = QFTWeight.from_float(heavy_tailed(), SPECS[1])
    fields = {name: field.clone() for name, field in weight.fields().items()}
    assert torch.equal(weight, weight.clone())
    # One group of 1000 columns has the scales of whole rows; then, groups of another size.
    assert torch.equal(weight, QFTWeight(**fields, group_size=1000, dtype=torch.float32))
    other_groups = fields | {"scales": fields["scales"].repeat(1, 2) * torch.tensor([1.0, 2.0])}
    assert not torch.equal(weight, QFTWeight(**other_groups, group_size=60, dtype=torch.float32))
    for name, field in fields.items():
        other = weight.clone()
        getattr(other, name)[-1, -1] = field[0, 0] + 1
        assert not torch.equal(weight, other), name


def test_copy_between_group_sizes_is_refused():
    target = QFTWeight.from_float(heavy_tailed(), SPECS[1])

    with pytest.raises(ValueError, match=r"group_size=17.*group_size=None.*formats differ"):
        target.copy_(QFTWeight.from_float(heavy_tailed(), SPECS[2]))


def test_copy_between_outlier_fractions_is_refused():
    """Group sizes agree, the numbers of outliers do not; codes were once copied nevertheless."""
    target = QFTWeight.from_float(heavy_tailed(seed=1), SPECS[0])
    before = copy.deepcopy(target)

    with pytest.raises(ValueError, match="formats differ"):
        target.copy_(QFTWeight.from_float(heavy_tailed(seed=2), SPECS[1]))
    assert_same_weight(target, before)


def test_flatten_and_unflatten_are_inverse():
    weight = QFTWeight.from_float(heavy_tailed(), SPECS[2])

    names, meta = weight.__tensor_flatten__()
    fields = {name: getattr(weight, name) for name in names}
    other = QFTWeight.__tensor_unflatten__(fields, meta, weight.shape, weight.stride())

    assert_same_weight(other, weight)
