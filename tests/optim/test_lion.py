"""`QFTLion`: what a step does with parameters, groups, gradients and the stack."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from qft_hf import kernels
from qft_hf.nn import quantize_modules_
from qft_hf.optim import QFTLion
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.nn.small import SmallModel, batch
from tests.optim.common import (
    SPEC,
    backward,
    make_model,
    make_optimizer,
    model_tensors,
    snapshot,
    spoil,
    train,
    zero_gradient,
)
from tests.tolerances import (
    FP32_EPS,
    assert_same_bits,
    assert_same_tensors,
    float_update_bound,
    stochastic_bound,
)
from tests.values import scales64, values64

# --- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_the_first_step_moves_every_weight_by_lr_against_its_gradient(maximize, dtype):
    """Without momentum the direction is the sign of the gradient, which is known exactly."""
    model = make_model(dtype=dtype)
    optimizer = make_optimizer(model, maximize=maximize)
    backward(model, 0)
    before = {name: values64(p).numpy() for name, p in model.named_parameters()}
    signs = {
        name: np.sign(
            p.grad.codes.numpy() if isinstance(p.grad, Int8Gradient) else p.grad.float().numpy()
        )
        for name, p in model.named_parameters()
    }

    optimizer.step()

    for name, parameter in model.named_parameters():
        lr, decay = (1e-3, 0.1) if parameter.ndim == 2 else (2e-3, 0.0)
        sign = -signs[name] if maximize else signs[name]
        exact = before[name] - lr * (sign + decay * before[name])
        error = np.abs(values64(parameter).numpy() - exact)
        noise = float_update_bound(before[name], lr, decay)
        if isinstance(parameter, QFTWeight):
            bound = stochastic_bound(scales64(parameter).numpy())
        elif dtype == torch.bfloat16:  # to one of two neighbors: at most a whole unit, 2**-7
            bound = 2.0**-7 * np.abs(exact) + noise
        else:
            bound = noise
        assert (error <= bound).all(), name


def test_a_closure_is_evaluated_once_with_gradients():
    model = make_model()
    optimizer = make_optimizer(model)
    losses = []

    def closure():
        losses.append(backward(model, 0))
        return losses[-1]

    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    other = make_model()
    train(other, make_optimizer(other), [0])
    assert_same_tensors(model_tensors(model), model_tensors(other))
    assert optimizer.step() is None


def test_a_scheduler_sets_the_rate_of_the_running_step():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = QFTLion([parameter], lr=0.5)
    scheduler = LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.125, 0.0][step])
    values = []

    for _ in range(4):
        parameter.grad = torch.ones(3)
        optimizer.step()
        scheduler.step() if len(values) < 3 else None
        values.append(parameter[0].item())

    assert values == [-0.5, -0.75, -0.8125, -0.8125]


def test_the_rate_may_be_a_tensor():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = QFTLion([parameter], lr=0.5)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    parameter.grad = torch.ones(3)

    optimizer.step()

    assert (parameter == -0.25).all()


def test_groups_decay_by_their_own_rates():
    """With zero gradients, decay alone moves parameters."""
    model = make_model(tied=False)
    decayed, plain = model.blocks[0].up.weight, model.blocks[1].up.weight
    norm, bias = model.norm.weight, model.blocks[0].up.bias
    optimizer = QFTLion(
        [
            {"params": [decayed, norm], "weight_decay": 0.5},
            {"params": [plain, bias], "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    before = [values64(p).numpy() for p in (decayed, norm, plain, bias)]
    for parameter in (decayed, plain):
        parameter.grad = zero_gradient(parameter)
    for parameter in (norm, bias):
        parameter.grad = torch.zeros_like(parameter)

    optimizer.step()

    after = [values64(p).numpy() for p in (decayed, norm, plain, bias)]
    assert (after[2] == before[2]).all()
    assert (after[3] == before[3]).all()
    # Norm weights are all 1 and become 0.95.
    np.testing.assert_allclose(after[1], 0.95 * before[1], rtol=2 * FP32_EPS)
    assert np.linalg.norm(after[0]) / np.linalg.norm(before[0]) == pytest.approx(0.95, abs=1e-3)


def test_parameters_without_gradient_are_left_alone_and_have_no_state():
    model = make_model()
    model.blocks[0].requires_grad_(False)
    optimizer = make_optimizer(model)
    before = model_tensors(model.blocks[0])

    train(model, optimizer, range(3))

    assert_same_tensors(model_tensors(model.blocks[0]), before)
    assert not any(parameter in optimizer.state for parameter in model.blocks[0].parameters())
    assert optimizer.state[model.embed.weight]["step"] == 3


def test_a_group_may_be_added_later():
    model = make_model()
    optimizer = QFTLion(model.blocks[0].parameters(), lr=1e-3)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()

    optimizer.add_param_group({"params": list(model.blocks[1].parameters()), "lr": 0.01})
    model.zero_grad()
    before = model.blocks[1].up.weight.codes.clone()
    train(model, optimizer, [1])

    assert (model.blocks[1].up.weight.codes != before).any()
    assert optimizer.state[model.blocks[1].up.weight]["step"] == 1
    assert optimizer.state[model.blocks[0].up.weight]["step"] == 2


# --- stack ----------------------------------------------------------------------------------------


def test_the_step_frees_each_gradient_newest_first(monkeypatch):
    model = make_model(tied=False)
    optimizer = make_optimizer(model)
    names = {id(p): name for name, p in model.named_parameters()}
    updated, waiting = [], []
    update = optimizer.update

    def recording(parameter, gradient, factor):
        updated.append(names[id(parameter)])
        assert parameter.grad is None
        quantized = [p for p in model.parameters() if isinstance(p, QFTWeight)]
        waiting.append(sum(p.grad is not None for p in quantized))
        update(parameter, gradient, factor)

    monkeypatch.setattr(optimizer, "update", recording)
    backward(model, 0)

    optimizer.step()

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [names[id(p)] for p in parameters if isinstance(p, QFTWeight)]
    assert (weights[0], weights[-1]) == ("embed.weight", "head.weight")
    assert updated == weights[::-1]  # in the order of backward, which ends at the embedding
    assert waiting == list(range(len(weights) - 1, -1, -1))
    assert all(p.grad is None for p in model.parameters())


def test_float_parameters_of_a_group_go_in_one_call(monkeypatch):
    model = make_model(dtype=torch.bfloat16)
    optimizer = make_optimizer(model)
    calls = []
    step_floats = kernels.lion_step_floats_

    def recording(parameters, *tensors, **arguments):
        calls.append((len(parameters), arguments["rule"].lr))
        step_floats(parameters, *tensors, **arguments)

    monkeypatch.setattr(kernels, "lion_step_floats_", recording)
    backward(model, 0)

    optimizer.step()

    n_floats = sum(not isinstance(p, QFTWeight) for p in model.parameters())
    assert n_floats > 4
    assert calls == [(n_floats, 2e-3)]


def test_zero_grad_between_backward_and_step_drops_the_step():
    model = make_model()
    optimizer = make_optimizer(model)
    before = model_tensors(model)
    backward(model, 0)

    model.zero_grad()
    optimizer.step()

    assert_same_tensors(model_tensors(model), before)
    assert not optimizer.state


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("change", ["to", "quantize"])
def test_hooks_stay_when_the_inside_of_a_parameter_is_replaced(change, is_restarted, caplog):
    """Parameters once still listed hooks that autograd no longer called, so gradients waited."""
    if change == "to":
        model = make_model()
        optimizer = make_optimizer(model, gradient="release")
        model.to(torch.bfloat16)
    else:
        model = SmallModel()
        optimizer = make_optimizer(model, gradient="release")
        quantize_modules_(model, SPEC)

    if is_restarted:
        optimizer.eval()
        optimizer.train()
    codes = model.embed.weight.codes.clone()
    backward(model, 0)

    assert all(p.grad is None for p in model.parameters())
    assert (model.embed.weight.codes != codes).any()
    optimizer.step()
    assert not caplog.text


def test_hooks_are_not_doubled():
    model = make_model()
    optimizer = make_optimizer(model, gradient="release")

    for _ in range(3):
        optimizer.train()

    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())


def test_gradients_that_wait_need_hooks_on_weights_alone():
    """On weights, a float gradient, from code that does not know INT8, is quantized at once."""
    model = make_model()
    make_optimizer(model).train()

    for parameter in model.parameters():
        hooks = parameter._post_accumulate_grad_hooks or {}
        assert len(hooks) == isinstance(parameter, QFTWeight)


def test_a_second_optimizer_takes_the_parameters_over():
    """It does not mistake hooks of the first one for its own, and hooks of the user stay."""
    model = make_model()
    calls = []
    model.norm.weight.register_post_accumulate_grad_hook(calls.append)
    first, second = (make_optimizer(model, gradient="release") for _ in range(2))

    backward(model, 0)
    second.step()

    n_parameters = len(list(model.parameters()))
    assert (len(first.state), len(second.state), len(calls)) == (0, n_parameters, 1)


# --- gradients that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["int8", "float"])
def test_skip_drops_the_gradients_counts_and_logs(where, caplog):
    model, other = make_model(), make_model()
    optimizer, reference = make_optimizer(model, nonfinite="skip"), make_optimizer(other)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    backward(model, 2)
    spoil(model, where)

    optimizer.step()

    assert_same_tensors(snapshot(model, optimizer), before)
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.skipped_steps == 1
    assert "Step skipped: a gradient is not finite (1 so far)" in caplog.text
    # A skipped step does not count: the next step equals that of a run without it.
    train(model, optimizer, [3])
    train(other, reference, [0, 1, 3])
    assert_same_tensors(snapshot(model, optimizer), snapshot(other, reference))


# --- the same bits --------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bits_and_others_do_not():
    results = []
    for seed in (11, 11, 12):
        model = make_model()
        train(model, make_optimizer(model, seed=seed), range(3))
        results.append(model_tensors(model))

    assert_same_tensors(results[0], results[1])
    assert (results[0]["embed.weight.codes"] != results[2]["embed.weight.codes"]).any()


def test_the_global_random_state_is_neither_used_nor_changed():
    model, other = make_model(), make_model()
    torch.manual_seed(1)
    train(model, make_optimizer(model), range(2))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert_same_bits(torch.rand(1), drawn)

    train(other, make_optimizer(other), range(2))

    assert_same_tensors(model_tensors(model), model_tensors(other))


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_it", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_like_the_original(copy_it):
    """Model and optimizer together, so that the copy's parameters are the copied model's."""
    model = make_model()
    optimizer = make_optimizer(model, nonfinite="skip")
    train(model, optimizer, range(2))

    other, copied = copy_it((model, optimizer))

    train(model, optimizer, [2])
    train(other, copied, [2])
    assert_same_tensors(snapshot(other, copied), snapshot(model, optimizer))
    backward(other, 3)
    spoil(other, "int8")
    copied.step()
    assert (copied.skipped_steps, optimizer.skipped_steps) == (1, 0)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"gradient": "heap"}, "gradient must be 'stack'.*got 'heap'"),
        ({"momentum_bits": 3}, "momentum_bits must be 8 or 4, got 3"),
        ({"momentum_bits": 0}, "momentum_bits=0 is not Lion but SGD: use QFTSGD.*'qft_sgd'"),
        ({"nonfinite": "ignore"}, "nonfinite must be 'raise' or 'skip', got 'ignore'"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, r"seed must be in \[0, 2\*\*63\)"),
        ({"lr": -1e-4}, "lr must be finite and not negative, got -0.0001.*set maximize=True"),
        ({"weight_decay": -0.1}, "weight_decay must be finite.*got -0.1.*set maximize=True"),
        ({"betas": (0.9, 1.0)}, r"betas must be .*\[0, 1\), got \(0\.9, 1\.0\).*\(0\.9, 0\.99\)"),
        ({"betas": (-0.1, 0.9)}, r"betas must be two numbers in \[0, 1\)"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        QFTLion([nn.Parameter(torch.ones(2))], **arguments)


def test_fp16_parameters_are_refused():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float16))
    parameter.grad = torch.ones(3, dtype=torch.float16)

    with pytest.raises(TypeError, match=r"got torch\.float16 .*dtype=torch\.bfloat16"):
        QFTLion([parameter]).step()


@pytest.mark.parametrize(
    "make_other",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    ],
)
def test_other_optimizers_cannot_touch_quantized_weights(make_other):
    model = make_model()
    optimizer = make_other(model.parameters())
    model.loss(batch()).backward()
    before = model.embed.weight.codes.clone()

    with pytest.raises(NotImplementedError, match=r"aten\..*use an optimizer of qft_hf"):
        optimizer.step()
    assert_same_bits(model.embed.weight.codes, before)
