"""INT8 products of experts: each has the bits of a linear layer on its own tokens."""

import pytest
import torch
from torch import Tensor, nn

from qft_hf.config import QuantizationSpec
from qft_hf.nn import Groups, Int8Products, grouped_linear, int8, linear
from qft_hf.nn.int8 import min_tokens_of_expert
from qft_hf.optim import QFTLion
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.nn.small import randn
from tests.tolerances import assert_same_bits, snr_db

ROWS, COLUMNS = 19, 261  # of one expert; nothing divides anything
COUNTS = [40, 0, 33, 5, 0, 31, 64]  # tokens of each expert; an INT8 product needs at least 32
E, S = len(COUNTS), sum(COUNTS)
SPEC = QuantizationSpec(matmul="int8", outlier_fraction=0.02)
ALL = Int8Products(seed=5)
CHOICES = [
    Int8Products(forward, input_gradient, weight_gradient, seed=5)
    for forward in (True, False)
    for input_gradient in (True, False)
    for weight_gradient in (True, False)
]
# Elements of a tile: all experts, three, parts of one.
TILES = [10**9, 3 * ROWS * COLUMNS, 1000]


def dense(dtype=torch.float32) -> Tensor:
    """Return values `[E, R, C]` with another outlier column for each expert."""
    values = randn(E, ROWS, COLUMNS, seed=7) * torch.logspace(-3, 0, ROWS)[:, None]
    for expert in range(E):
        values[expert, :, 10 * expert] *= 8
    return values.to(dtype)


def experts(*, transposed=False, dtype=torch.float32) -> nn.Parameter:
    values = dense(dtype)
    if transposed:
        values = values.mT.contiguous()
    return nn.Parameter(QFTWeight.from_float(values, SPEC, transposed=transposed))


def tokens(dtype=torch.float32, seed=1) -> Tensor:
    """Return tokens `[S, C]`, a hundred times as large in one column, another for each expert."""
    x = randn(S, COLUMNS, seed=seed)
    for expert, run in enumerate(runs()):
        x[run, 30 * expert + 7] *= 100
    return x.to(dtype)


def groups(counts=COUNTS) -> Groups:
    return Groups(torch.tensor(counts).cumsum(0).tolist(), torch.device("cpu"))


def runs() -> list[slice]:
    ends = torch.tensor(COUNTS).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, COUNTS, strict=True)]


def run(weight, x, grad_y, products=ALL) -> tuple[Tensor, Tensor, Int8Gradient]:
    """Return the output, the input gradient and the weight gradient."""
    x = x.clone().requires_grad_()
    weight.grad = None
    y = grouped_linear(x, weight, groups(), products=products)
    y.backward(grad_y)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("tile_elements", TILES)
@pytest.mark.parametrize("products", CHOICES, ids=lambda products: str(products) or "none")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_expert_is_a_linear_layer_of_its_tokens(
    monkeypatch, dtype, transposed, products, tile_elements
):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    weight = experts(transposed=transposed, dtype=dtype)
    x, grad_y = tokens(dtype), randn(S, ROWS, seed=3, dtype=dtype)

    y, grad_x, gradient = run(weight, x, grad_y, products)

    assert (gradient.shape, gradient.dtype) == (weight.shape, dtype)
    for expert, part in enumerate(runs()):
        rows = slice(expert * ROWS, (expert + 1) * ROWS)
        if not COUNTS[expert]:
            assert not gradient.codes[rows].any()
            continue
        alone = nn.Parameter(QFTWeight.from_float(dense(dtype)[expert], SPEC))
        own = x.clone().requires_grad_()
        own_y = linear(own[part], alone, products=products)  # alignment changes float sums
        own_y.backward(grad_y[part])
        assert_same_bits(y[part], own_y.detach())
        assert_same_bits(grad_x[part], own.grad[part])
        assert_same_bits(gradient.codes[rows], alone.grad.codes)
        assert_same_bits(gradient.scales[rows], alone.grad.scales)


def test_they_are_near_the_float_products_and_not_equal():
    """Outlier columns are chosen by each expert's own tokens; otherwise this had 20 dB less."""
    weight = experts()
    x, grad_y = tokens(), randn(S, ROWS, seed=3)
    found = run(weight, x, grad_y)
    exact = run(weight, x, grad_y, products=None)

    few = [part for part, count in zip(runs(), COUNTS, strict=True) if 0 < count < 32]
    for part in few:
        assert_same_bits(found[0][part], exact[0][part])
    for ours, its in zip(found, exact, strict=True):
        its, ours = (t.dequantize() if isinstance(t, Int8Gradient) else t for t in (its, ours))
        assert 30 < snr_db(its, ours) < 60


def test_with_few_tokens_each_the_products_are_those_of_dequantized_weights():
    weight = experts()
    x, counts = randn(7 * 31, COLUMNS, seed=1), [31] * 7

    y = grouped_linear(x, weight, groups(counts), products=ALL, training=True)

    assert_same_bits(y, grouped_linear(x, weight, groups(counts), training=True))


@pytest.mark.parametrize("products", [ALL, Int8Products(forward=False, seed=5)])
def test_backward_keeps_codes_and_the_rows_of_experts_with_few_tokens(products):
    weight = experts()
    x = tokens().requires_grad_()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor
    ):
        grouped_linear(x, weight, groups(), products=products)

    floats = [tensor for tensor in held if tensor.dtype == torch.float32 and tensor.shape[-1] > 6]
    assert sorted(len(tensor) for tensor in floats) == [5, 31]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in floats)
    codes = [tensor for tensor in held if tensor.dtype == torch.int8]
    assert sorted(len(tensor) for tensor in codes) == [33, 40, 64]


def test_a_frozen_weight_keeps_nothing_and_passes_the_gradient_on():
    weight, x, grad_y = experts(), tokens(), randn(S, ROWS, seed=3)
    _, expected, _ = run(weight, x, grad_y)
    weight.requires_grad_(False)
    weight.grad = None
    leaf = x.clone().requires_grad_()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = grouped_linear(leaf, weight, groups(), products=ALL)
    y.backward(grad_y)

    assert held == []
    assert_same_bits(leaf.grad, expected)
    assert weight.grad is None


def test_without_gradients_the_output_is_that_of_training():
    weight, x = experts(), tokens()
    y = grouped_linear(x.clone().requires_grad_(), weight, groups(), products=ALL, training=True)
    with torch.no_grad():
        assert_same_bits(grouped_linear(x, weight, groups(), products=ALL), y.detach())


def test_what_is_prepared_for_an_expert_is_dropped_when_its_fields_change():
    weight, other, x = experts(), dense().flip(0), tokens()
    other[:, :, 100] *= 50  # outliers in other columns
    other = nn.Parameter(QFTWeight.from_float(other, SPEC))
    with torch.no_grad():
        grouped_linear(x, weight, groups(), products=ALL)
        expected = grouped_linear(x, other, groups(), products=ALL)
        for name, field in weight.fields().items():
            field.copy_(other.fields()[name])
        weight.fields_changed()
        assert_same_bits(grouped_linear(x, weight, groups(), products=ALL), expected)


@pytest.mark.parametrize("tile_elements", TILES)
def test_release_has_the_bits_of_stack(monkeypatch, tile_elements):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)

    def trained(mode: str) -> nn.Parameter:
        weight = experts(transposed=True)
        optimizer = QFTLion([weight], lr=1e-3, weight_decay=0.1, gradient=mode)
        optimizer.train()
        for step in range(3):
            y = grouped_linear(tokens(seed=step), weight, groups(), products=ALL)
            y.backward(randn(S, ROWS, seed=10 + step))
            optimizer.step()
        return weight

    stack, release = trained("stack"), trained("release")
    for name, field in stack.fields().items():
        assert torch.equal(release.fields()[name], field), name
    assert not torch.equal(stack.codes, experts(transposed=True).codes)


def test_an_expert_has_int8_products_from_its_own_least_number_of_tokens_on(monkeypatch):
    def least(rows: int, columns: int, device_type: str) -> int:
        return {(ROWS, COLUMNS, "cpu"): 40}[rows, columns, device_type]

    monkeypatch.setattr(int8, "min_tokens_of_expert", least)
    weight, x, grad_y = experts(), tokens(), randn(S, ROWS, seed=3)
    y, grad_x, _ = run(weight, x, grad_y)

    for expert, (count, own) in enumerate(zip(COUNTS, runs(), strict=True)):
        of_own = x[own].clone().requires_grad_()
        alone = linear(of_own, weight.data.one(expert), products=ALL if count >= 40 else None)
        alone.backward(grad_y[own])
        assert_same_bits(y[own], alone.detach())
        assert_same_bits(grad_x[own], of_own.grad)


@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [(28_672, 4096, 147), (4096, 14_336, 293), (1536, 2048, 5462), (2**16, 2**14, 32)],
)
def test_on_a_gpu_an_expert_multiplies_enough_to_pay_for_its_launches(rows, columns, tokens):
    assert min_tokens_of_expert(rows, columns, "cuda") == tokens
    assert tokens * rows * columns >= 2**34  # multiplications of a product
    assert min_tokens_of_expert(rows, columns, "cpu") == 32
