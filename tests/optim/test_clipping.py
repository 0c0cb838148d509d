"""Clipping by global norm: exact, on the stored gradients, and without touching a code."""

import math

import pytest
import torch
from torch import nn

from qft_hf.kernels import (
    Lion,
    Quantized,
    Rounding,
    Roundings,
    Weight,
    backend,
    lion_step_,
    lion_step_floats_,
)
from qft_hf.layout import STATE_GROUP_SIZE
from qft_hf.optim import release
from qft_hf.quant import Int8Gradient
from tests.nn.small import batch
from tests.optim.common import (
    backward,
    make_model,
    make_optimizer,
    model_tensors,
    snapshot,
    state_tensors,
    train,
)
from tests.tolerances import FP32_EPS, assert_same_bits, assert_same_tensors
from tests.values import values64


def exact_norm(model: nn.Module) -> float:
    """Global norm of the gradients as they are stored, in float64."""
    total = 0.0
    for parameter in model.parameters():
        total += values64(parameter.grad).square().sum().item()
    return math.sqrt(total)


def gradient_tensors(model: nn.Module) -> dict[str, tuple[torch.Tensor, ...]]:
    return {
        name: (p.grad.codes.clone(), p.grad.scales.clone())
        if isinstance(p.grad, Int8Gradient)
        else (p.grad.clone(),)
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("n_parts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_that_of_the_stored_gradients(dtype, n_parts):
    model = make_model(dtype=dtype)
    backward(model, 0, n_parts)
    exact = exact_norm(model)

    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1e9)

    # Each float gradient has a norm rounded to its dtype; the squares are summed in FP32.
    eps = FP32_EPS if dtype == torch.float32 else 2.0**-8
    assert norm.item() == pytest.approx(exact, rel=16 * eps)
    if dtype == torch.float32:
        assert norm.item() == pytest.approx(nn.utils.get_total_norm(
            [p.grad for p in model.parameters()]
        ).item())  # fmt: skip


def test_clipping_rescales_scales_and_never_codes():
    model = make_model()
    backward(model, 0)
    before = gradient_tensors(model)
    norm = exact_norm(model)

    nn.utils.clip_grad_norm_(model.parameters(), max_norm=norm / 7)

    assert exact_norm(model) == pytest.approx(norm / 7, rel=1e-5)  # torch divides by norm + 1e-6
    after = gradient_tensors(model)
    for name, tensors in before.items():
        if len(tensors) == 2:
            assert_same_bits(after[name][0], tensors[0])
        torch.testing.assert_close(after[name][-1], tensors[-1] / 7, rtol=1e-5, atol=0)


def test_a_norm_below_the_limit_clips_nothing():
    model = make_model()
    backward(model, 0)
    before = gradient_tensors(model)

    nn.utils.clip_grad_norm_(model.parameters(), max_norm=2 * exact_norm(model))

    for name, tensors in gradient_tensors(model).items():
        for tensor, expected in zip(tensors, before[name], strict=True):
            assert_same_bits(tensor, expected)


def test_a_clipped_step_is_the_reference_step_on_clipped_gradients():
    """With momentum from two unclipped steps, so that the size of the gradient matters."""
    model, expected = make_model(), make_model()
    optimizer, other = make_optimizer(model), make_optimizer(expected)
    train(model, optimizer, range(2))
    train(expected, other, range(2))
    backward(model, 2)
    backward(expected, 2)
    limit = exact_norm(model) / 20

    nn.utils.clip_grad_norm_(model.parameters(), max_norm=limit)
    optimizer.step()

    # The expected run scales every gradient by the factor, then calls the reference.
    factor = torch.tensor(limit) / (torch.tensor(exact_norm(expected)) + 1e-6)
    streams = {id(p): i for i, p in enumerate(p for g in other.param_groups for p in g["params"])}
    for group in other.param_groups:
        for parameter in group["params"]:
            state = other.state[parameter]
            rule = Lion(lr=group["lr"], beta1=0.9, beta2=0.99, weight_decay=group["weight_decay"])
            stream = streams[id(parameter)]
            with backend.use("reference"):
                if isinstance(parameter.grad, Int8Gradient):
                    codes, scales = parameter.grad.codes, parameter.grad.scales * factor
                    momentum = state["momentum_codes"], state["momentum_scales"]
                    lion_step_(
                        Weight(*parameter.fields().values(), parameter.group_size),
                        Quantized(*momentum, STATE_GROUP_SIZE),
                        Quantized(codes, scales, STATE_GROUP_SIZE),
                        rule=rule,
                        rounding=Rounding(seed=11, step=3, stream=stream),
                    )
                else:
                    lion_step_floats_(
                        [parameter.data],
                        [state["momentum"]],
                        [parameter.grad * factor],
                        rule=rule,
                        roundings=Roundings(seed=11, steps=[3], streams=[stream]),
                    )

    # The factor has an FP32 rounding error, which shifts momentum by as much, and no sign here.
    assert_same_tensors(model_tensors(model), model_tensors(expected))
    for name, tensor in state_tensors(optimizer).items():
        wanted = state_tensors(other)[name]
        if name.endswith("step"):
            assert tensor == wanted + 1
        else:
            noise = 1 if tensor.dtype == torch.int8 else 1e-6 * wanted.abs().max().item()
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=noise)


def test_clipping_changes_the_step():
    """Control: clipping must have an effect on the weights."""
    results = []
    for limit in (1e9, 1e-4):
        model = make_model()
        optimizer = make_optimizer(model)
        train(model, optimizer, range(2))
        backward(model, 2)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=limit)
        optimizer.step()
        results.append(model_tensors(model)["blocks.0.up.weight.codes"])

    assert (results[0] != results[1]).float().mean() > 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_seen_by_clipping_and_by_the_step(bad):
    model = make_model()
    optimizer = make_optimizer(model)
    backward(model, 0)
    model.head.weight.grad.scales[0, 0] = bad
    before = snapshot(model, optimizer)

    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    assert not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        optimizer.step()

    assert_same_tensors(snapshot(model, optimizer), before)


def test_another_norm_is_of_the_stored_gradients_too():
    model = make_model()
    backward(model, 0)
    gradients = [p.grad for p in model.parameters()]
    values = [g.dequantize() if isinstance(g, Int8Gradient) else g.clone() for g in gradients]
    largest = max(float(v.abs().max()) for v in values)

    norm = nn.utils.clip_grad_norm_(model.parameters(), largest / 3, norm_type=float("inf"))

    assert norm == pytest.approx(largest, rel=4 * FP32_EPS)
    for gradient, before in zip((p.grad for p in model.parameters()), values, strict=True):
        after = gradient.dequantize() if isinstance(gradient, Int8Gradient) else gradient
        torch.testing.assert_close(after, before / 3, rtol=1e-4, atol=0)  # by norm + 1e-6


@pytest.mark.parametrize("limit", [0, 2**16], ids=["one by one", "together"])
@pytest.mark.parametrize("factor", [1e19, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_whose_squares_overflow_trains_alike_in_both_modes(
    dtype, factor, limit, monkeypatch
):
    """Release once called gradients of norms and biases infinite, after it updated all weights."""
    monkeypatch.setattr(release, "SMALL", limit)
    ends = {}
    for gradient in ("stack", "release"):
        model = make_model(dtype=dtype)
        optimizer = make_optimizer(model, gradient=gradient)
        for step in range(2):
            (model.loss(batch(step)) * factor).backward()
            if gradient == "stack":
                norm = exact_norm(model)
            optimizer.step()
        ends[gradient] = snapshot(model, optimizer)
    assert_same_tensors(ends["stack"], ends["release"])
    assert norm > 1e18
    assert optimizer.released_norm.item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("factor", [7.0, 1e30])
def test_a_loss_whose_squares_overflow_is_clipped_by_its_norm(factor):
    """The expected factor is that of `clip_grad_norm_`, whose own result is 0 from 1e19 on."""
    model, other = make_model(), make_model()
    optimizer = make_optimizer(model, gradient="release", clipping="exact", max_grad_norm=0.25)
    stack = make_optimizer(other)
    for step in range(2):
        with optimizer.measure_norm():
            (model.loss(batch(step)) * factor).backward()
        (model.loss(batch(step)) * factor).backward()
        optimizer.step()
        (other.loss(batch(step)) * factor).backward()
        clip = min(0.25 / exact_norm(other), 1.0)
        for parameter in other.parameters():
            parameter.grad.mul_(clip)
        stack.step()
    assert optimizer.released_norm.item() == pytest.approx(0.25 / clip if clip < 1 else 0, rel=1e-5)
    for mine, expected in zip(
        state_tensors(optimizer).values(), state_tensors(stack).values(), strict=True
    ):
        if mine.is_floating_point():  # momentum of norms and biases, and scales of that of weights
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_a_measuring_pass_without_gradients_knows_no_norm():
    model = make_model()
    optimizer = make_optimizer(model, gradient="release", clipping="exact", max_grad_norm=0.25)
    before = snapshot(model, optimizer)

    with optimizer.measure_norm():
        pass

    with pytest.raises(RuntimeError, match="Run backward once under"):
        model.loss(batch(0)).backward()
    assert_same_tensors(snapshot(model, optimizer), before)


def test_clipping_that_is_set_later_counts_from_then_on():
    ends = []
    for norm, clipping in ((0.02, "tensor"), (0.5, "previous"), (0.5, "tensor")):
        model = make_model()
        optimizer = make_optimizer(model, gradient="release", clipping=clipping, max_grad_norm=norm)
        if len(ends) < 2:
            optimizer.clipping, optimizer.max_grad_norm = "tensor", 0.02
        model.loss(batch(0)).backward()
        optimizer.step()
        ends.append(snapshot(model, optimizer))

    set_at_once, set_later, not_set = ends
    assert_same_tensors(set_at_once, set_later)
    with pytest.raises(AssertionError):
        assert_same_tensors(set_at_once, not_set)
