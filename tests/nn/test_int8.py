"""INT8 products and their gradients, against float64 and against the dequantizing products."""

import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from qft_hf.config import QuantizationSpec
from qft_hf.nn import Int8Products, int8, linear
from qft_hf.quant import QFTWeight
from tests.nn.small import randn
from tests.tolerances import BF16_EPS, FP32_EPS, assert_same_bits, snr_db
from tests.values import scales64, values64

TOKENS, ROWS, COLUMNS = 37, 19, 261  # more than one gradient group, nothing divides anything
SPEC = QuantizationSpec(matmul="int8", outlier_fraction=0.02)
SPECS = [SPEC, QuantizationSpec(matmul="int8", outlier_fraction=0.0)]
ALL = Int8Products(seed=5)


def make_weight(spec=SPEC, dtype=torch.float32, rows=ROWS):
    values = randn(rows, COLUMNS, seed=7) * torch.logspace(-3, 0, rows)[:, None]
    values[:, 100] *= 8  # an outlier column
    return nn.Parameter(QFTWeight.from_float(values.to(dtype), spec))


def run(weight, x, grad_y, *, products=ALL, bias=None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the input gradient, and the weight gradient as it is stored."""
    x = x.clone().requires_grad_()
    weight.grad = None
    y = linear(x, weight, bias, products=products)
    y.backward(grad_y)
    return y.detach(), x.grad, weight.grad.dequantize()


def quantized_input(x, weight) -> int8.kernels.Input:
    return int8.quantized_input(x, n_outliers=weight.outlier_values.shape[1])


def used(x, weight) -> Tensor:
    """Return the input as it was quantized, in float64."""
    operand = quantized_input(x, weight)
    values = operand.codes.double() * operand.scales.double()
    values[:, operand.columns] = operand.values.double()
    return values


# --- the three products ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=["outlier columns", "none"])
@pytest.mark.parametrize("leading", [(37,), (1, 37), (5, 7)], ids=str)
def test_the_output_is_off_by_the_rounding_of_the_input_alone(leading, spec):
    weight = make_weight(spec)
    x, bias = randn(*leading, COLUMNS, seed=1), randn(ROWS, seed=2)
    x[..., 7] *= 100  # an outlier column, as in language models

    y = linear(x, weight, bias, products=ALL)

    exact = x.double() @ weight.dequantize().double().t() + bias.double()
    # Each element of x moves by at most half its token's scale, which outlier columns do not set.
    others = x.clone()
    others[..., quantized_input(x, weight).columns] = 0
    half = 0.5 * others.double().abs().amax(-1, keepdim=True) / 127
    codes = weight.codes.double().abs() * weight.scales.double()
    size = x.double().abs() @ weight.dequantize().double().abs().t() + bias.double().abs()
    bound = half * codes.sum(dim=1) + (COLUMNS + 8) * FP32_EPS * size
    assert y.shape == (*leading, ROWS)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("spec", SPECS, ids=["outlier columns", "none"])
def test_gradients_are_off_by_less_than_one_code_of_each_term(spec):
    weight, x, grad_y = make_weight(spec), randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, ROWS)
    x[:, 7] *= 100

    _, grad_x, _ = run(weight, x, grad_y)

    # grad_x: the gradient, times the weight's scales, is rounded to one of two neighboring codes.
    g, dense = grad_y.double(), weight.dequantize().double()
    scale = (g * weight.scales.double().t()).abs().amax(dim=1, keepdim=True) / 127
    bound = scale * weight.codes.double().abs().sum(dim=0) + ROWS * FP32_EPS * (
        g.abs() @ dense.abs()
    )
    assert ((grad_x.double() - g @ dense).abs() <= bound * (1 + 8 * FP32_EPS)).all()

    # grad_W: the product with the input as it was quantized, rounded again to be stored.
    codes, scales = quantized_input(x, weight)[:2]
    x_used = used(x, weight)
    scale = (g * scales.double()).abs().amax(dim=0)[:, None] / 127
    exact = g.t() @ x_used
    bound = scale * codes.double().abs().sum(dim=0) + 0.5 * scales64(weight.grad)
    error = (values64(weight.grad) - exact).abs()
    assert (error <= bound + 8 * FP32_EPS * (g.abs().t() @ x_used.abs())).all()


def test_gradients_are_unbiased():
    """The mean over seeds approaches the exact gradient with one over the root of their number."""
    weight, x, grad_y = make_weight(SPECS[1]), randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, ROWS)
    n_seeds = 400
    g = grad_y.double()
    operand = quantized_input(x, weight)
    codes, x_scales = operand[:2]
    sums = [torch.zeros(TOKENS, COLUMNS).double(), torch.zeros(ROWS, COLUMNS).double()]

    for seed in range(n_seeds):
        of_x, of_weight = int8.quantized_gradient(grad_y, weight, operand, for_x=True, seed=seed)
        sums[0] += int8.input_gradient(of_x, weight)
        sums[1] += int8.kernels.int8_matmul(
            of_weight.codes, codes, of_weight.scales, None, dtype=torch.float32
        )

    x_used = used(x, weight)
    row_scales = (g * weight.scales.double().t()).abs().amax(dim=1, keepdim=True) / 127
    column_scales = (g * x_scales.double()).abs().amax(dim=0)[:, None] / 127
    for total, exact, scale, others in (
        (sums[0], g @ weight.dequantize().double(), row_scales, weight.codes.double()),
        (sums[1], g.t() @ x_used, column_scales, codes.double()),
    ):
        # A code has a standard deviation of at most one half; six standard errors of the mean.
        deviation = 0.5 * scale * others.square().sum(dim=0).sqrt() / n_seeds**0.5
        error = (total / n_seeds - exact).abs()
        assert (error <= 6 * deviation).all()
        assert error.square().mean() <= 1.2 * deviation.square().mean()


@pytest.mark.parametrize("chosen", [*itertools.product([False, True], repeat=3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_product_is_int8_or_has_the_bits_of_the_dequantizing_one(dtype, chosen):
    weight = make_weight(dtype=dtype)
    x, grad_y = randn(TOKENS, COLUMNS, seed=1, dtype=dtype), randn(TOKENS, ROWS, dtype=dtype)
    bias = nn.Parameter(randn(ROWS, seed=2, dtype=dtype))

    results = []
    for products in (Int8Products(*chosen, seed=ALL.seed), ALL, None):
        bias.grad = None
        results.append((*run(weight, x, grad_y, products=products, bias=bias), bias.grad))

    ours, in_int8, in_float = results
    for index, is_int8 in enumerate(chosen):
        assert ours[index].dtype == dtype
        assert_same_bits(ours[index], (in_int8 if is_int8 else in_float)[index])
        assert 30 < snr_db(in_float[index], in_int8[index]) < 60
    assert_same_bits(ours[3], in_float[3])


@pytest.mark.parametrize("tile_elements", [1, 700, 18 * COLUMNS])
def test_row_tiles_change_no_bit(monkeypatch, tile_elements):
    weight, x, grad_y = make_weight(), randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, ROWS)
    whole = run(weight, x, grad_y)
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)

    for result, expected in zip(run(weight, x, grad_y), whole, strict=True):
        assert_same_bits(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_quantizes_the_input_as_it_came(dtype):
    weight, grad_y = make_weight(dtype=dtype), randn(TOKENS, ROWS, dtype=torch.bfloat16)
    x = randn(TOKENS, COLUMNS, seed=1).requires_grad_()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight, products=ALL)
    y.backward(grad_y)

    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32, dtype)
    reference = make_weight(dtype=dtype).float()
    full = linear(x.detach(), reference, products=ALL)
    # The integers are the same; BF16 rounds the outlier columns once and the sum twice.
    size = x.detach().double().abs() @ weight.dequantize().double().abs().t()
    assert ((y.double() - full.double()).abs() <= 4 * BF16_EPS * size).all()


def test_the_same_step_gives_the_same_bits_and_another_seed_does_not():
    weight, x, grad_y = make_weight(), randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, ROWS)
    first = run(weight, x, grad_y)

    for result, expected in zip(run(weight, x, grad_y), first, strict=True):
        assert_same_bits(result, expected)
    y, grad_x, gradient = run(weight, x, grad_y, products=Int8Products(seed=6))
    assert_same_bits(y, first[0])
    assert not torch.equal(grad_x, first[1])
    assert not torch.equal(gradient, first[2])


# --- which gradients are needed -------------------------------------------------------------------


def test_a_frozen_weight_gets_no_gradient_and_keeps_nothing():
    weight, x, grad_y = make_weight(), randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, ROWS)
    _, expected, _ = run(weight, x, grad_y)
    weight.requires_grad_(False)
    weight.grad = None
    leaf = x.clone().requires_grad_()

    y = linear(leaf, weight, products=ALL)

    assert y.grad_fn.saved_tensors == ()
    y.backward(grad_y)
    assert weight.grad is None
    assert_same_bits(leaf.grad, expected)


def test_without_an_input_gradient_the_weight_still_gets_its_own():
    weight, x, grad_y = make_weight(), randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, ROWS)
    _, _, expected = run(weight, x, grad_y)
    weight.grad = None

    linear(x, weight, products=ALL).backward(grad_y)

    assert_same_bits(weight.grad.dequantize(), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_what_training_does(context):
    weight, x = make_weight(), randn(TOKENS, COLUMNS, seed=1)
    trained = linear(x.clone().requires_grad_(), weight, products=ALL)

    with context():
        evaluated = linear(x.clone(), weight, products=ALL)

    assert_same_bits(evaluated.clone(), trained.detach())


@pytest.mark.parametrize("tokens", [0, 1, int8.MIN_TOKENS - 1])
def test_few_tokens_take_the_dequantized_weight(tokens):
    weight, x = make_weight(), randn(1, tokens, COLUMNS, seed=1)

    assert_same_bits(linear(x, weight, products=ALL).detach(), linear(x, weight).detach())


def test_from_the_limit_on_products_are_int8():
    weight, x = make_weight(), randn(2, int8.MIN_TOKENS // 2, COLUMNS, seed=1)

    assert not torch.equal(linear(x, weight, products=ALL), linear(x, weight))


@pytest.mark.parametrize(
    ("products", "expected"),
    [
        (ALL, TOKENS * (COLUMNS + 4 + 6 * 2) + 6 * 8),  # six outlier columns in bf16
        (Int8Products(weight_gradient=False), TOKENS * COLUMNS * 2),
        (Int8Products(forward=False), TOKENS * (COLUMNS + 4 + 6 * 2) + 6 * 8),
    ],
    ids=["all", "float weight gradient", "float forward"],
)
def test_backward_keeps_codes_of_the_input_and_not_the_input(products, expected):
    weight, x = make_weight(dtype=torch.bfloat16), randn(TOKENS, COLUMNS, dtype=torch.bfloat16)

    y = linear(x.requires_grad_(), weight, products=products)

    kept = y.grad_fn.saved_tensors
    assert not any(isinstance(t, QFTWeight) for t in kept)
    assert sum(t.untyped_storage().nbytes() for t in kept) == expected


def test_an_input_whose_codes_are_kept_is_freed():
    weight, leaf = make_weight(), randn(TOKENS, COLUMNS).requires_grad_()
    x = leaf * 2
    reference = weakref.ref(x)

    y = linear(x, weight, products=ALL)
    del x

    assert reference() is None
    y.sum().backward()
    assert leaf.grad is not None


def test_tokens_and_weights_of_zeros_take_no_codes_from_the_others():
    """A large scale, multiplied into the gradient, takes up the codes; theirs is the smallest."""
    x, grad_y = randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, ROWS)
    x *= 1e-4  # as small against 1 as real scales are
    x[4] = 0
    values = make_weight().dequantize()
    values[6] = 0
    weight = nn.Parameter(QFTWeight.from_float(values, SPEC))

    y, grad_x, gradient = run(weight, x, grad_y)

    dense = weight.dequantize()
    assert snr_db(x @ dense.t(), y) > 30
    assert snr_db(grad_y @ dense, grad_x) > 30
    assert snr_db(grad_y.t() @ x, gradient) > 30
    assert_same_bits(y[4], torch.zeros(ROWS))


def test_a_token_that_is_not_finite_shows_and_leaves_the_others_alone():
    weight, x = make_weight(), randn(TOKENS, COLUMNS, seed=1)
    clean = linear(x, weight, products=ALL).detach()
    x[3, 5] = float("inf")

    y = linear(x, weight, products=ALL).detach()

    # Its column is now an outlier column; the others are rounded again, near their old values.
    assert not y[3].isfinite().any()
    others = torch.arange(TOKENS) != 3
    assert snr_db(clean[others], y[others]) > 30


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_arrives_as_such(value):
    weight, x, grad_y = make_weight(), randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, ROWS)
    grad_y[2, 1] = value
    x.requires_grad_()

    linear(x, weight, products=ALL).backward(grad_y)

    assert not weight.grad.scales.isfinite().all()
    assert not x.grad[2].isfinite().any()


# --- one quantization for all that read the same input --------------------------------------------


@pytest.fixture
def quantized(monkeypatch) -> list[Tensor]:
    """Record every tensor that is quantized as an input."""
    seen: list[Tensor] = []
    quantize = int8.quantize

    def record(x: Tensor, *, n_outliers: int) -> int8.kernels.Input:
        seen.append(x.detach().clone())
        return quantize(x, n_outliers=n_outliers)

    monkeypatch.setattr(int8, "quantize", record)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_layers_that_read_the_same_input_share_its_codes(quantized, grad, autocast):
    weights, x = [make_weight() for _ in range(3)], randn(TOKENS, COLUMNS, seed=1)

    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [linear(x, weight, products=ALL) for weight in weights]

    assert len(quantized) == 1
    for output in outputs[1:]:
        assert_same_bits(output.detach(), outputs[0].detach())
    if grad:
        assert len({y.grad_fn.saved_tensors[1].data_ptr() for y in outputs}) == 1


def test_an_input_that_changed_in_place_is_quantized_again(quantized):
    weight, x = make_weight(), randn(TOKENS, COLUMNS, seed=1)
    linear(x, weight, products=ALL)

    x.mul_(2)
    y = linear(x, weight, products=ALL)

    assert len(quantized) == 2
    assert_same_bits(y, linear(x.clone(), weight, products=ALL))


def test_weights_with_other_numbers_of_outlier_columns_do_not_share(quantized):
    x = randn(TOKENS, COLUMNS, seed=1)
    outputs = [linear(x, make_weight(spec), products=ALL) for spec in (*SPECS, SPECS[0])]

    assert len(quantized) == 3
    assert_same_bits(outputs[2], outputs[0])


def test_the_largest_channels_of_the_input_stay_float():
    """They would set the scale of every token, and the others would have no codes left."""
    weight, x, grad_y = make_weight(), randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, ROWS)
    x[:, [7, 200]] *= 300
    x[5, 30] = -500.0

    operand = quantized_input(x, weight)
    y, _, gradient = run(weight, x, grad_y)

    assert {7, 30, 200} < set(operand.columns.tolist())
    assert_same_bits(operand.values, x[:, operand.columns])
    others = x.index_fill(1, operand.columns, 0.0)
    for tensor, wanted in zip(
        operand[:2], int8.kernels.quantize(others, group_size=None), strict=True
    ):
        assert_same_bits(tensor, wanted)
    ordinary = torch.tensor([c for c in range(COLUMNS) if c not in (7, 30, 200)])
    dense = weight.dequantize()
    outlying = x.clone()
    outlying[:, ordinary] = 0
    small, small_y = x - outlying, y - outlying @ dense.t()
    assert snr_db(small @ dense.t(), small_y) > 30
    for column in (7, 200):
        assert snr_db(grad_y.t() @ x[:, column], gradient[:, column]) > 40


def test_another_input_takes_the_place_of_the_last(quantized):
    weight, x, other = make_weight(), randn(TOKENS, COLUMNS, seed=1), randn(TOKENS, COLUMNS, seed=2)

    for tensor in (x, other, x, x.clone()):
        assert_same_bits(
            linear(tensor, weight, products=ALL),
            linear(tensor.clone(), weight, products=ALL),
        )


def test_codes_go_when_their_input_goes():
    x = randn(TOKENS, COLUMNS, seed=1)
    codes = int8.quantized_input(x, n_outliers=2).codes
    assert int8._slots.slot.entry[2].codes is codes

    del x
    gc.collect()

    assert int8._slots.slot.entry is None


def test_threads_do_not_share(quantized):
    x = randn(TOKENS, COLUMNS, seed=1)
    int8.quantized_input(x, n_outliers=2)

    thread = threading.Thread(target=int8.quantized_input, args=(x,), kwargs={"n_outliers": 2})
    thread.start()
    thread.join()
    int8.quantized_input(x, n_outliers=2)

    assert len(quantized) == 2


def test_an_inference_tensor_has_no_version_and_is_quantized_each_time(quantized):
    weight = make_weight()
    with torch.inference_mode():
        x = randn(TOKENS, COLUMNS, seed=1)
        first = linear(x, weight, products=ALL)
        x.mul_(2)
        second = linear(x, weight, products=ALL)

    assert len(quantized) == 2
    assert not torch.equal(first, second)
