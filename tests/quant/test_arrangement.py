"""Weights of other shapes than `[rows, columns]`: experts, and weights that are held transposed.

They are stored as a matrix whose rows are outputs, so each matrix has the bits that it has alone.
"""

import copy
import io
import pickle

import pytest
import torch

from qft_hf.config import QuantizationSpec
from qft_hf.quant import Arrangement, Int8Gradient, QFTWeight
from tests.tolerances import FP32_EPS, assert_same_bits

E, R, C = 3, 10, 300  # gradients have a scale per 256 columns, so their last group is short
SPECS = {
    "rows": QuantizationSpec(),
    "groups": QuantizationSpec(group_size=64),
    "int8": QuantizationSpec(matmul="int8"),
}


def experts(*, transposed: bool = False, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(E, R, C, generator=torch.Generator().manual_seed(0)) * 0.02
    x[1] *= 30  # of another magnitude than its neighbors
    return (x.transpose(1, 2).contiguous() if transposed else x).to(dtype)


def plain(x: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    return x.transpose(-1, -2) if transposed else x


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_expert_is_stored_as_a_matrix_alone_is(spec, transposed):
    x = experts(transposed=transposed, dtype=torch.bfloat16)
    weight = QFTWeight.from_float(x, spec, transposed=transposed)

    assert weight.shape == x.shape
    assert weight.codes.shape == (E * R, C)
    for e, matrix in enumerate(plain(x, transposed=transposed)):
        alone = QFTWeight.from_float(matrix.contiguous(), spec)
        for name, field in alone.fields().items():
            assert torch.equal(weight.fields()[name][e * R : (e + 1) * R], field), name
        assert_same_bits(
            plain(weight.dequantize(), transposed=transposed)[e].contiguous(), alone.dequantize()
        )


def test_a_transposed_matrix_has_the_scales_and_outliers_of_its_outputs():
    matrix = experts()[0]
    weight = QFTWeight.from_float(matrix.t(), QuantizationSpec(), transposed=True)

    assert weight.shape == (C, R)
    assert weight.dequantize().is_contiguous()
    assert_same_bits(weight.dequantize().t().contiguous(), weight.dequantize_rows(slice(0, R)))
    for name, field in QFTWeight.from_float(matrix, QuantizationSpec()).fields().items():
        assert torch.equal(weight.fields()[name], field), name


def test_shapes_alone_are_made_on_the_meta_device():
    x = torch.empty(E, C, R, device="meta")
    weight = QFTWeight.from_float(x, QuantizationSpec(), transposed=True)

    assert weight.shape == x.shape
    assert weight.codes.shape == (E * R, C)
    assert weight.is_meta


def test_a_value_that_is_not_finite_is_refused_in_any_expert():
    x = experts()
    x[2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match="experts has 1 of 9000 values that are NaN or infinite"):
        QFTWeight.from_float(x, QuantizationSpec(), name="experts")


def saved(weight):
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach(),
    "dtype": lambda w: w.to(torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "save": saved,
    "parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("transposed", [False, True])
def test_copies_have_the_shape_and_the_arrangement(copied, transposed):
    weight = QFTWeight.from_float(
        experts(transposed=transposed), QuantizationSpec(), transposed=transposed
    )
    copy = copied(weight)

    assert copy.shape == weight.shape
    assert copy.arrangement == weight.arrangement
    assert torch.equal(copy.dequantize(), weight.dequantize().to(copy.dtype))


def test_a_weight_is_not_copied_into_one_of_another_arrangement():
    square = torch.randn(8, 8)
    one, other = (
        QFTWeight.from_float(square, QuantizationSpec(), transposed=flag) for flag in (False, True)
    )
    with pytest.raises(ValueError, match="their formats differ"):
        one.copy_(other)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_gradient_has_the_shape_of_the_weight_and_the_groups_of_its_rows(transposed):
    x = experts(transposed=transposed)
    arrangement = Arrangement(tuple(x.shape), transposed)
    gradient = Int8Gradient.from_float(x, dtype=x.dtype, arrangement=arrangement)

    matrix = plain(x, transposed=transposed).reshape(E * R, C)
    alone = Int8Gradient.from_float(matrix, dtype=x.dtype)
    assert gradient.shape == x.shape
    assert torch.equal(gradient.codes, alone.codes)
    back = plain(gradient.dequantize(), transposed=transposed).reshape(E * R, C)
    assert_same_bits(back.contiguous(), alone.dequantize())
    assert gradient.detach().arrangement == arrangement  # what autograd leaves in .grad
    total = gradient + gradient.detach()
    assert total.shape == x.shape
    assert torch.equal(total.codes, gradient.codes)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_factor_of_each_expert_scales_its_own(transposed):
    x = experts(transposed=transposed)
    arrangement = Arrangement(tuple(x.shape), transposed)
    gradient = Int8Gradient.from_float(x, dtype=x.dtype, arrangement=arrangement)
    factors = torch.tensor([1.0, 0.0, 0.5]).view(E, 1, 1)

    scaled = gradient * factors

    # Codes are rounded again, to the old scales times the factor, up to FP32 rounding.
    expected = gradient.dequantize() * factors
    torch.testing.assert_close(scaled.dequantize(), expected, rtol=4 * FP32_EPS, atol=0)
    assert torch.equal(scaled.codes[: E * R : 2 * R], gradient.codes[: E * R : 2 * R])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_mask_of_the_shape_of_the_weight_masks_its_own_elements(transposed):
    x = experts(transposed=transposed)
    arrangement = Arrangement(tuple(x.shape), transposed)
    gradient = Int8Gradient.from_float(x, dtype=x.dtype, arrangement=arrangement)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).round()

    masked = gradient * mask

    # Groups have other maxima now and are rounded again, by at most half a scale.
    error = (masked.dequantize() - gradient.dequantize() * mask).abs()
    scales = arrangement.parameter(masked.scales[:, torch.arange(C) // 256])
    assert (error <= 0.5 * scales * (1 + 127 * 4 * FP32_EPS)).all()
    assert not masked.dequantize()[mask == 0].any()
