"""Hooks and attributes that a user puts on a parameter stay there and have effect."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from qft_hf import QFTConfig, dequantize_model_, quantize_model_
from qft_hf.optim import QFTSGD, QFTLion
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.optim.test_release import (
    N_WORDS,
    Network,
    batches,
    everything,
    loss_of,
    make_optimizer,
    network,
)
from tests.tolerances import FP32_EPS, assert_same_tensors

MODES = ["stack", "release"]
NEW = slice(30, N_WORDS)  # rows of tokens that were added


def row_mask(rows: int = N_WORDS, kept: slice = NEW) -> Tensor:
    mask = torch.zeros(rows, 1)
    mask[kept] = 1
    return mask


def step(model: nn.Module, optimizer, ids: Tensor, n_parts: int = 1) -> None:
    parts = ids.chunk(n_parts)
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        with nullcontext() if is_last else optimizer.accumulate():
            loss_of(model, part).backward()
    optimizer.step()


def moved_rows(before: dict[str, Tensor], model: nn.Module, name: str) -> list[int]:
    """Return the rows of which any stored value differs."""
    after = model.state_dict()
    moved = torch.zeros(len(after[f"{name}_q"]), dtype=torch.bool)
    for key, old in before.items():
        if key.startswith(f"{name}_"):
            moved |= (old != after[key]).any(dim=1)
    return moved.nonzero().flatten().tolist()


def masking(mask: Tensor, form: str):
    """Return the same hook in one of four forms."""

    def in_place(gradient: Tensor) -> None:
        gradient.mul_(mask)

    return {
        "right": lambda gradient: gradient * mask,
        "left": lambda gradient: mask * gradient,
        "in place": in_place,
        "elements": lambda gradient: gradient * mask.expand(gradient.shape),
    }[form]


@pytest.mark.parametrize("form", ["right", "left", "in place", "elements"])
@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_row_mask_trains_the_new_tokens_only(is_tied, gradient, n_parts, form):
    """Weight decay is 0, since it moves every row, as in any optimizer."""
    model = network(is_tied=is_tied)
    optimizer = make_optimizer(model, gradient, lr=0.05, weight_decay=0.0)
    model.head.weight.register_hook(masking(row_mask(), form))
    before = copy.deepcopy(model.state_dict())

    for ids in batches(3):
        step(model, optimizer, ids, n_parts)

    assert moved_rows(before, model, "head.weight") == list(range(N_WORDS))[NEW]
    assert moved_rows(before, model, "up.weight") == list(range(301))
    assert optimizer.state[model.head.weight]["step"] == 3


@pytest.mark.parametrize("name", ["up", "down", "head", "norm"])
@pytest.mark.parametrize("gradient", MODES)
def test_a_hook_sees_the_whole_gradient_in_int8(gradient, name):
    model = network(is_tied=False)
    optimizer = make_optimizer(model, gradient)
    weight = model.get_submodule(name).weight
    seen: list[Tensor] = []
    weight.register_hook(lambda g: seen.append(copy.deepcopy(g)))

    loss_of(model, batches(1)[0]).backward()

    other = network(is_tied=False)
    loss_of(other, batches(1)[0]).backward()
    expected = other.get_submodule(name).weight.grad
    assert len(seen) == 1
    if isinstance(weight, QFTWeight):
        assert type(seen[0]) is Int8Gradient
        assert torch.equal(seen[0].codes, expected.codes)
        assert torch.equal(seen[0].scales, expected.scales)
    else:
        assert torch.equal(seen[0], expected)
    optimizer.step()


@pytest.mark.parametrize("is_first", [False, True])
def test_an_accumulate_hook_sees_the_whole_gradient_too(is_first):
    """If it comes before the flow's hook: after that one no gradient is left, only the update."""
    model = network(is_tied=False)
    seen: list[type] = []

    def scale(parameter: nn.Parameter) -> None:
        seen.append(type(parameter.grad))
        if parameter.grad is not None:
            parameter.grad.mul_(0)

    if is_first:
        model.up.weight.register_post_accumulate_grad_hook(scale)
    optimizer = make_optimizer(model, "release", weight_decay=0.0)
    if not is_first:
        model.up.weight.register_post_accumulate_grad_hook(scale)
    before = copy.deepcopy(model.state_dict())

    step(model, optimizer, batches(1)[0])

    assert seen == [Int8Gradient if is_first else type(None)]
    assert (moved_rows(before, model, "up.weight") == []) == is_first


@pytest.mark.parametrize("hook", ["half", "row mask", "element mask", "none"])
@pytest.mark.parametrize("n_parts", [1, 2])
def test_release_equals_stack_with_hooks_too(n_parts, hook):
    generator = torch.Generator().manual_seed(2)
    hooks = {
        "half": lambda g: g * 0.5,
        "row mask": lambda g: g * torch.linspace(0, 1, 301)[:, None],
        "element mask": lambda g: torch.rand(301, 22, generator=generator) * g,
        "none": lambda g: None,
    }
    states = []
    for gradient in MODES:
        generator.manual_seed(2)
        model = network()
        optimizer = make_optimizer(model, gradient)
        model.up.weight.register_hook(hooks[hook])
        for ids in batches(3):
            step(model, optimizer, ids, n_parts)
        states.append(everything(model, optimizer))
    assert_same_tensors(*states)


@pytest.mark.parametrize("gradient", MODES)
def test_a_hook_that_returns_none_changes_no_bit(gradient):
    states = []
    for with_hook in (False, True):
        model = network()
        optimizer = make_optimizer(model, gradient)
        if with_hook:
            for parameter in model.parameters():
                parameter.register_hook(lambda g: None)
        for ids in batches(3):
            step(model, optimizer, ids)
        states.append(everything(model, optimizer))
    assert_same_tensors(*states)


@pytest.mark.parametrize("gradient", MODES)
def test_half_a_gradient_moves_half_as_far_and_its_siblings_as_ever(gradient):
    """SGD with nearest rounding and steps of many quanta moves in proportion to the gradient."""
    moves, scales = [], []
    for factor in (1.0, 0.5):
        model = network(is_tied=False)
        optimizer = make_optimizer(
            model, gradient, QFTSGD, lr=50.0, weight_decay=0.0, stochastic_rounding=False
        )
        model.up.weight.register_hook(lambda g, factor=factor: g * factor)
        names = ("up", "down")
        before = [model.get_submodule(name).weight.dequantize() for name in names]
        step(model, optimizer, batches(1)[0])
        after = [model.get_submodule(name).weight for name in names]
        moves.append([w.dequantize() - old for w, old in zip(after, before, strict=True)])
        scales.append(model.up.weight.scales)

    (whole, sibling), (half, same_sibling) = moves
    assert torch.equal(sibling, same_sibling)
    assert whole.abs().max() > 20 * scales[0].max()
    # Values after each step are rounded to the nearest quantum; those before are exact.
    bound = 0.25 * scales[0] + 0.5 * scales[1] + 8 * FP32_EPS * whole.abs()
    assert ((half - whole / 2).abs() <= bound).all()


def masked_hook_moves_only(model: nn.Module, kept: slice) -> None:
    """Assert that a training step with the existing mask moves only these rows of `up`."""
    for gradient in MODES:
        trained = copy_with_hooks(model)
        optimizer = make_optimizer(trained, gradient, lr=0.05, weight_decay=0.0)
        before = copy.deepcopy(trained.state_dict())
        step(trained, optimizer, batches(1)[0])
        assert moved_rows(before, trained, "up.weight") == list(range(301))[kept]


def copy_with_hooks(model: nn.Module) -> nn.Module:
    """Return a deep copy with hooks, which torch drops when it copies parameters."""
    other = copy.deepcopy(model)
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        for hook in (old._backward_hooks or {}).values():
            new.register_hook(hook)
    return other


CHANGES = {
    "quantize": lambda: (Network(), lambda model: quantize_model_(model, QFTConfig())),
    "to": lambda: (network(), lambda model: model.to(torch.float64).to(torch.float32)),
    "to the same": lambda: (network(), lambda model: model.to(torch.float32)),
    "dequantize and back": lambda: (
        network(),
        lambda model: quantize_model_(dequantize_model_(model, torch.float32), QFTConfig()),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_hook_survives_and_its_handle_removes_it(change):
    model, apply = CHANGES[change]()
    kept = slice(100, 200)
    handle = model.up.weight.register_hook(lambda g: g * row_mask(301, kept))
    bias_calls: list[int] = []
    model.up.bias.register_hook(lambda g: bias_calls.append(1))

    apply(model)

    assert isinstance(model.up.weight, QFTWeight)
    optimizer = make_optimizer(model, "release", lr=0.05, weight_decay=0.0)
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, batches(1)[0])
    assert moved_rows(before, model, "up.weight") == list(range(301))[kept]
    assert bias_calls == [1]
    masked_hook_moves_only(model, kept)

    handle.remove()
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, batches(1)[0])
    assert moved_rows(before, model, "up.weight") == list(range(301))


def test_a_hook_survives_dequantizing():
    model = network()
    handle = model.up.weight.register_hook(lambda g: g * 0)
    dequantize_model_(model, torch.float32)
    assert type(model.up.weight) is nn.Parameter

    loss_of(model, batches(1)[0]).backward()
    assert (model.up.weight.grad == 0).all()
    assert (model.down.weight.grad != 0).any()
    model.zero_grad()
    handle.remove()
    loss_of(model, batches(1)[0]).backward()
    assert (model.up.weight.grad != 0).any()


def test_a_handle_removes_its_hook_only():
    model = network()
    first, second = [], []
    handle = model.up.weight.register_hook(lambda g: first.append(1))
    model.up.weight.register_hook(lambda g: second.append(1))
    model.to(torch.bfloat16)
    handle.remove()
    model.to(torch.float32)

    loss_of(model, batches(1)[0]).backward()

    assert (first, second) == ([], [1])


@pytest.mark.parametrize("change", CHANGES)
def test_attributes_survive(change):
    model, apply = CHANGES[change]()
    model.up.weight.lr_scale = 0.25
    model.head.weight.tags = ["embedding"]
    model.norm.weight.lr_scale = 2.0
    ids = {name: id(p) for name, p in model.named_parameters()}

    apply(model)

    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert model.up.weight.lr_scale == 0.25
    assert model.embed.weight.tags == ["embedding"]  # the same parameter
    assert model.norm.weight.lr_scale == 2.0
    assert not hasattr(model.down.weight, "lr_scale")
    # Attributes of the storage are those of the new parameter.
    assert model.up.weight.stored.codes.dtype == torch.int8
    assert model.embed.weight.is_table
    assert not model.up.weight.is_table


def test_attributes_survive_dequantizing_and_the_inside_does_not():
    model = network()
    model.up.weight.lr_scale = 0.25
    dequantize_model_(model, torch.bfloat16)

    assert model.up.weight.lr_scale == 0.25
    assert not hasattr(model.up.weight, "stored")
    assert not hasattr(model.embed.weight, "is_table")


def test_the_optimizer_goes_on_through_a_move():
    """Hooks of release are among those that stay."""
    straight, moved = network(), network()
    optimizer, other = (make_optimizer(m, "release") for m in (straight, moved))
    for ids in batches(3):
        step(straight, optimizer, ids)
        moved.to(torch.float64).to(torch.float32)
        loss_of(moved, ids).backward()
        assert all(p.grad is None for p in moved.parameters())
        other.step()
    assert_same_tensors(everything(straight, optimizer), everything(moved, other))


@pytest.mark.parametrize("gradient", MODES)
def test_what_a_hook_returns_in_float_is_quantized(gradient):
    model = network()
    make_optimizer(model, gradient)
    seen: list[Tensor] = []
    model.up.weight.register_hook(lambda g: g.dequantize().clamp(-1e-3, 1e-3))
    model.up.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    optimizer = make_optimizer(model, gradient)  # whose hook comes last

    step(model, optimizer, batches(1)[0])

    assert seen[0].abs().max() == pytest.approx(1e-3)
    expected = network()
    other = make_optimizer(expected, gradient)
    expected.up.weight.register_hook(
        lambda g: Int8Gradient.from_float(g.dequantize().clamp(-1e-3, 1e-3), dtype=g.dtype)
    )
    step(expected, other, batches(1)[0])
    assert_same_tensors(everything(model, optimizer), everything(expected, other))


def test_a_mask_keeps_the_momentum_of_masked_rows_at_zero():
    model = network(is_tied=False)
    optimizer = make_optimizer(model, "release")
    model.up.weight.register_hook(lambda g: g * row_mask(301, slice(0, 10)))
    for ids in batches(2):
        step(model, optimizer, ids)
    momentum = optimizer.state[model.up.weight]["momentum_codes"]
    assert (momentum[10:] == 0).all()
    assert (momentum[:10] != 0).any()


def test_a_scaled_gradient_is_scaled_in_its_norm():
    model = network(is_tied=False)
    optimizer = QFTLion(model.parameters(), gradient="release")
    for parameter in model.parameters():
        parameter.register_hook(lambda g: g * 0.5)
    step(model, optimizer, batches(1)[0])
    other = network(is_tied=False)
    loss_of(other, batches(1)[0]).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    assert optimizer.released_norm.item() == pytest.approx(norm.item() / 2, rel=8 * FP32_EPS)
