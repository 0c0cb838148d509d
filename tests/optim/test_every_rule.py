"""Properties of every rule: the flows agree, runs resume, and no damage goes unnoticed."""

import copy
import pickle
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from qft_hf.config import QuantizationSpec
from qft_hf.kernels import backend
from qft_hf.nn.functional import linear
from qft_hf.optim import QFTSGD, QFTAdamW, QFTLion
from qft_hf.optim.capturable import CapturableSteps
from qft_hf.optim.flow import run_directly
from qft_hf.quant import QFTWeight
from tests.nn.small import Alive, randn
from tests.optim.common import (
    SPEC,
    backward,
    make_model,
    make_optimizer,
    snapshot,
    spoil,
    train,
    zero_gradient,
)
from tests.optim.test_state import through_a_file
from tests.tolerances import assert_same_tensors

# A learning rate at which codes move, and further arguments of the rule.
RULES = {
    "lion": (QFTLion, 1e-3, {}),
    "lion-4": (QFTLion, 1e-3, {"momentum_bits": 4}),
    "adamw": (QFTAdamW, 1e-3, {}),
    "sgd": (QFTSGD, 0.3, {}),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def make(rule: str, model: nn.Module | None = None, **arguments):
    kind, rate, own = RULES[rule]
    model = model or make_model()
    optimizer = make_optimizer(model, kind, **{**own, **arguments})
    for factor, group in enumerate(optimizer.param_groups, start=1):
        group["lr"] = factor * rate
    return model, optimizer


@every_rule
@pytest.mark.parametrize("n_parts", [1, 4])
def test_release_equals_stack_bit_for_bit(rule, n_parts):
    snapshots = []
    for gradient in ("stack", "release"):
        model, optimizer = make(rule, gradient=gradient)
        for step in range(4):
            for part in range(n_parts):
                with nullcontext() if part == n_parts - 1 else optimizer.accumulate():
                    backward(model, 10 * step + part)
            optimizer.step()
        snapshots.append(snapshot(model, optimizer))
    assert_same_tensors(*snapshots)


@every_rule
@pytest.mark.parametrize(
    "settings", [{}, {"gradient": "release", "clipping": "previous", "max_grad_norm": 0.1}], ids=len
)
@pytest.mark.parametrize("is_capturable", [False, True])
def test_the_default_device_changes_no_step(rule, settings, is_capturable):
    """With a GPU as PyTorch's default device, step numbers were made there, where NumPy fails."""
    snapshots = []
    for default in ("cpu", "meta"):
        model, optimizer = make(rule, **settings)
        if is_capturable:
            CapturableSteps(optimizer, run_directly)
        for step in range(2):
            backward(model, step)
            with torch.device(default):
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
        snapshots.append(snapshot(model, optimizer))
    assert_same_tensors(*snapshots)


@every_rule
@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_one_tile_of_a_gradient_is_float_at_a_time(rule, gradient, monkeypatch):
    """A loop over tiles once kept the last one while it computed the next."""
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", 64 * 100)
    kind, rate, own = RULES[rule]
    weight = nn.Parameter(QFTWeight.from_float(randn(600, 100), QuantizationSpec()))
    optimizer = kind([weight], lr=rate, gradient=gradient, **own)
    before = weight.codes.clone()
    with Alive(at_least=64 * 100) as alive:
        linear(randn(1, 100, seed=1), weight).sum().backward()
        optimizer.step()
    assert (weight.codes != before).any()
    assert alive.elements == 64 * 100


@every_rule
@pytest.mark.parametrize("modes", [*permutations(["stack", "release"])], ids=" then ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_in_the_other_mode_equals_the_straight_run(rule, modes, dtype):
    straight, optimizer = make(rule, make_model(dtype=dtype))
    train(straight, optimizer, range(5))

    first, other = modes
    model, stopped = make(rule, make_model(dtype=dtype), gradient=first)
    train(model, stopped, range(2))
    saved = through_a_file(stopped.state_dict())
    _, resumed = make(rule, model, gradient=other, seed=99)
    resumed.load_state_dict(saved)
    train(model, resumed, range(2, 5))

    assert_same_tensors(snapshot(model, resumed), snapshot(straight, optimizer))


@every_rule
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(rule, copied):
    model, optimizer = make(rule)
    train(model, optimizer, range(2))
    other, copy_of_it = copied((model, optimizer))

    train(model, optimizer, [2])
    train(other, copy_of_it, [2])

    assert type(copy_of_it) is type(optimizer)
    assert_same_tensors(snapshot(other, copy_of_it), snapshot(model, optimizer))


@every_rule
@pytest.mark.parametrize("where", ["int8", "float"])
def test_raise_leaves_everything_as_it_was(rule, where):
    model, optimizer = make(rule)
    train(model, optimizer, range(2))
    backward(model, 2)
    spoil(model, where)
    before = snapshot(model, optimizer)

    with pytest.raises(
        FloatingPointError, match=r"weights and optimizer state are unchanged.*'skip'"
    ):
        optimizer.step()

    assert_same_tensors(snapshot(model, optimizer), before)
    assert all(p.grad is not None for p in model.parameters())
    # The remaining gradients can be dropped, and training continues.
    optimizer.zero_grad()
    train(model, optimizer, [3])
    assert optimizer.state[model.embed.weight]["step"] == 3


@every_rule
def test_rows_that_never_had_a_gradient_stay(rule):
    """Most words of a vocabulary are in no batch; rounding noise must not reach their rows."""
    kind, rate, own = RULES[rule]
    weight = nn.Parameter(QFTWeight.from_float(torch.randn(20, 300), SPEC))
    optimizer = kind([weight], lr=10 * rate, **own)
    before = {name: field.clone() for name, field in weight.fields().items()}

    for step in range(20):
        weight.grad = zero_gradient(weight)
        draw = torch.Generator().manual_seed(step)
        weight.grad.set_rows_(slice(0, 10), torch.randn(10, 300, generator=draw))
        optimizer.step()

    after = weight.fields()
    assert_same_tensors(
        {name: field[10:] for name, field in after.items()},
        {name: field[10:] for name, field in before.items()},
    )
    assert (weight.codes[:10] != before["codes"][:10]).float().mean() > 0.5
    for name, tensor in optimizer.state[weight].items():
        if name.endswith("_codes"):
            assert (tensor[10:] == 0).all()
            assert (tensor[:10] != 0).any()


@every_rule
@pytest.mark.parametrize("stochastic", [True, False])
def test_the_backends_train_alike(rule, stochastic):
    results: list[dict[str, Tensor]] = []
    for name in ("reference", "cpu"):
        model, optimizer = make(rule, stochastic_rounding=stochastic)
        for step in range(3):
            backward(model, step)  # on one backend, since float sums depend on their order
            with backend.use(name):
                optimizer.step()
        results.append(snapshot(model, optimizer))
    assert_same_tensors(*results)


@pytest.mark.parametrize(
    ("saved", "own"),
    [pair for pair in permutations(RULES, 2) if pair not in permutations(["lion", "lion-4"])],
)
def test_the_state_of_another_rule_is_refused_and_nothing_changes(saved, own):
    model, other = make(saved)
    train(model, other, [0])
    model, optimizer = make(own)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)

    with pytest.raises(
        ValueError, match=r"parameter 0 must be a step and .*another optimizer.*Resume with the"
    ):
        optimizer.load_state_dict(through_a_file(other.state_dict()))

    assert_same_tensors(snapshot(model, optimizer), before)
