"""Products with a quantized weight and their gradients, against float modules and float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qft_hf.config import QuantizationSpec
from qft_hf.kernels import expanded_products
from qft_hf.nn import Int8Products, QFTLinear, embedding, linear
from qft_hf.nn.functional import MAX_TOKENS
from qft_hf.nn.loss import linear_cross_entropy
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.nn.small import Alive, Largest, randn
from tests.tolerances import (
    BF16_EPS,
    FP32_EPS,
    assert_same_bits,
    dequantized_matmul_bound,
    matmul_bound,
)
from tests.values import scales64, values64

ROWS, COLUMNS = 19, 261  # more than one gradient group, nothing divides anything
LEADING = [(), (2,), (2, 4), (1, 3, 2)]
SPECS = [
    QuantizationSpec(outlier_fraction=0.0),
    QuantizationSpec(group_size=50, outlier_fraction=0.02),
]


def make_weight(spec=SPECS[1], dtype=torch.float32, rows=ROWS, columns=COLUMNS):
    weight = QFTWeight.from_float(randn(rows, columns, seed=7, dtype=dtype) * 0.05, spec)
    return nn.Parameter(weight)


# --- linear ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_equals_the_float_module(dtype, leading, with_bias, spec):
    eps = FP32_EPS if dtype == torch.float32 else BF16_EPS
    weight = make_weight(spec, dtype)
    dense = weight.dequantize()
    bias = nn.Parameter(randn(ROWS, seed=2, dtype=dtype)) if with_bias else None
    x = randn(*leading, COLUMNS, seed=1, dtype=dtype).requires_grad_()
    grad_y = randn(*leading, ROWS, seed=3, dtype=dtype)

    y = linear(x, weight, bias)
    y.backward(grad_y)

    # The same product of the same numbers: the same bits.
    assert_same_bits(y.detach(), F.linear(x, dense, bias).detach())
    x_rows, grad_rows = x.detach().reshape(-1, COLUMNS), grad_y.reshape(-1, ROWS)
    exact = grad_rows.double() @ dense.double()
    error = (x.grad.reshape(-1, COLUMNS).double() - exact).abs()
    assert (error <= matmul_bound(grad_rows, dense, eps)).all()
    gradient = weight.grad
    assert isinstance(gradient, Int8Gradient)
    assert gradient.dtype == dtype
    exact = grad_rows.t().double() @ x_rows.double()
    stored = values64(gradient)
    noise = matmul_bound(grad_rows.t(), x_rows, eps) + 8 * FP32_EPS * exact.abs()
    assert ((stored - exact).abs() <= 0.5 * scales64(gradient) + noise).all()
    if bias is not None:
        error = (bias.grad.double() - grad_rows.double().sum(dim=0)).abs()
        assert (error <= len(grad_rows) * eps * grad_rows.double().abs().sum(dim=0)).all()
        assert bias.grad.dtype == dtype


@pytest.mark.parametrize("tile_elements", [1, 700, 2 * 261, 18 * 261])  # 1, 2, 2 and 18 rows
def test_row_tiles_agree_with_the_whole(monkeypatch, tile_elements):
    x = randn(5, COLUMNS, seed=1)
    grad_y = randn(5, ROWS, seed=3)
    bias = nn.Parameter(randn(ROWS, seed=2))
    results = []
    for elements in (10**9, tile_elements):
        monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", elements)
        weight, leaf = make_weight(), x.clone().requires_grad_()
        bias.grad = None
        y = linear(leaf, weight, bias)
        y.backward(grad_y)
        results.append((y.detach(), leaf.grad, weight.grad, bias.grad))
    (y, grad_x, gradient, grad_bias), (tiled_y, tiled_grad_x, tiled, tiled_grad_bias) = results

    dense = make_weight().dequantize()
    # The same sums in another order: both are within the bound of the exact value.
    y_bound = matmul_bound(x, dense.t()) + 2 * FP32_EPS * (y.abs() + bias.abs())
    assert ((y - tiled_y).abs() <= 2 * y_bound).all()
    assert ((grad_x - tiled_grad_x).abs() <= 2 * matmul_bound(grad_y, dense)).all()
    bound = 2 * matmul_bound(grad_y.t(), x) + scales64(gradient)
    assert ((gradient.dequantize() - tiled.dequantize()).abs() <= bound).all()
    assert_same_bits(tiled_grad_bias, grad_bias)


@pytest.mark.parametrize("tile_elements", [10**9, 700])
def test_tiles_of_a_bf16_weight_add_up_in_fp32(monkeypatch, tile_elements):
    """A tile adds 256, 64 others 0.5 each; BF16, with a spacing of 2 at 256, would lose those."""
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    weight = nn.Parameter(
        QFTWeight.from_float(torch.ones(130, COLUMNS, dtype=torch.bfloat16), SPECS[1])
    )
    x = randn(3, COLUMNS, seed=1, dtype=torch.bfloat16).requires_grad_()
    grad_y = torch.full((3, 130), 0.25, dtype=torch.bfloat16)
    grad_y[:, 0], grad_y[:, 1] = 256, 0

    linear(x, weight).backward(grad_y)

    assert (x.grad == 256 + 128 * 0.25).all()


@pytest.mark.parametrize("tile_elements", [COLUMNS, 700])
def test_no_more_of_a_weight_than_a_tile_is_float_at_a_time(monkeypatch, tile_elements):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    weight = make_weight()
    x = randn(1, COLUMNS, seed=1).requires_grad_()

    with Largest() as largest:
        linear(x, weight).sum().backward()

    assert largest.elements == tile_elements // COLUMNS * COLUMNS


def test_one_tile_is_float_at_a_time(monkeypatch):
    """A loop over tiles once kept the last one while it computed the next."""
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", 64 * 100)
    weight = nn.Parameter(QFTWeight.from_float(randn(600, 100), QuantizationSpec()))
    x = randn(1, 100, seed=1).requires_grad_()

    with Alive(at_least=5000) as alive:
        linear(x, weight).sum().backward()

    assert alive.elements == 64 * 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs(dtype):
    weight = make_weight(dtype=dtype)
    bias = nn.Parameter(randn(ROWS, seed=2, dtype=dtype))
    x = randn(2, 3, COLUMNS, seed=1).requires_grad_()  # fp32, whatever the weight's dtype

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight, bias)
        expected = F.linear(x, weight.dequantize(), bias)
    y.backward(torch.ones_like(y))

    assert y.dtype == torch.bfloat16
    assert_same_bits(y.detach(), expected.detach())
    assert (x.grad.dtype, bias.grad.dtype, weight.grad.dtype) == (torch.float32, dtype, dtype)
    grad_rows = torch.ones(6, ROWS)
    exact = grad_rows.t().double() @ x.detach().reshape(6, COLUMNS).double()
    bound = matmul_bound(grad_rows.t(), x.detach().reshape(6, COLUMNS), 2 * BF16_EPS)
    error = (weight.grad.dequantize().double() - exact).abs()
    bf16 = (BF16_EPS if dtype == torch.bfloat16 else 0.0) * exact.abs()
    assert (error <= 0.5 * scales64(weight.grad) + bound + bf16).all()


def test_an_input_of_another_dtype_is_refused():
    with pytest.raises(
        TypeError, match=r"weight's dtype torch\.bfloat16, got torch\.float32.*Cast"
    ):
        linear(randn(2, COLUMNS), make_weight(dtype=torch.bfloat16))


def test_a_frozen_weight_gets_no_gradient_keeps_nothing_and_passes_it_on():
    weight = make_weight().requires_grad_(False)
    x = randn(2, COLUMNS).requires_grad_()

    y = linear(x, weight)
    assert [t for t in y.grad_fn.saved_tensors if t is not None] == []
    y.sum().backward()

    assert weight.grad is None
    error = (x.grad.double() - weight.dequantize().double().sum(dim=0)).abs()
    assert (error <= matmul_bound(torch.ones(2, ROWS), weight.dequantize())).all()


def test_without_an_input_gradient_the_weight_still_gets_its_own():
    weight = make_weight()

    linear(randn(2, COLUMNS), weight).sum().backward()

    assert weight.grad is not None


def test_gradients_of_two_backward_passes_add():
    weight, once = make_weight(), make_weight()
    for seed in (1, 2):
        linear(randn(4, COLUMNS, seed=seed), weight).sum().backward()
    linear(torch.cat([randn(4, COLUMNS, seed=seed) for seed in (1, 2)]), once).sum().backward()

    error = (weight.grad.dequantize() - once.grad.dequantize()).abs().double()
    # Each part, their sum and the whole are rounded. Here, scales of the parts are at most twice as
    # large as those of their sum.
    assert (error <= 3 * scales64(once.grad)).all()


def test_a_gradient_that_is_not_finite_arrives_as_such():
    weight = make_weight()

    y = linear(randn(4, COLUMNS), weight)
    y.backward(torch.full_like(y, float("nan")))

    assert not weight.grad.scales.isfinite().all()


# --- few tokens without gradients -----------------------------------------------------------------


@pytest.fixture
def never_expanded(monkeypatch):
    """Make every expansion of a weight fail."""

    def refuse(*_, **__):
        raise AssertionError("a weight was expanded")

    monkeypatch.setattr(expanded_products, "expand", refuse)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("leading", [*LEADING, (1, MAX_TOKENS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_leave_the_weight_in_int8(dtype, leading, context, with_bias, spec, request):
    weight = make_weight(spec, dtype)
    dense = weight.dequantize()
    bias = nn.Parameter(randn(ROWS, seed=2, dtype=dtype)) if with_bias else None
    x = randn(*leading, COLUMNS, seed=1, dtype=dtype)
    request.getfixturevalue("never_expanded")

    with context():
        y = linear(x, weight, bias)

    assert (y.dtype, y.shape) == (dtype, (*leading, ROWS))
    rows = x.reshape(-1, COLUMNS)
    exact = rows.double() @ dense.double().t() + (0 if bias is None else bias.double())
    error = (y.reshape(-1, ROWS).double() - exact).abs()
    assert (error <= dequantized_matmul_bound(rows, dense, bias)).all()


@pytest.mark.parametrize("products", [None, Int8Products()], ids=["float", "int8"])
def test_models_with_int8_products_too(products, never_expanded):
    weight = make_weight(QuantizationSpec(matmul="int8", outlier_fraction=0.02))

    with torch.no_grad():
        linear(randn(3, COLUMNS), weight, products=products)


def test_under_autocast_few_tokens_are_of_its_dtype(never_expanded):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(randn(3, COLUMNS), make_weight(), randn(ROWS))

    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "native_bf16", "most"),
    [(torch.float32, True, 16), (torch.bfloat16, False, 16), (torch.bfloat16, True, 4)],
    ids=str,
)
def test_fewer_tokens_are_few_where_bf16_is_native(dtype, native_bf16, most, monkeypatch):
    expanded: list[int] = []
    expand = expanded_products.expand
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native_bf16)
    monkeypatch.setattr(
        expanded_products, "expand", lambda *dtypes: expanded.append(tokens) or expand(*dtypes)
    )

    with torch.no_grad():
        for tokens in (most, most + 1):
            linear(randn(tokens, COLUMNS, dtype=dtype), make_weight(dtype=dtype))

    assert expanded == [most + 1]


@pytest.mark.parametrize("tokens", [0, 1, MAX_TOKENS + 1])
def test_in_training_and_with_more_tokens_the_product_is_as_ever(tokens):
    """A checkpointed layer must compute the same bits again when backward repeats it."""
    weight, x = make_weight(), randn(tokens, COLUMNS, seed=1)
    layer = QFTLinear(COLUMNS, ROWS, bias=False)
    layer.weight = weight
    expected = F.linear(x, weight.dequantize())

    assert_same_bits(linear(x, weight).detach(), expected)
    with torch.no_grad():
        assert_same_bits(layer.train()(x), expected)
        assert_same_bits(linear(x, weight, training=True), expected)
        evaluated = layer.eval()(x)
    assert torch.equal(evaluated, expected) == (tokens != 1)


# --- embedding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(1,), (6,), (3, 5), (2, 2, 2)], ids=str)
def test_embedding_equals_the_float_module(leading, dtype, spec):
    weight = make_weight(spec, dtype)
    ids = torch.randint(0, ROWS, leading, generator=torch.Generator().manual_seed(0))
    grad_y = randn(*leading, COLUMNS, seed=3, dtype=dtype)

    y = embedding(ids, weight)
    y.backward(grad_y)

    assert_same_bits(y.detach(), F.embedding(ids, weight.dequantize()).detach())
    exact = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    exact.index_add_(0, ids.flatten(), grad_y.reshape(-1, COLUMNS).double())
    gradient = weight.grad
    stored = values64(gradient)
    noise = (ids.numel() + 8) * FP32_EPS * grad_y.double().abs().sum()
    assert ((stored - exact).abs() <= 0.5 * scales64(gradient) + noise).all()
    unused = sorted(set(range(ROWS)) - set(ids.flatten().tolist()))
    assert (gradient.codes[unused] == 0).all()
    assert (gradient.scales[unused] == 1).all()


def test_a_row_looked_up_often_adds_up_in_fp32():
    """1000 equal BF16 gradients: a BF16 sum would stop growing at 256."""
    weight = make_weight(dtype=torch.bfloat16)
    ids = torch.full((1000,), 4)

    y = embedding(ids, weight)
    y.backward(torch.ones_like(y))

    assert scales64(weight.grad)[4, 0].item() * 127 == pytest.approx(1000, rel=1e-6)
    assert (weight.grad.codes[4] == 127).all()


def test_the_padding_row_gets_no_gradient():
    weight = make_weight()
    ids = torch.tensor([[3, 5], [3, 0]])

    y = embedding(ids, weight, padding_idx=3)
    y.backward(torch.ones_like(y))

    assert (weight.grad.codes[3] == 0).all()
    assert (weight.grad.codes[[0, 5]] == 127).all()
    assert_same_bits(y.detach()[0, 0], weight.dequantize()[3])


def test_no_ids_give_no_gradient_and_no_error():
    weight = make_weight()

    y = embedding(torch.zeros(2, 0, dtype=torch.int64), weight)
    y.sum().backward()

    assert tuple(y.shape) == (2, 0, COLUMNS)
    assert (weight.grad.codes == 0).all()


def test_ids_may_be_int32():
    weight = make_weight()

    y = embedding(torch.tensor([1, 4], dtype=torch.int32), weight)
    y.sum().backward()

    assert_same_bits(y.detach(), weight.dequantize()[[1, 4]])
    assert np.flatnonzero(weight.grad.codes.any(dim=1)).tolist() == [1, 4]


CREATED = {
    "linear": lambda x, ids, weight: linear(x, weight),
    "INT8 products": lambda x, ids, weight: linear(x, weight, products=Int8Products()),
    "embedding": lambda x, ids, weight: embedding(ids, weight),
    "loss": lambda x, ids, weight: linear_cross_entropy(x, weight, ids),
}


@pytest.mark.parametrize("of", ["x", "weight"])
@pytest.mark.parametrize("name", CREATED)
def test_gradients_that_would_be_differentiated_again_are_refused(name, of):
    """`torch.autograd.grad` left out all that goes through the weight: zeros instead of H v."""
    weight = make_weight(QuantizationSpec(), rows=64, columns=64)
    x, ids = randn(32, 64).requires_grad_(), torch.arange(32)
    leaf = weight if of == "weight" or name == "embedding" else x

    def gradient(**how):
        y = CREATED[name](x, ids, weight).square().sum()
        return torch.autograd.grad(y, [leaf], **how)

    with pytest.raises(RuntimeError, match=r"create_graph=True.*reached a quantized weight"):
        gradient(create_graph=True)
    assert gradient()[0].shape == leaf.shape
