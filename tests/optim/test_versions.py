"""A backward pass through a weight that has changed since its forward pass raises, as in float."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qft_hf import QFTConfig, dequantize_model_, quantize_model_
from qft_hf.config import QuantizationSpec
from qft_hf.nn import Groups, Int8Products, grouped_linear
from qft_hf.optim import QFTAdamW, QFTLion
from qft_hf.quant import QFTWeight
from tests.nn.small import randn

SINCE = r"has changed since the forward pass .* Run backward of every forward pass before the step"


class Experts(nn.Module):
    """Three experts for six tokens."""

    def __init__(self, products: Int8Products | None) -> None:
        super().__init__()
        spec = QuantizationSpec()
        self.weight = nn.Parameter(QFTWeight.from_float(randn(3, 20, 20, seed=1), spec))
        self.products = products

    def forward(self, x):
        groups = Groups([2, 2, 6], x.device)
        return grouped_linear(x, self.weight, groups, products=self.products, training=True)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind.startswith("experts"):
        return Experts(Int8Products() if kind == "experts, int8" else None)
    layer = Conv1D(20, 20) if kind == "conv1d" else nn.Linear(20, 20, bias=False)
    config = QFTConfig(matmul="int8" if kind == "linear, int8" else "dequantize")
    return quantize_model_(nn.Sequential(layer), config)


KINDS = ["linear", "linear, int8", "conv1d", "experts", "experts, int8"]


@pytest.fixture(autouse=True)
def few_tokens_are_enough(monkeypatch):
    monkeypatch.setattr("qft_hf.nn.int8.MIN_TOKENS", 1)
    monkeypatch.setattr("qft_hf.nn.int8.min_tokens_of_expert", lambda *_: 1)


@pytest.mark.parametrize("gradient", ["stack", "release"])
@pytest.mark.parametrize("rule", [QFTLion, QFTAdamW])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_step(kind, rule, gradient):
    """It once continued silently, with an input gradient of another weight than the forward's."""
    model = make(kind)
    optimizer = rule(model.parameters(), lr=1e-2, gradient=gradient)
    x = randn(6, 20, seed=2).requires_grad_()
    first, second = model(x).sum(), model(x).square().sum()
    first.backward()
    optimizer.step()
    x.grad = None

    with pytest.raises(RuntimeError, match=SINCE):
        second.backward()
    assert x.grad is None
    model(x).sum().backward()  # a new forward pass is valid


@pytest.mark.parametrize("kind", ["linear", "linear, int8"])
@pytest.mark.parametrize("way", ["load_state_dict", "copy_"])
def test_after_another_state_was_loaded(way, kind):
    model, other = make(kind), make(kind)
    y = model(randn(6, 20, seed=2).requires_grad_()).sum()
    if way == "load_state_dict":
        model.load_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            model[0].weight.copy_(other[0].weight)

    with pytest.raises(RuntimeError, match=SINCE):
        y.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_but_a_gradient_of_the_weight_alone_needs_no_values_of_it(kind):
    model = make(kind)
    optimizer = QFTLion(model.parameters(), lr=1e-2)
    x = randn(6, 20, seed=2)
    first, second = model(x).sum(), model(x).sum()
    first.backward()
    gradient = next(model.parameters()).grad.clone()
    optimizer.step()

    second.backward()
    assert torch.equal(next(model.parameters()).grad.codes, gradient.codes)


def test_several_passes_before_one_step_are_right():
    model = make("linear")
    optimizer = QFTLion(model.parameters(), lr=1e-2)
    x = randn(6, 20, seed=2).requires_grad_()
    losses = [model(x).sum() for _ in range(3)]
    for loss in losses:
        loss.backward()
    optimizer.step()
    expected = make("linear")[0].weight.dequantize().sum(0).expand(6, 20) * 3
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("kind", ["linear", "linear, int8", "conv1d", "embedding"])
def test_after_the_model_was_dequantized(kind):
    """It was an AttributeError that named nothing of the model."""
    if kind == "embedding":
        model, x = quantize_model_(nn.Sequential(nn.Embedding(6, 20)), QFTConfig()), torch.arange(6)
    else:
        model, x = make(kind), randn(6, 20, seed=2)
    loss = model(x).sum()
    dequantize_model_(model)
    with pytest.raises(RuntimeError, match="Run backward before dequantize_model_, or repeat"):
        loss.backward()

    model(x.to(torch.bfloat16) if x.is_floating_point() else x).sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


def test_a_weight_that_an_operator_has_saved_is_not_dequantized():
    model = make("linear")
    x = randn(20, seed=2).requires_grad_()
    loss = (model[0].weight * x).sum()
    with pytest.raises(RuntimeError, match="Delete the outputs of that pass"):
        dequantize_model_(model)
    loss.backward()
    assert isinstance(model[0].weight, QFTWeight)
