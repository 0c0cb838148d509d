"""`QFTAdamW`: comparison with AdamW on floats, clipping, state, and training results."""

from math import sqrt
from statistics import mean

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qft_hf import QFTConfig, estimate_memory, memory_ledger, quantize_model_, recommend
from qft_hf.config import QuantizationSpec
from qft_hf.nn import quantize_modules_
from qft_hf.optim import QFTSGD, QFTAdamW, QFTLion
from qft_hf.quant import QFTWeight
from tests.models import tiny_llama
from tests.optim import common
from tests.optim.common import (
    backward,
    make_model,
    snapshot,
    state_tensors,
    train,
    zero_gradient,
)
from tests.optim.test_state import assert_refused, set_tensor, through_a_file
from tests.optim.test_training import NextByte, text, windows  # noqa: F401 text is a fixture
from tests.tolerances import FP32_EPS, assert_same_tensors, mean_error
from tests.values import scales64, values64


def make_optimizer(model: nn.Module, **arguments) -> QFTAdamW:
    made: QFTAdamW = common.make_optimizer(model, QFTAdamW, **arguments)
    return made


# --- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
def test_float_parameters_are_those_of_torch(maximize):
    """Operations are the same but for the order of two factors, so only FP32 rounding differs."""
    draw = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(7, 11, generator=draw))
    theirs = nn.Parameter(ours.detach().clone())
    arguments = {"lr": 1e-2, "betas": (0.8, 0.98), "eps": 1e-4, "weight_decay": 0.1}
    optimizer = QFTAdamW([ours], maximize=maximize, **arguments)
    other = torch.optim.AdamW([theirs], maximize=maximize, **arguments)
    for _ in range(50):
        ours.grad = torch.randn(7, 11, generator=draw) * 1e-3
        theirs.grad = ours.grad.clone()
        optimizer.step()
        other.step()
    # A step is at most a few times lr, with about ten roundings of that size and three of size w.
    bound = 50 * (30 * 1e-2 + 3 * theirs.detach().abs()) * FP32_EPS
    assert ((ours - theirs).abs() <= bound).all()


def test_what_is_not_finite_leaves_a_float_element_as_it_is():
    parameter = nn.Parameter(torch.ones(4))
    optimizer = QFTAdamW([parameter], lr=0.25, weight_decay=0.5)
    large = torch.tensor([1.0, 1e30, -1e30, 0.0])  # the squares overflow FP32
    parameter.grad = large.clone()
    optimizer.step()

    np.testing.assert_allclose(parameter.detach(), [0.625, 1, 1, 0.875], rtol=1e-6)
    assert optimizer.state[parameter]["second_moment"].isfinite().all()
    assert optimizer.state[parameter]["momentum"][1:3].tolist() == [0, 0]


def test_bf16_parameters_move_by_less_than_their_units():
    parameter = nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
    optimizer = QFTAdamW([parameter], lr=1e-4, eps=1e-12)
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()

    share = 1e-4 / 2**-8  # of the gap below 1
    noise = 2**-8 * (5 * mean_error(share, 100_000) + 2**-16)
    assert abs(parameter.detach().double().mean() - (1 - 1e-4)) <= noise + 2 * FP32_EPS


@pytest.mark.parametrize("maximize", [False, True])
def test_the_first_step_moves_every_weight_by_lr_against_its_gradient(maximize):
    model = make_model()
    optimizer = make_optimizer(model, maximize=maximize, eps=1e-20)
    backward(model, 0)
    weights = [p for p in model.parameters() if isinstance(p, QFTWeight)]
    before = [values64(p).numpy() for p in weights]
    signs = [np.sign(p.grad.codes.numpy()) * (-1 if maximize else 1) for p in weights]

    optimizer.step()

    for parameter, old, sign in zip(weights, before, signs, strict=True):
        exact = old - 1e-3 * (sign + 0.1 * old)
        moved = np.abs(values64(parameter).numpy() - exact)
        assert (moved <= 1.0001 * scales64(parameter).numpy()).all()


def test_a_scheduler_and_groups_set_the_rates():
    parameter, other = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = QFTAdamW([{"params": [parameter]}, {"params": [other], "lr": 0.25}], lr=0.5)
    for lr in (0.5, 0.125):
        optimizer.param_groups[0]["lr"] = torch.tensor(lr)
        parameter.grad, other.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
    np.testing.assert_allclose(parameter.detach(), -0.625, rtol=1e-6)
    np.testing.assert_allclose(other.detach(), -0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\).*\(0\.9, 0\.999\)"),
        ({"betas": (0.9, 0.81)}, "second of betas must be above the square of the first"),
        ({"betas": (0.0, 0.0)}, "second of betas must be above the square of the first"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0.*The usual value is 1e-8"),
        ({"eps": float("nan")}, "eps must be positive and finite"),
        ({"lr": -1.0}, "lr must be finite and not negative"),
    ],
)
def test_options_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        QFTAdamW([nn.Parameter(torch.zeros(3))], **arguments)


# --- decay, and elements that do not change -------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        QuantizationSpec(outlier_fraction=0.0),
        QuantizationSpec(group_size=48, outlier_fraction=0.02),
    ],
    ids=str,
)
def test_decay_alone_shrinks_the_norm_by_the_exact_factor(spec):
    """Within five standard errors, as derived in `test_decay.py`; no scale changes here."""
    n_steps, shrink = 300, 1e-4
    x = torch.randn(96, 200, generator=torch.Generator().manual_seed(0)) * 0.02
    parameter = nn.Parameter(QFTWeight.from_float(x, spec))
    start, scales = values64(parameter).numpy(), parameter.scales.clone()
    codes = parameter.codes.double().abs().numpy()
    optimizer = QFTAdamW([parameter], lr=1e-3, weight_decay=0.1, seed=3)

    for _ in range(n_steps):
        parameter.grad = zero_gradient(parameter)
        optimizer.step()

    assert (parameter.scales == scales).all()
    factor = (1 - shrink) ** n_steps
    variance = scales64(parameter).numpy() ** 2 * n_steps * codes * shrink
    square = (start**2).sum()
    error = sqrt((start**2 * variance).sum()) / square
    assert 50 * error < 1 - factor
    assert abs((start * values64(parameter).numpy()).sum() / square - factor) <= 5 * error


# --- clipping -------------------------------------------------------------------------------------


def run(gradient: str, **arguments) -> dict[str, Tensor]:
    model = make_model()
    optimizer = make_optimizer(model, gradient=gradient, **arguments)
    for step in range(4):
        backward(model, 10 * step)
        optimizer.step()
    return snapshot(model, optimizer)


@pytest.mark.parametrize("clipping", ["previous", "tensor"])
def test_release_clips_by_what_it_knows(clipping):
    """For `tensor`, the expected run scales each gradient to its own norm, in stack mode."""
    settings = {"clipping": clipping, "max_grad_norm": 0.05}
    released = run("release", **settings)
    assert any(bool((released[n] != t).any()) for n, t in run("release").items())
    if clipping == "previous":
        return
    model = make_model()
    optimizer = make_optimizer(model)
    for step in range(4):
        backward(model, 10 * step)
        for parameter in model.parameters():
            nn.utils.clip_grad_norm_([parameter], 0.05)
        optimizer.step()
    wanted = snapshot(model, optimizer)
    for name, tensor in released.items():
        if tensor.dtype in (torch.int8, torch.uint8):  # the factor is known to FP32 rounding
            assert (tensor.int() - wanted[name].int()).abs().max() <= 1
            assert (tensor != wanted[name]).float().mean() < 0.01
        else:
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-6)


def test_exact_clipping_in_release_is_that_of_the_stack():
    states = []
    for gradient in ("stack", "release"):
        settings = {"clipping": "exact", "max_grad_norm": 0.05} if gradient == "release" else {}
        model = make_model()
        optimizer = make_optimizer(model, gradient=gradient, **settings)
        for step in range(3):
            if gradient == "release":
                with optimizer.measure_norm():
                    backward(model, step)
            backward(model, step)
            if gradient == "stack":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        states.append(snapshot(model, optimizer))
    stack, release = states
    for name, tensor in release.items():  # the norm is summed in another order
        if tensor.dtype in (torch.int8, torch.uint8):
            assert (tensor != stack[name]).float().mean() < 0.01
        else:
            torch.testing.assert_close(tensor, stack[name], rtol=1e-3, atol=1e-6)


def test_a_clipped_step_is_a_step_on_smaller_gradients():
    """A factor of 1/8 is exact in scales, in FP32 gradients and in the step; eps is negligible."""
    states = []
    for clips in (True, False):
        model = make_model()
        optimizer = make_optimizer(model)
        train(model, optimizer, range(2))
        backward(model, 2)
        for parameter in model.parameters():
            gradient = parameter.grad
            if clips:
                gradient.mul_(torch.tensor(0.125))
            elif isinstance(parameter, QFTWeight):
                gradient.scales.mul_(0.125)
            else:
                gradient.mul_(0.125)
        optimizer.step()
        states.append(snapshot(model, optimizer))
    assert_same_tensors(*states)
    unclipped = make_model()
    other = make_optimizer(unclipped)
    train(unclipped, other, range(3))
    assert any(
        bool((tensor != states[0][name]).any()) for name, tensor in state_tensors(other).items()
    )


# --- state ----------------------------------------------------------------------------------------


def test_moments_cost_two_bytes_per_parameter_and_their_scales():
    model = make_model(tied=False)
    optimizer = make_optimizer(model)
    train(model, optimizer, [0])

    state = optimizer.state[model.blocks[0].down.weight]  # [21, 300]: two groups of 256
    assert {name: tensor.nbytes for name, tensor in state.items() if name != "step"} == {
        "ratio_codes": 21 * 300,
        "ratio_scales": 21 * 2 * 4,
        "root_codes": 21 * 300,
        "root_scales": 21 * 2 * 4,
    }
    assert state["root_codes"].dtype == torch.uint8
    state = optimizer.state[model.norm.weight]
    assert {state[name].dtype for name in ("momentum", "second_moment")} == {torch.float32}


@pytest.mark.parametrize("gradient", ["stack", "release"])
@pytest.mark.parametrize("optimizer", [QFTAdamW, QFTLion, QFTSGD])
def test_states_are_those_that_were_estimated(optimizer, gradient):
    model = tiny_llama(dtype=torch.bfloat16)
    name = f"qft_{optimizer.__name__.removeprefix('QFT').lower()}"
    predicted = estimate_memory(model, gradient=gradient, optimizer=name)

    quantize_model_(model, QFTConfig())
    optimizer = optimizer(model.parameters(), gradient=gradient)
    ids = torch.arange(12)[None]
    for _ in range(2):
        optimizer.step()
        model(input_ids=ids, labels=ids).loss.backward()

    assert predicted.rows == memory_ledger(model, optimizer).rows


def test_an_optimizer_may_decide_what_fits():
    config = tiny_llama().config
    states = {
        name: estimate_memory(config, optimizer=name).state_bytes
        for name in ("qft_sgd", "qft_lion", "qft_adamw")
    }
    assert states["qft_sgd"] < states["qft_lion"] < states["qft_adamw"]
    assert recommend(config, 24, optimizer="qft_adamw").optimizer == "qft_adamw"
    assert "optim=qft_adamw" in str(recommend(config, 24, optimizer="qft_adamw"))
    assert "optim" not in str(recommend(config, 24))
    with pytest.raises(ValueError, match="'qft_lion' or 'qft_adamw' or 'qft_sgd', got 'adam'"):
        estimate_memory(config, optimizer="adam")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (set_tensor(1, "ratio_scales", lambda t: -t), "ratio_scales of parameter 1 .*damaged"),
        (set_tensor(1, "root_scales", lambda t: t * float("nan")), "root_scales of parameter 1"),
        (set_tensor(1, "root_scales", lambda t: -t), "root_scales of parameter 1 .*negative"),
        (set_tensor(0, "ratio_codes", lambda t: t.fill_(-128)), "-128, which is not a code"),
        (set_tensor(0, "root_codes", lambda t: t.char()), "must be a step and .*torch.uint8"),
        (
            set_tensor(6, "second_moment", lambda t: t - 1),
            "second_moment of parameter 6 .*negative",
        ),
        (
            set_tensor(6, "momentum", lambda t: t * float("inf")),
            "momentum of parameter 6 .*infinite",
        ),
        (lambda state: state["state"][1].pop("root_scales"), "parameter 1 must be a step and"),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changes(spoil, match):
    assert_refused(spoil, match, QFTAdamW)


def test_every_code_of_a_root_may_be_loaded():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(2))
    state = through_a_file(optimizer.state_dict())
    codes = state["state"][1]["root_codes"]
    codes.view(-1)[:256] = torch.arange(256)
    other = make_optimizer(make_model())

    other.load_state_dict(state)

    assert (state_tensors(other)["1.root_codes"] == codes).all()


# --- the claim ------------------------------------------------------------------------------------


def loss_reduction(kind: str, text: Tensor, *, seed: int) -> float:  # noqa: F811
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NextByte()
    cut = len(text) * 9 // 10
    held_out, targets = windows(text[cut:], torch.Generator().manual_seed(99), 8192)
    with torch.no_grad():
        before = F.cross_entropy(model(held_out), targets).item()
    arguments = {"lr": 1e-3, "weight_decay": 0.1}
    if kind == "float":
        optimizer = torch.optim.AdamW(model.parameters(), **arguments)
    else:
        quantize_modules_(model, QuantizationSpec())
        nearest = {"stochastic_rounding": False} if kind == "nearest" else {}
        optimizer = QFTAdamW(model.parameters(), seed=seed, **arguments, **nearest)
    batches = torch.Generator().manual_seed(seed)
    for _ in range(250):
        contexts, next_bytes = windows(text[:cut], batches, 128)
        F.cross_entropy(model(contexts), next_bytes).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return before - F.cross_entropy(model(held_out), targets).item()


def test_it_learns_what_float_adamw_learns_and_nearest_rounding_does_not(text):  # noqa: F811
    reductions = {
        kind: [loss_reduction(kind, text, seed=seed) for seed in (0, 1)]
        for kind in ("float", "qft", "nearest")
    }
    learned = reductions["float"]
    recovered = {
        kind: mean(a / b for a, b in zip(reductions[kind], learned, strict=True))
        for kind in ("qft", "nearest")
    }
    assert all(1.5 < reduction < 3 for reduction in learned), reductions
    assert recovered["qft"] >= 0.99, reductions
    assert recovered["nearest"] < 0.95, reductions
