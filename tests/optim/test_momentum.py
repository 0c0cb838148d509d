"""Momentum of 4 bits, and `QFTSGD`, which has none: what a step does, keeps and refuses."""

import numpy as np
import pytest
import torch
from torch import nn

from qft_hf.memory import memory_ledger
from qft_hf.optim import QFTSGD
from qft_hf.quant import QFTWeight
from tests.optim.common import (
    SPEC,
    backward,
    make_model,
    make_optimizer,
    snapshot,
    train,
    zero_gradient,
)
from tests.optim.test_state import through_a_file
from tests.tolerances import (
    assert_same_tensors,
    float_update_bound,
    stochastic_bound,
)
from tests.values import scales64, values64

RATES = {8: 1e-3, 4: 1e-3, 0: 0.3}


def make(bits: int, *, model: nn.Module | None = None, **arguments):
    model = model or make_model()
    # Both groups get the rate of the rule in place of their own.
    if bits:
        optimizer = make_optimizer(model, momentum_bits=bits, **arguments)
    else:
        optimizer = make_optimizer(model, QFTSGD, **arguments)
    for group in optimizer.param_groups:
        group["lr"] = RATES[bits]
    return model, optimizer


def test_4_bits_cost_half_a_byte_and_a_scale_per_64_columns():
    model, optimizer = make(4, model=make_model(tied=False))
    train(model, optimizer, [0])

    state = optimizer.state[model.blocks[0].up.weight]  # [300, 21]: odd columns

    assert state["momentum_codes"].dtype == torch.uint8
    assert {name: tensor.nbytes for name, tensor in state.items() if name != "step"} == {
        "momentum_codes": 300 * 11,
        "momentum_scales": 300 * 4,
    }
    state = optimizer.state[model.blocks[0].down.weight]  # [21, 300]
    assert state["momentum_scales"].shape == (21, 5)
    assert optimizer.state[model.norm.weight]["momentum"].dtype == torch.float32


def test_without_momentum_a_step_number_is_all_there_is():
    model, optimizer = make(0)
    train(model, optimizer, range(2))

    assert all(state == {"step": 2} for state in optimizer.state.values())
    assert "momentum" not in {row.state for row in memory_ledger(model, optimizer).rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_moves_every_weight_by_its_gradient(maximize, dtype):
    """Matrices decay, vectors do not; against float64, within one rounding."""
    model, optimizer = make(0, model=make_model(dtype=dtype), maximize=maximize)
    backward(model, 0)
    before = {name: values64(p).numpy() for name, p in model.named_parameters()}
    gradients = {}
    for name, p in model.named_parameters():
        gradients[name] = values64(p.grad).numpy()

    optimizer.step()

    for name, parameter in model.named_parameters():
        decay = 0.1 if parameter.ndim == 2 else 0.0
        gradient = -gradients[name] if maximize else gradients[name]
        exact = before[name] - 0.3 * (gradient + decay * before[name])
        noise = float_update_bound(before[name], 0.3 * np.abs(gradient).max(), decay)
        if isinstance(parameter, QFTWeight):
            noise = noise + stochastic_bound(scales64(parameter).numpy())
        elif dtype == torch.bfloat16:
            noise = noise + 2.0**-7 * np.abs(exact)
        assert (np.abs(values64(parameter).numpy() - exact) <= noise).all(), name
        assert (values64(parameter).numpy() != before[name]).any(), name


@pytest.mark.parametrize(
    ("saved", "own", "match"),
    [
        (saved, own, rf"saved with momentum_bits={saved}.* has momentum_bits={own}\. Continue with")
        for saved, own in ((8, 4), (4, 8))
    ],
)
def test_a_state_of_other_bits_is_refused_and_nothing_changes(saved, own, match):
    model, other = make(saved)
    train(model, other, [0])
    model, optimizer = make(own)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)

    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(through_a_file(other.state_dict()))

    assert_same_tensors(snapshot(model, optimizer), before)


def test_sgd_follows_sgd_in_float64_for_many_steps():
    """Rounding noise adds up like a random walk; a bias would add up to 60 quanta."""
    generator = torch.Generator().manual_seed(4)
    parameter = nn.Parameter(QFTWeight.from_float(torch.randn(40, 130, generator=generator), SPEC))
    optimizer = QFTSGD([parameter], lr=0.05, weight_decay=0.02, seed=3)
    exact, n_steps = values64(parameter), 60
    for _ in range(n_steps):
        parameter.grad = zero_gradient(parameter)
        parameter.grad.set_rows_(slice(0, 40), torch.randn(40, 130, generator=generator) * 0.3)
        exact = exact - 0.05 * (values64(parameter.grad) + 0.02 * exact)
        optimizer.step()

    error = ((values64(parameter) - exact) / scales64(parameter)).numpy()
    # A rounding has a variance of at most a quarter; growing scales add as much again.
    assert error.std() < (2 * n_steps / 4) ** 0.5
    assert abs(error.mean()) < 6 * (2 * n_steps / 4 / error.size) ** 0.5
    outlying = parameter.outlier_columns.long().numpy()
    ours = np.take_along_axis(values64(parameter).numpy(), outlying, 1)
    np.testing.assert_allclose(ours, np.take_along_axis(exact, outlying, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile_elements", [1, 700])
def test_tiles_of_a_weight_step_as_the_whole(monkeypatch, tile_elements):
    """Both runs step with the same gradients, since tiles sum floats in another order."""
    results = []
    for elements in (10**9, tile_elements):
        model, optimizer = make(0)
        for number in range(2):
            backward(model, number)
            with monkeypatch.context() as patch:
                patch.setattr("qft_hf.layout.TILE_ELEMENTS", elements)
                optimizer.step()
        results.append(snapshot(model, optimizer))
    assert_same_tensors(*results)


@pytest.mark.parametrize("limit", [None, 0.01])
def test_sgd_clipped_by_the_previous_norm_equals_the_clipped_stack(limit):
    """For SGD, the clipping factor scales the length of the step."""
    settings = {"gradient": "release"}
    if limit:
        settings |= {"clipping": "previous", "max_grad_norm": limit}
    (model, release), (other, stack) = make(0, **settings), make(0)
    norms = []
    for number in range(5):
        backward(model, number)
        release.step()
        backward(other, number)
        if limit and norms:
            factor = (limit / (norms[-1] + 1e-6)).clamp(max=1.0)
            for parameter in other.parameters():
                parameter.grad.mul_(factor)
        norms.append(release.released_norm)
        stack.step()
    assert_same_tensors(snapshot(model, release), snapshot(other, stack))
    if limit:
        assert min(norms) > limit
        assert len({norm.item() for norm in norms}) == 5
