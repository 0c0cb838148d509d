"""Modules under `torch.compile`: the bits of eager ones, one graph, and no float weight kept."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qft_hf import QFTConfig, QFTLion, layout, quantize_model_
from tests.nn.small import randn
from tests.tolerances import assert_same_bits

# Runs the graph that AOTAutograd traces with PyTorch's own kernels, those of an eager pass.
BACKEND = "aot_eager"
N, R, C = 37, 48, 300  # all differ; enough tokens for INT8 products, and no multiple of a group


class Lookup(nn.Module):
    """An embedding of some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(R, C, padding_idx=2)

    def forward(self, x):
        ids = torch.arange(len(x)) % 5
        return self.table(ids) * x


class Rows(nn.Module):
    """A product with some rows of a weight, and one with the transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(C, R, bias=False)

    def forward(self, x):
        some = nn.functional.linear(x, self.inner.weight[3:9])
        return torch.cat([some, x @ self.inner.weight.t()], dim=1)


KINDS = {
    "linear": lambda: nn.Linear(C, R),
    "no bias": lambda: nn.Linear(C, R, bias=False),
    "conv1d": lambda: Conv1D(R, C),
    "embedding": Lookup,
    "rows": Rows,
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def quantized(kind, *, matmul="dequantize", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = KINDS[kind]()
    return quantize_model_(nn.Sequential(module), QFTConfig(matmul=matmul)).train()


def compiled(model, **options):
    return torch.compile(model, backend=BACKEND, fullgraph=True, **options)


def passed(run, model, x):
    """Run a pass; return the output and the gradients of the input and of the parameters."""
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(randn(*y.shape, seed=5, dtype=y.dtype))
    gradients = [parameter.grad for parameter in model.parameters()]
    return [y.detach(), x.grad, *gradients]


def assert_same_passes(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert type(a) is type(b)
        for x, y in zip(*(fields(t) for t in (a, b)), strict=True):
            assert_same_bits(x, y)


def fields(tensor):
    return list(tensor.fields().values()) if hasattr(tensor, "fields") else [tensor]


@pytest.mark.parametrize("matmul", ["dequantize", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_module_has_the_bits_of_an_eager_one(kind, matmul):
    x = randn(N, C, seed=3)
    eager, other = (quantized(kind, matmul=matmul) for _ in range(2))

    assert_same_passes(passed(compiled(other), other, x), passed(eager, eager, x))


@pytest.mark.parametrize("matmul", ["dequantize", "int8"])
def test_under_autocast_too(matmul):
    x = randn(N, C, seed=3)
    eager, other = (quantized("linear", matmul=matmul) for _ in range(2))
    run = compiled(other)

    with torch.autocast("cpu", torch.bfloat16):
        results = [passed(run, other, x), passed(eager, eager, x)]

    assert results[0][0].dtype == torch.bfloat16
    assert_same_passes(*results)


@pytest.mark.parametrize("tokens", [1, 3, N])
def test_without_a_gradient_few_tokens_are_multiplied_as_ever(tokens):
    x = randn(tokens, C, seed=3)
    model = quantized("linear").eval()
    run = compiled(model)

    with torch.no_grad():
        assert_same_bits(run(x), model(x))


def test_a_weight_of_several_tiles_is_expanded_tile_by_tile(monkeypatch):
    """The eager and the compiled pass have equally many tiles, with the same bits."""
    monkeypatch.setattr(layout, "TILE_ELEMENTS", 10 * C)
    x = randn(N, C, seed=3)
    eager, other = (quantized("linear") for _ in range(2))
    assert not eager[0].weight.stored.is_one_tile

    assert_same_passes(passed(compiled(other), other, x), passed(eager, eager, x))


def test_weights_that_are_updated_are_read_anew():
    x = randn(N, C, seed=3)
    models = [quantized("linear") for _ in range(2)]
    runs = [models[0], compiled(models[1])]
    optimizers = [QFTLion(model.parameters(), lr=1e-2) for model in models]
    for _ in range(3):
        results = [passed(run, model, x) for run, model in zip(runs, models, strict=True)]
        assert_same_passes(*results)
        for optimizer in optimizers:
            optimizer.step()

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_function_may_run_backward():
    """Dynamo traced how autograd stores a gradient, which ended in an AttributeError."""
    x = randn(N, C, seed=3)
    eager, other = (quantized("linear") for _ in range(2))
    run = torch.compile(passed, backend=BACKEND)

    assert_same_passes(run(other, other, x), passed(eager, eager, x))


def test_backward_after_a_step_is_refused():
    """The input gradient would be computed with the new values."""
    model = quantized("linear")
    run, optimizer = compiled(model), QFTLion(model.parameters(), lr=1e-2)
    x = randn(N, C, seed=3).requires_grad_()
    first, second = run(x), run(x)
    first.sum().backward()
    optimizer.step()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


def test_a_hook_on_a_weight_acts():
    """Only row 3 learns."""
    model = quantized("linear")
    weight, optimizer = model[0].weight, QFTLion(model.parameters(), lr=1e-2)
    mask = torch.zeros(R, 1)
    mask[3] = 1
    weight.register_hook(lambda gradient: gradient * mask)
    before = weight.codes.clone()

    passed(compiled(model), model, randn(N, C, seed=3))
    optimizer.step()

    assert (weight.codes != before).any(dim=1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("matmul", ["dequantize", "int8"])
def test_no_float_weight_is_kept_for_backward(matmul):
    """The partitioner would keep for backward whatever forward and backward both compute."""
    model = quantized("no bias", matmul=matmul)
    run = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    x = randn(N, C, seed=3).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run(x)

    weights = [t for t in kept if t.shape in ((R, C), (C, R))]
    assert [t.dtype for t in weights] == [torch.int8]
    y.sum().backward()
    assert model[0].weight.grad is not None


def test_equal_layers_share_what_was_compiled():
    models = nn.ModuleList(quantized("linear", seed=seed) for seed in range(3))
    for model in models:
        model.compile(backend=BACKEND, fullgraph=True)
        model(randn(N, C, seed=3)).sum().backward()

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
