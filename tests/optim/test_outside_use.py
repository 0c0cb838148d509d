"""Weights that are used outside their modules: the gradient becomes INT8 and trains them."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qft_hf import QFTConfig, quantize_model_
from qft_hf.nn import linear
from qft_hf.optim import QFTSGD, QFTAdamW, QFTLion
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.optim.test_release import (
    N_WORDS,
    Network,
    batches,
    everything,
    make_optimizer,
)
from tests.tolerances import FP32_EPS, assert_same_tensors, matmul_bound, rounding_bound

MODES = ["stack", "release"]


class FusedHead(torch.autograd.Function):
    """Logits in runs of words and a float gradient of the weight, as in other packages."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.cat([x @ weight[start : start + 10].t() for start in range(0, N_WORDS, 10)], 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_weight = torch.zeros(weight.shape, dtype=weight.dtype)
        for start in range(0, N_WORDS, 10):
            grad_weight[start : start + 10] = grad[:, start : start + 10].t() @ x
        return grad @ weight, grad_weight


class Outsider(Network):
    """A network that also uses its weights outside their modules.

    The table is used by its module, by a fused head and row by row; `up` by its module and in a
    penalty; `down` by its module and transposed; `lone` only outside its module.
    """

    def __init__(self, *, is_tied: bool = True) -> None:
        super().__init__(is_tied=is_tied)
        self.lone = nn.Linear(22, 22, bias=False)

    def forward(self, ids: Tensor, *, is_checkpointed: bool = False) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        if is_checkpointed:
            x = x + checkpoint(self._mlp, x, use_reentrant=False)
        else:
            x = x + self._mlp(x)
        x = self.norm(x + (x @ self.down.weight @ self.down.weight.t()) * 0.1)
        x = F.linear(x, self.lone.weight[:11]) @ self.lone.weight[:11]
        return FusedHead.apply(x, self.head.weight) + F.linear(x, self.head.weight.dequantize())


def loss_of(model: Outsider, ids: Tensor, **arguments) -> Tensor:
    loss = F.cross_entropy(model(ids, **arguments), (ids + 1).flatten() % 7)
    return loss + 0.05 * model.up.weight.pow(2).sum() + 0.01 * model.embed.weight[3].norm()


def outsider(*, is_tied: bool = True) -> Outsider:
    torch.manual_seed(0)
    return quantize_model_(Outsider(is_tied=is_tied), QFTConfig())


def train(gradient: str, *, kind, accumulation: int, is_tied: bool, steps: int = 3, **arguments):
    model = outsider(is_tied=is_tied)
    optimizer = make_optimizer(model, gradient, kind)
    data = iter(batches(steps * accumulation))
    for _ in range(steps):
        for number in range(accumulation):
            with nullcontext() if number == accumulation - 1 else optimizer.accumulate():
                loss_of(model, next(data), **arguments).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", [QFTLion, QFTAdamW])
def test_release_equals_stack_bit_for_bit(kind, accumulation, is_checkpointed, is_tied):
    stack, release = (
        train(
            gradient,
            kind=kind,
            accumulation=accumulation,
            is_checkpointed=is_checkpointed,
            is_tied=is_tied,
        )
        for gradient in MODES
    )
    assert_same_tensors(everything(*stack), everything(*release))
    start = dict(outsider(is_tied=is_tied).named_parameters())
    for name, parameter in stack[0].named_parameters():
        assert not torch.equal(parameter, start[name]), f"{name} has not moved"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_exact_clipping_counts_what_comes_from_outside(accumulation):
    """The norm is that of all gradients in stack mode, most of which come from outside use."""
    norms, models = [], []
    for gradient in MODES:
        model = outsider()
        arguments = {"clipping": "exact", "max_grad_norm": 0.1} if gradient == "release" else {}
        optimizer = make_optimizer(model, gradient, **arguments)
        for part in (parts := batches(accumulation)):
            is_last = part is parts[-1]
            if gradient == "release" and accumulation == 1:
                with optimizer.measure_norm():
                    loss_of(model, part).backward()
            with nullcontext() if is_last else optimizer.accumulate():
                loss_of(model, part).backward()
        if gradient == "stack" or accumulation > 1:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
        if gradient == "release" and accumulation == 1:
            norms.append(optimizer.released_norm)
        models.append(model)
    torch.testing.assert_close(norms[0], norms[1], rtol=8 * FP32_EPS, atol=0)
    assert norms[0] > 0.2
    # Factors differ in their last bits, signs of Lion do not.
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if one.is_floating_point() else 0)


@pytest.mark.parametrize("gradient", MODES)
def test_a_gradient_waits_in_int8_wherever_it_came_from(gradient):
    model = outsider()
    optimizer = make_optimizer(model, gradient)

    for part in batches(2):
        with optimizer.accumulate():
            loss_of(model, part).backward()
            kinds = {type(p.grad) for p in model.parameters() if isinstance(p, QFTWeight)}
            assert kinds == {Int8Gradient}


def test_a_gradient_that_is_set_by_hand_is_quantized():
    for gradient in MODES:
        results = []
        for quantize in (lambda g: g, lambda g: Int8Gradient.from_float(g, dtype=g.dtype)):
            model = outsider()
            optimizer = make_optimizer(model, gradient)
            generator = torch.Generator().manual_seed(4)
            for parameter in model.parameters():
                if isinstance(parameter, QFTWeight):
                    parameter.grad = quantize(torch.randn(parameter.shape, generator=generator))
            optimizer.step()
            results.append(everything(model, optimizer))
        assert_same_tensors(*results)
        assert len(results[0]) > 20


def test_a_sparse_gradient_is_quantized():
    model, ids = outsider(), torch.tensor([1, 5, 1])
    optimizer = make_optimizer(model, "stack")
    for _ in range(2):
        F.embedding(ids, model.embed.weight, sparse=True).sum().backward()

    moved = model.embed.weight.grad.dequantize()
    assert moved[:, 0].tolist() == pytest.approx([0, 4, 0, 0, 0, 2] + [0] * (N_WORDS - 6))
    optimizer.step()
    assert optimizer.state[model.embed.weight]["step"] == 1


def step_by(factor: float, model: Outsider, gradient: str) -> dict[str, Any]:
    optimizer = make_optimizer(model, gradient)
    (model.lone.weight * factor).sum().backward()
    optimizer.step()
    return model.state_dict()


def test_a_float_gradient_that_is_not_finite_is_refused():
    """`stack` refuses it before anything changes; release at the step, counting it as zeros."""
    for gradient in MODES:
        model, other = outsider(), outsider()
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            step_by(float("inf"), model, gradient)
        if gradient == "release":
            step_by(0.0, other, gradient)
        expected = other.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_outside_use_and_the_module_have_the_same_gradient():
    """Both differ from the exact one by no more than INT8 rounding and FP32 sums allow."""
    x = torch.randn(29, 22, generator=torch.Generator().manual_seed(2))
    grad = torch.randn(29, 301, generator=torch.Generator().manual_seed(3))
    exact = (grad.double().t() @ x.double()).numpy()
    noise = matmul_bound(grad.t(), x).numpy()
    for use in (linear, F.linear, lambda x, w: x @ w.dequantize().t()):
        weight = outsider().up.weight
        optimizer = QFTLion([weight], lr=1e-3)
        use(x, weight).backward(grad)

        gradient = weight.grad
        assert type(gradient) is Int8Gradient
        scale = gradient.scales.double().numpy()
        error = abs(gradient.dequantize().double().numpy() - exact)
        assert (error <= rounding_bound(exact, scale) + noise).all()
        del optimizer


@pytest.mark.parametrize("write", ["dequantize", "pow"])
def test_a_penalty_moves_weights_as_it_moves_float_ones(write):
    """`weight.dequantize()` in a loss once had no effect, although an error text advised it."""
    for gradient in MODES:
        weight = outsider().up.weight
        before = weight.detach().dequantize().double()
        optimizer = QFTSGD([weight], lr=0.25, gradient=gradient, seed=3)
        values = weight.dequantize() if write == "dequantize" else weight
        (values.pow(2).sum() / 2).backward()
        optimizer.step()

        # w - lr * w: the gradient is off by half its quantum, stochastic rounding by one quantum.
        quantum = before.abs().amax(dim=1, keepdim=True) / 127
        bound = 0.25 * 0.5 * quantum + weight.scales.double() + 8 * FP32_EPS * before.abs()
        after = weight.detach().dequantize().double()
        assert ((after - 0.75 * before).abs() <= bound).all()
        assert ((after - before).abs() > bound).float().mean() > 0.5


def test_frozen_weights_are_read_and_get_no_gradient():
    model = outsider().requires_grad_(requires_grad=False)
    model.norm.requires_grad_()
    optimizer = QFTLion(model.norm.parameters(), lr=1e-3)

    loss_of(model, batches(1)[0]).backward()

    assert all(p.grad is None for p in model.parameters() if isinstance(p, QFTWeight))
    assert model.norm.weight.grad is not None
    optimizer.step()


def test_release_never_shows_backward_a_weight_that_has_moved_on():
    """Through `detach`, a weight is read after its own gradient was completed and used already."""
    model = outsider()
    optimizer = make_optimizer(model, "release")
    # The product with `up.weight` comes last, so backward completes its gradient first.
    x = model.lone(torch.ones(2, 22)) @ model.up.weight.detach().t()
    loss = (x @ model.up.weight).sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    del optimizer
