"""Requirements of PyTorch's own optimizer tests, applied to ours with float parameters.

The bodies follow `TestOptimRenewed` of PyTorch's `test/test_optim.py`, rewritten. These do not
apply:

- foreach, fused, capturable, differentiable, maximize for tensors on several GPUs: there are no
  such arguments; float parameters of a group are always updated together.
- complex parameters, sparse gradients: refused by the constructor, and by the step.
- state without a `step`, or with `step` as a number of another dtype: `tests/optim/test_state.py`.
- peak memory of foreach, casting of state to a parameter's dtype: state stays as it is stored.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from qft_hf import QFTSGD, QFTAdamW, QFTLion
from tests.tolerances import assert_same_tensors

pytestmark = [
    pytest.mark.parametrize("kind", [QFTLion, QFTAdamW, QFTSGD]),
    pytest.mark.parametrize("gradient", ["stack", "release"]),
]
INPUT = torch.linspace(-1.5, 2.0, 5)


class Regression(nn.Module):
    """A loss of `|weight @ input + bias|^2`, whose minimum is 0."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        values = torch.linspace(-0.9, 1.1, 55, dtype=dtype).sin()
        self.weight = nn.Parameter(values[:50].reshape(10, 5).clone())
        self.bias = nn.Parameter(torch.linspace(0.3, 1.0, 10, dtype=dtype))

    def loss(self) -> Tensor:
        return (self.weight.float().mv(INPUT) + self.bias.float()).pow(2).sum()


def make(kind, gradient, params, **arguments):
    return kind(params, gradient=gradient, **{"lr": 1e-2, "seed": 3, **arguments})


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    return closure


def fit(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.step(closure_of(model, optimizer))


def bits(model, optimizer):
    state = optimizer.state_dict()["state"]
    return [p.detach().clone() for p in model.parameters()] + [
        state[key][name].clone() for key in sorted(state) for name in sorted(state[key])
    ]


def test_the_loss_goes_down(kind, gradient):
    for dtype in (torch.float32, torch.bfloat16):
        model = Regression(dtype)
        optimizer = make(kind, gradient, model.parameters())
        before = model.loss().item()
        fit(model, optimizer, 20)
        assert model.loss().item() < before


def test_maximize_goes_up(kind, gradient):
    model = Regression()
    before = model.loss().item()
    fit(model, make(kind, gradient, model.parameters(), maximize=True), 20)
    assert model.loss().item() > before


def test_noncontiguous_parameters_go_down(kind, gradient):
    model = Regression()
    model.weight = nn.Parameter(torch.linspace(-1, 1, 100).reshape(10, 5, 2)[..., 0])
    assert not model.weight.is_contiguous()
    before = model.loss().item()
    fit(model, make(kind, gradient, model.parameters()), 20)
    assert model.loss().item() < before


SCHEDULERS = [
    lambda o: StepLR(o, gamma=0.9, step_size=3),
    lambda o: LinearLR(o, start_factor=0.4, total_iters=4),
    lambda o: ExponentialLR(o, gamma=0.9),
    lambda o: ReduceLROnPlateau(o),
    lambda o: CosineAnnealingLR(o, T_max=7),
    lambda o: LambdaLR(o, lambda step: 0.95**step),
    lambda o: PolynomialLR(o, total_iters=40),
    lambda o: OneCycleLR(o, max_lr=2e-2, total_steps=40, cycle_momentum=False),
    lambda o: CyclicLR(o, base_lr=1e-4, max_lr=1e-2, step_size_up=4, cycle_momentum=False),
    lambda o: SequentialLR(o, [ConstantLR(o, total_iters=4), StepLR(o, 9)], milestones=[5]),
]


@pytest.mark.parametrize("number", range(len(SCHEDULERS)))
def test_schedulers_go_down(kind, gradient, number):
    model = Regression()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 5e-3}]
    optimizer = make(kind, gradient, groups)
    scheduler = SCHEDULERS[number](optimizer)
    before = model.loss().item()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "lr_scheduler.step() before optimizer.step()"
        for _ in range(12):
            loss = optimizer.step(closure_of(model, optimizer))
            scheduler.step(loss.item()) if number == 3 else scheduler.step()
    assert model.loss().item() < before
    assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)


def test_a_cycle_of_momentum_moves_the_betas(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    if kind is QFTSGD:
        with pytest.raises(ValueError, match="momentum or beta1"):
            OneCycleLR(optimizer, max_lr=2e-2, total_steps=9)
        return
    scheduler = OneCycleLR(optimizer, max_lr=2e-2, total_steps=9)
    found = set()
    for _ in range(8):
        optimizer.step(closure_of(model, optimizer))
        scheduler.step()
        found.add(optimizer.param_groups[0]["betas"][0])
    assert len(found) > 3


def test_groups_have_their_own_rates(kind, gradient):
    model = Regression()
    groups = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias]}]
    weight, bias = (p.detach().clone() for p in (model.weight, model.bias))
    fit(model, make(kind, gradient, groups, weight_decay=0.5))
    assert torch.equal(model.weight, weight)
    assert not torch.equal(model.bias, bias)


def test_groups_have_their_own_decay(kind, gradient):
    model = Regression()
    groups = [{"params": [model.weight], "weight_decay": 0.2}, {"params": [model.bias]}]
    optimizer = make(kind, gradient, groups, weight_decay=0.0)
    weight, bias = (p.detach().clone() for p in (model.weight, model.bias))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected = weight * (1 - 1e-2 * 0.2)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=2e-7, atol=0)
    assert torch.equal(model.bias, bias)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_may_be_a_tensor(kind, gradient, shape):
    results = []
    for lr in (0.03125, torch.full(shape, 0.03125)):
        model = Regression()
        optimizer = make(kind, gradient, model.parameters(), lr=lr)
        scheduler = ExponentialLR(optimizer, gamma=0.5)
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer))
            scheduler.step()
        results.append(bits(model, optimizer))
        assert type(optimizer.param_groups[0]["lr"]) is type(lr)
    assert_same_tensors(*results)


def test_without_gradients_a_step_changes_nothing(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters(), weight_decay=0.3)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert_same_tensors([p.detach() for p in model.parameters()], before)
    assert not optimizer.state


def test_zero_gradients_without_decay_change_no_parameter(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters(), weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_same_tensors([p.detach() for p in model.parameters()], before)


def test_empty_parameters_are_updated_to_themselves(kind, gradient):
    parameter = nn.Parameter(torch.empty(0))
    optimizer = make(kind, gradient, [parameter, nn.Parameter(torch.ones(3))])
    parameter.grad = torch.empty(0)
    optimizer.step()
    assert parameter.shape == (0,)


def test_it_can_be_printed(kind, gradient):
    text = repr(make(kind, gradient, Regression().parameters(), lr=0.125, weight_decay=0.25))
    assert kind.__name__ in text
    assert "lr: 0.125" in text
    assert "weight_decay: 0.25" in text


@pytest.mark.parametrize("with_names", [False, True])
def test_a_state_dict_through_a_file_goes_on_with_the_same_bits(kind, gradient, with_names):
    def groups(model):
        if not with_names:
            return model.parameters()
        return [{"params": [pair]} for pair in model.named_parameters()]

    model, other = Regression(), Regression()
    optimizer = make(kind, gradient, groups(model))
    fit(model, optimizer)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    again = make(kind, gradient, groups(other), lr=0.7, seed=9)
    again.load_state_dict(state)
    saved = copy.deepcopy(state)
    for _ in range(3):
        fit(model, optimizer, 1)
        fit(other, again, 1)
        assert_same_tensors(bits(other, again), bits(model, optimizer))
    assert again.param_groups[0].get("param_names") == (["weight"] if with_names else None)
    for one in state["state"]:  # the loaded state is a copy
        for name, value in state["state"][one].items():
            assert torch.equal(value, saved["state"][one][name])


@pytest.mark.parametrize(("saved", "own"), [(True, False), (False, True)])
def test_names_of_parameters_are_no_part_of_the_state(kind, gradient, saved, own):
    def groups(model, with_names):
        return list(model.named_parameters()) if with_names else list(model.parameters())

    model, other = Regression(), Regression()
    optimizer = make(kind, gradient, groups(model, saved))
    fit(model, optimizer)
    again = make(kind, gradient, groups(other, own))
    again.load_state_dict(optimizer.state_dict())
    assert_same_tensors(bits(model, again), bits(model, optimizer))
    assert ("param_names" in again.param_groups[0]) == (saved or own)


def test_options_of_older_checkpoints_have_defaults(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    fit(model, optimizer)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["maximize"], group["seed"], group["stochastic_rounding"]
    optimizer.load_state_dict(state)
    fit(model, optimizer)
    assert optimizer.param_groups[0]["seed"] == 3


def test_step_hooks_run_in_order_and_around_the_step(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    said = []
    seen = model.bias.detach().clone()

    def pre(opt, args, kwargs):
        said.append(("pre", torch.equal(model.bias, seen), opt is optimizer))

    def post(opt, args, kwargs):
        said.append(("post", torch.equal(model.bias, seen), opt is optimizer))

    handles = [
        optimizer.register_step_post_hook(post),
        optimizer.register_step_pre_hook(pre),
        register_optimizer_step_pre_hook(lambda *_: said.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: said.append("global post")),
    ]
    model.loss().backward()
    optimizer.step()
    expected = ["global pre", ("pre", True, True), ("post", False, True), "global post"]
    for handle in handles:
        handle.remove()
    fit(model, optimizer, 1)
    assert said == expected


def test_a_pre_hook_may_change_the_arguments_of_a_step(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    handle = optimizer.register_step_pre_hook(
        lambda opt, args, kwargs: ((opt, closure_of(model, opt)), {})
    )
    assert optimizer.step() is not None
    handle.remove()
    assert optimizer.step() is None


def test_state_dict_hooks(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    fit(model, optimizer)
    said = []
    optimizer.register_state_dict_pre_hook(lambda opt: said.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: state.update(note="post"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": state["note"] * 2})
    assert optimizer.state_dict()["note"] == "postpost"
    assert said == ["pre"]


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_before_loading_change_what_is_loaded(kind, gradient, prepend):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    fit(model, optimizer)
    state = optimizer.state_dict()

    def halve(opt, loading):  # in place of a copy
        loading["param_groups"] = copy.deepcopy(loading["param_groups"])
        loading["param_groups"][0]["lr"] /= 2

    def replace(opt, loading):
        groups = [{**group, "lr": group["lr"] + 1} for group in loading["param_groups"]]
        return {**loading, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_pre_hook(replace, prepend=prepend)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == ((1e-2 + 1) / 2 if prepend else 1e-2 / 2 + 1)
    assert state["param_groups"][0]["lr"] == 1e-2


def test_hooks_before_loading_are_checked_too(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    fit(model, optimizer)
    before = bits(model, optimizer)

    def spoil(opt, loading):
        return {**loading, "param_groups": [{**loading["param_groups"][0], "lr": float("nan")}]}

    handle = optimizer.register_load_state_dict_pre_hook(spoil)
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.load_state_dict(optimizer.state_dict())
    handle.remove()
    assert_same_tensors(bits(model, optimizer), before)
    optimizer.load_state_dict(optimizer.state_dict())


def test_hooks_after_loading_see_the_state_and_may_change_it(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    fit(model, optimizer)
    other = make(kind, gradient, model.parameters())
    seen = []

    def look(opt):
        seen.append({key: int(one["step"]) for key, one in opt.state.items()})
        opt.param_groups[0]["lr"] = 0.5

    other.register_load_state_dict_post_hook(look)
    other.load_state_dict(optimizer.state_dict())
    assert seen == [dict.fromkeys(model.parameters(), 3)]
    assert other.param_groups[0]["lr"] == 0.5


def public(optimizer):
    return {name for name in vars(optimizer) if not name.startswith("_")}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_have_all_public_attributes_and_go_on_alike(kind, gradient, copied, scheduled):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    fit(model, optimizer)
    expected = public(optimizer)
    if scheduled:  # puts its own `step` on the optimizer, which is not copied
        StepLR(optimizer, 3)
    other_model, other = copied((model, optimizer))
    assert public(other) == expected
    other.train()
    for _ in range(2):
        fit(model, optimizer, 1)
        fit(other_model, other, 1)
        assert_same_tensors(bits(other_model, other), bits(model, optimizer))


def test_a_group_that_is_added_trains_from_then_on(kind, gradient, caplog):
    model, late = Regression(), Regression()
    optimizer = make(kind, gradient, model.parameters())
    fit(model, optimizer, 1)
    optimizer.add_param_group({"params": late.weight, "lr": 2e-2})
    before = late.weight.detach().clone()
    (model.loss() + late.loss()).backward()
    optimizer.step()
    assert not torch.equal(late.weight, before)
    assert late.weight.grad is None
    assert int(optimizer.state[late.weight]["step"]) == 1
    assert int(optimizer.state[model.weight]["step"]) == 2
    assert "waited" not in caplog.text
    assert optimizer.param_groups[1]["weight_decay"] == optimizer.param_groups[0]["weight_decay"]


def test_a_group_that_is_added_while_gradients_are_left_alone_is_left_alone(kind, gradient):
    model, late = Regression(), Regression()
    optimizer = make(kind, gradient, model.parameters())
    optimizer.eval()
    optimizer.add_param_group({"params": late.weight})
    late.loss().backward()
    assert late.weight.grad is not None


@pytest.mark.parametrize(
    ("params", "error"),
    [
        (lambda: [], ValueError),
        (lambda: torch.ones(3), TypeError),
        (lambda: [torch.ones(3, requires_grad=True) * 2], ValueError),
        (lambda: [{"params": {nn.Parameter(torch.ones(3))}}], TypeError),
        (lambda: ["weight"], TypeError),
        (lambda: [{"params": (p := [nn.Parameter(torch.ones(3))])}, {"params": p}], ValueError),
        (lambda: [nn.Parameter(torch.ones(3, dtype=torch.complex64))], TypeError),
        (lambda: [nn.Parameter(torch.ones(3, dtype=torch.float16))], TypeError),
    ],
)
def test_bad_parameters_are_refused(kind, gradient, params, error):
    with pytest.raises(error):
        make(kind, gradient, params())


def test_a_sparse_gradient_is_refused_and_nothing_changes(kind, gradient):
    """PyTorch computes the norm of a sparse gradient since 2.14, and QFTAdamW took it."""
    table, other = nn.Embedding(7, 3, sparse=True), nn.Linear(3, 2)
    parameters = [*other.parameters(), *table.parameters()]
    optimizer = make(kind, gradient, parameters)
    before = [parameter.detach().clone() for parameter in parameters]

    def train():
        other(table(torch.tensor([1, 4]))).sum().backward()  # released gradients are refused here
        optimizer.step()

    with pytest.raises(TypeError, match=r"need dense gradients, got .* \(7, 3\)\. Make its"):
        train()
    assert all(map(torch.equal, parameters, before))
    assert table.weight.grad is not None
    assert optimizer.state == {}


def test_a_closure_runs_with_gradients_and_its_loss_is_returned(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    with torch.no_grad():
        loss = optimizer.step(closure_of(model, optimizer))
    assert loss.requires_grad
    assert int(optimizer.state[model.weight]["step"]) == 1


def test_state_is_there_after_a_step(kind, gradient):
    model = Regression()
    optimizer = make(kind, gradient, model.parameters())
    fit(model, optimizer, 1)
    assert set(optimizer.state) == set(model.parameters())
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())
