"""Gradient release against gradients that wait (stack): the same bits, less memory, or an error."""

import copy
import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qft_hf import QFTSGD, QFTAdamW, QFTConfig, QFTLion, QFTWeight, kernels, quantize_model_
from qft_hf.nn import QFTLinear
from qft_hf.optim import QFTOptimizer
from qft_hf.quant import Int8Gradient, TiledGradient
from tests.tolerances import assert_same_tensors

N_WORDS = 37


class Network(nn.Module):
    """Embedding, two layers with biases and a norm, and a head that may share the embedding."""

    def __init__(self, *, is_tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_WORDS, 22)
        self.up = nn.Linear(22, 301)
        self.down = nn.Linear(301, 22)
        self.norm = nn.LayerNorm(22)
        self.head = nn.Linear(22, N_WORDS, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, reentrant: bool | None = None) -> Tensor:
        x = self.embed(ids)
        if reentrant is None:
            x = x + self._mlp(x)
        else:
            x = x + checkpoint(self._mlp, x, use_reentrant=reentrant)
        return self.head(self.norm(x))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def network(*, is_tied: bool = True) -> Network:
    torch.manual_seed(0)
    return quantize_model_(Network(is_tied=is_tied), QFTConfig())


def batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(N_WORDS, (4, 5), generator=generator) for _ in range(n)]


def loss_of(model: nn.Module, ids: Tensor, **arguments) -> Tensor:
    return nn.functional.cross_entropy(
        model(ids, **arguments).flatten(0, 1), (ids + 1).flatten() % 7
    )


def make_optimizer(
    model: nn.Module, gradient: str, kind: type[QFTOptimizer] = QFTLion, **arguments
) -> Any:
    settings = {"lr": 3e-3, "weight_decay": 0.1, "seed": 5}
    return kind(model.parameters(), gradient=gradient, **settings | arguments)


def everything(model: nn.Module, optimizer: QFTOptimizer) -> list[Tensor]:
    states = [
        value
        for _, state in sorted(optimizer.state_dict()["state"].items())
        for value in state.values()
    ]
    assert all(isinstance(value, Tensor) for value in states)
    return [*model.state_dict().values(), *states]


def all_but_steps(model: nn.Module, optimizer: QFTOptimizer) -> list[Tensor]:
    """Leave out step numbers: a step refused too late counts, as its random numbers are spent."""
    return [tensor for tensor in everything(model, optimizer) if tensor.dtype != torch.int64]


def train(gradient: str, *, accumulation: int = 1, reentrant=None, steps: int = 4, **arguments):
    model = network()
    optimizer = make_optimizer(model, gradient, **arguments)
    data = iter(batches(steps * accumulation))
    for _ in range(steps):
        for number in range(accumulation):
            is_last = number == accumulation - 1
            with nullcontext() if is_last else optimizer.accumulate():
                loss_of(model, next(data), reentrant=reentrant).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_release_equals_stack_bit_for_bit(accumulation, reentrant):
    stack, release = (
        train(gradient, accumulation=accumulation, reentrant=reentrant)
        for gradient in ("stack", "release")
    )
    assert_same_tensors(everything(*stack), everything(*release))


def count_calls(monkeypatch, name: str) -> list[tuple[int, ...]]:
    """Record the shapes of the weights that an operator is called for."""
    calls: list[tuple[int, ...]] = []
    operator = getattr(kernels, name)

    def counting(weight, *others, **arguments):
        calls.append(tuple(weight.codes.shape))
        return operator(weight, *others, **arguments)

    monkeypatch.setattr(kernels, name, counting)
    return calls


UP, DOWN, TABLE = (301, 22), (22, 301), (N_WORDS, 22)


@pytest.mark.parametrize(
    ("tile_elements", "settings", "at_once", "in_turn"),
    [
        (10**9, {}, [DOWN, UP], [TABLE]),  # the tied table adds two gradients, which are INT8
        (22 * 301 - 1, {}, [(11, 301), (11, 301), (192, 22), (109, 22)], [TABLE]),  # tile by tile
        (10**9, {"clipping": "previous", "max_grad_norm": 0.1}, [DOWN, UP], [TABLE]),
        (10**9, {"clipping": "tensor", "max_grad_norm": 0.1}, [], [DOWN, UP, TABLE]),
    ],
)
def test_gradients_are_quantized_by_the_step(
    monkeypatch, tile_elements, settings, at_once, in_turn
):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    stepped = count_calls(monkeypatch, "quantize_and_lion_step_")
    quantized = count_calls(monkeypatch, "lion_step_")

    train("release", steps=1, **settings)

    assert stepped == at_once
    assert quantized == in_turn


@pytest.mark.parametrize("momentum_bits", [8, 4])
def test_weights_of_several_tiles_get_the_bits_of_the_stack(monkeypatch, momentum_bits):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", 22 * 30)
    tiled = train("release", momentum_bits=momentum_bits)
    stack = train("stack", momentum_bits=momentum_bits)
    assert_same_tensors(everything(*tiled), everything(*stack))


@pytest.fixture
def kinds(monkeypatch) -> dict[tuple[int, ...], list[type]]:
    """Record the types of gradients that layers make, by the shape of their weight."""
    seen: dict[tuple[int, ...], list[type]] = {}
    make = QFTWeight.gradient

    def watched(weight: QFTWeight, *arguments):
        gradient = make(weight, *arguments)
        seen.setdefault(tuple(weight.shape), []).append(type(gradient))
        return gradient

    monkeypatch.setattr(QFTWeight, "gradient", watched)
    return seen


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_logits_gradient_of_a_tied_head_is_not_kept_for_the_table(kinds, is_tied, monkeypatch):
    """A tiled gradient of the head would keep the logits' gradient until the table's is made."""
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", 22 * 20)
    model = network(is_tied=is_tied)
    assert model.embed.weight.is_table
    assert model.head.weight.is_table == is_tied
    optimizer = make_optimizer(model, "release")

    loss_of(model, batches(1)[0]).backward()

    assert optimizer.state
    assert kinds == {
        TABLE: [Int8Gradient if is_tied else TiledGradient],
        UP: [TiledGradient],
        DOWN: [TiledGradient],
    }


def test_gradients_that_wait_are_int8():
    model = network()
    optimizer = make_optimizer(model, "release")
    with optimizer.accumulate():
        loss_of(model, batches(1)[0]).backward()

    waiting = [p.grad for p in model.parameters() if isinstance(p, QFTWeight)]
    assert len(waiting) == 3
    assert all(type(gradient) is Int8Gradient for gradient in waiting)


def test_who_does_not_release_gets_int8():
    """A run may change its mode: the optimizer that started last decides."""
    model = network()
    first = make_optimizer(model, "release")
    optimizer = make_optimizer(model, "stack")

    loss_of(model, batches(1)[0]).backward()

    assert type(model.up.weight.grad) is Int8Gradient
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters()))
    assert not first.state


@pytest.fixture
def live_elements(monkeypatch) -> list[int]:
    """Record the number of elements of all live gradients whenever another one is made."""
    gc.freeze()  # so that `look` finds only objects made from now on, not a million others
    seen: list[int] = []

    def look() -> None:
        alive: dict[int, int] = {}  # by address, as autograd has several objects of one gradient
        for found in gc.get_objects():
            if type(found) is Int8Gradient and "stored" in vars(found):
                alive[found.codes.data_ptr()] = found.numel()
            elif type(found) is TiledGradient and "tile_source" in vars(found):
                alive[id(found.tile_source)] = found.numel()  # its size once it is made
        seen.append(sum(alive.values()))

    for kind in (Int8Gradient, TiledGradient):
        make = kind.__init__

        def watched(gradient, *arguments, make=make, **keywords) -> None:
            make(gradient, *arguments, **keywords)
            look()

        monkeypatch.setattr(kind, "__init__", watched)
    return seen


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_only_one_gradient_is_alive_beside_those_of_tied_weights(is_tied, reentrant, live_elements):
    """A tied weight keeps its gradient from the head while all layers make theirs and, during one
    addition, also its gradient from the embedding and their sum."""
    model = network(is_tied=is_tied)
    weights = {id(p): p for p in model.parameters() if isinstance(p, QFTWeight)}.values()
    sizes = [weight.numel() for weight in weights]
    tied = model.embed.weight.numel() if is_tied else 0
    allowed = max(3 * tied, tied + max(sizes))

    peaks = {}
    for gradient in ("stack", "release"):
        optimizer = make_optimizer(model, gradient)
        live_elements.clear()
        loss_of(model, batches(1)[0], reentrant=reentrant).backward()
        peaks[gradient] = max(live_elements)
        optimizer.step()
    assert peaks["release"] <= allowed < peaks["stack"]
    assert all(p.grad is None for p in model.parameters())


def test_a_run_may_change_its_mode_at_a_checkpoint():
    straight, optimizer = train("stack", steps=4)

    model, first = train("release", steps=2)
    second = make_optimizer(model, "stack")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    third = make_optimizer(model, "release")
    third.load_state_dict(second.state_dict())
    for ids in batches(4)[2:]:
        loss_of(model, ids).backward()
        third.step()
    assert_same_tensors(everything(straight, optimizer), everything(model, third))


@pytest.mark.parametrize("small", [0, 22, 10**9])
def test_the_released_norm_is_the_global_norm(small, monkeypatch):
    """With float parameters that are updated at once, and with those that wait for each other."""
    monkeypatch.setattr("qft_hf.optim.release.SMALL", small)
    model = network()
    loss_of(model, batches(1)[0]).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))

    _, optimizer = train("release", steps=1)
    # The order of the sum differs: a few FP32 roundings.
    assert optimizer.released_norm.item() == pytest.approx(norm.item(), rel=1e-6)


def test_gradients_that_waited_are_not_in_the_released_norm():
    """The Trainer computes the norm of those and combines the two."""
    model, other = network(), network()
    loss_of(model, batches(1)[0]).backward()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer = make_optimizer(other, "release", clipping="previous", max_grad_norm=1.0)
    for parameter in list(other.parameters())[::2]:
        parameter._post_accumulate_grad_hooks.clear()

    loss_of(other, batches(1)[0]).backward()
    waiting = [p.grad for p in other.parameters() if p.grad is not None]
    waited = torch.nn.utils.get_total_norm(waiting)
    optimizer.step()

    assert waited > 0.1 * total
    released = (total.double().square() - waited.double().square()).sqrt().item()
    assert optimizer.released_norm.item() == pytest.approx(released, rel=1e-5)


def test_exact_clipping_equals_the_clipped_stack():
    model = network()
    optimizer = make_optimizer(model, "stack")
    other = network()
    released = make_optimizer(other, "release", clipping="exact", max_grad_norm=0.05)
    for ids in batches(3):
        loss_of(model, ids).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        with released.measure_norm():
            loss_of(other, ids).backward()
        loss_of(other, ids).backward()
        released.step()
        assert norm > 0.05  # it does clip
        assert released.released_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for name, value in model.state_dict().items():
        difference = (value.double() - other.state_dict()[name].double()).abs().max()
        # The norms differ by FP32 roundings, which may flip a stochastic rounding: one code.
        assert difference <= (1 if name.endswith("_q") else 1e-4), name


def test_exact_clipping_of_accumulated_gradients_needs_no_second_pass():
    ids = batches(2)
    model, other = network(), network()
    stack = make_optimizer(model, "stack")
    release = make_optimizer(other, "release", clipping="exact", max_grad_norm=0.05)
    for batch in ids:
        loss_of(model, batch).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    stack.step()
    with release.accumulate():
        loss_of(other, ids[0]).backward()
    loss_of(other, ids[1]).backward()
    release.step()
    assert norm > 0.05
    for name, value in model.state_dict().items():
        difference = (value.double() - other.state_dict()[name].double()).abs().max()
        # The two norms are summed in different orders, which may flip a rounding: one code.
        assert difference <= (1 if name.endswith("_q") else 1e-4), name


def test_accumulated_gradients_that_the_trainer_has_clipped_are_not_clipped_again():
    """Their norm is the limit up to rounding; a second clipping must not change even a last bit."""
    runs = []
    for gradient, settings in (("stack", {}), ("release", {"clipping": "exact"})):
        limit = {"max_grad_norm": 0.05} if settings else {}
        model = network()
        optimizer = make_optimizer(model, gradient, **settings, **limit)
        with optimizer.accumulate():
            loss_of(model, batches(2)[0]).backward()
        loss_of(model, batches(2)[1]).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
        optimizer.step()
        runs.append(everything(model, optimizer))
    assert_same_tensors(*runs)


@pytest.mark.parametrize("clipping", ["tensor", "previous"])
def test_clipping_holds_where_hooks_were_lost(clipping):
    """Gradients that reach the step unreleased are clipped there, as release would have done.

    Half of them were released before. The next step's previous norm includes both halves.
    """
    states = []
    for lose_hooks in (False, True):
        model = network()
        optimizer = make_optimizer(model, "release", clipping=clipping, max_grad_norm=0.02)
        for number, batch in enumerate(batches(3)):
            if lose_hooks and number == 1:
                for parameter in list(model.parameters())[::2]:
                    parameter._post_accumulate_grad_hooks.clear()
            loss_of(model, batch).backward()
            assert any(p.grad is not None for p in model.parameters()) == (
                lose_hooks and number == 1
            )
            optimizer.step()
        states.append(everything(model, optimizer))
    assert_same_tensors(*states)


@pytest.mark.parametrize("tile_elements", [10**9, 22 * 30])
def test_tensor_and_previous_clipping_follow_their_definition(monkeypatch, tile_elements):
    """There are enough steps to tell the norm of the step before from that of any other."""
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    ids = batches(4)
    for clipping in ("tensor", "previous"):
        model = network()
        optimizer = make_optimizer(model, "release", clipping=clipping, max_grad_norm=0.02)
        reference = network()
        stack = make_optimizer(reference, "stack")
        previous = None
        for batch in ids:
            loss_of(model, batch).backward()
            optimizer.step()
            loss_of(reference, batch).backward()
            gradients = [p.grad for p in reference.parameters()]
            norms = [torch.linalg.vector_norm(g) for g in gradients]
            for gradient, norm in zip(gradients, norms, strict=True):
                by = norm if clipping == "tensor" else previous
                if by is not None:
                    gradient.mul_((0.02 / (by + 1e-6)).clamp(max=1.0))
            previous = optimizer.released_norm
            stack.step()
        assert_same_tensors(everything(reference, stack), everything(model, optimizer))


@pytest.mark.parametrize("clipping", ["tensor", "previous", "exact"])
def test_a_limit_that_no_norm_reaches_changes_no_bit(clipping):
    straight, unclipped = train("release", steps=3)
    model = network()
    optimizer = make_optimizer(model, "release", clipping=clipping, max_grad_norm=1e6)
    for batch in batches(3):
        if clipping == "exact":
            with optimizer.measure_norm():
                loss_of(model, batch).backward()
        loss_of(model, batch).backward()
        optimizer.step()

    assert_same_tensors(everything(straight, unclipped), everything(model, optimizer))


def test_the_norm_of_bf16_gradients_is_that_of_float64():
    """Norms computed in BF16 would be off by up to a part in 256."""
    parameters = [nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (1000, 37, 5)]
    optimizer = QFTLion(parameters, gradient="release")
    factors = [torch.linspace(0.1, 1, len(p)).bfloat16() for p in parameters]

    sum((p * factor).sum() for p, factor in zip(parameters, factors, strict=True)).backward()
    optimizer.step()

    exact = torch.cat(factors).double().norm().item()
    assert optimizer.released_norm.item() == pytest.approx(exact, rel=1e-6)


def test_the_previous_norm_survives_a_checkpoint():
    settings = {"clipping": "previous", "max_grad_norm": 0.02}
    straight, optimizer = train("release", steps=4, **settings)
    model, first = train("release", steps=2, **settings)
    second = make_optimizer(model, "release", **settings)
    second.load_state_dict(first.state_dict())
    for ids in batches(4)[2:]:
        loss_of(model, ids).backward()
        second.step()
    assert_same_tensors(everything(straight, optimizer), everything(model, second))


def test_exact_clipping_without_a_measured_norm_says_what_to_do():
    model = network()
    optimizer = make_optimizer(model, "release", clipping="exact", max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"under optimizer\.measure_norm\(\)"):
        loss_of(model, batches(1)[0]).backward()
    assert not optimizer.state


def test_a_measured_norm_is_for_one_step():
    model = network()
    optimizer = make_optimizer(model, "release", clipping="exact", max_grad_norm=1.0)
    with optimizer.measure_norm():
        loss_of(model, batches(1)[0]).backward()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    before = copy.deepcopy(everything(model, optimizer))

    with pytest.raises(RuntimeError, match=r"under optimizer\.measure_norm\(\)"):
        loss_of(model, batches(2)[1]).backward()

    assert_same_tensors(before, everything(model, optimizer))


@pytest.mark.parametrize("is_inner_first", [False, True])
def test_a_context_that_accumulates_may_be_inside_of_another(is_inner_first):
    """The end of the inner one once made the rest of the outer one update weights."""
    model, other = network(), network()
    optimizer, stack = make_optimizer(model, "release"), make_optimizer(other, "stack")
    first, second, last = batches(3)
    with optimizer.accumulate():
        for ids in (first, second):
            if (ids is first) == is_inner_first:
                with optimizer.accumulate():
                    loss_of(model, ids).backward()
            else:
                loss_of(model, ids).backward()
        assert not optimizer.n_released
    loss_of(model, last).backward()
    assert optimizer.n_released
    optimizer.step()

    for ids in (first, second, last):
        loss_of(other, ids).backward()
    stack.step()
    assert_same_tensors(everything(model, optimizer), everything(other, stack))


def test_a_gradient_that_was_not_measured_is_told_once(caplog):
    """It is clipped by a norm that it is not part of."""
    model = network(is_tied=False)
    optimizer = make_optimizer(model, "release", clipping="exact", max_grad_norm=1.0)
    hidden = model.embed(batches(1)[0]).detach()
    losses = (lambda: model.head(hidden), lambda: model.down(model.up(hidden)))
    with optimizer.measure_norm():  # of both losses
        for loss in losses:
            loss().square().sum().backward()
    for loss in losses:
        loss().square().sum().backward()
    optimizer.step()
    assert caplog.text == ""

    for _ in range(2):
        with optimizer.measure_norm():
            losses[0]().square().sum().backward()
        for loss in losses:
            loss().square().sum().backward()
        optimizer.step()
    shape = str(tuple(model.down.weight.shape))
    assert caplog.text.count("is clipped by a norm that does not include it") == 1
    assert f"A gradient of shape {shape} is clipped" in caplog.text


def test_a_norm_measured_after_the_first_update_is_refused():
    """It was once that of the later gradients alone, and the norms of the earlier were lost."""
    model = network()
    optimizer = make_optimizer(model, "release", clipping="exact", max_grad_norm=1.0)
    with optimizer.measure_norm():
        loss_of(model, batches(1)[0]).backward()
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"updated \d+ weights of this step: the norm must be"):
        optimizer.measure_norm()
    optimizer.step()
    with optimizer.measure_norm():
        loss_of(model, batches(2)[1]).backward()


def test_accumulation_can_be_forbidden():
    model = network()
    optimizer = make_optimizer(model, "release", accumulation="forbid")
    with (
        optimizer.accumulate(),
        pytest.raises(ValueError, match="Set gradient_accumulation_steps=1"),
    ):
        loss_of(model, batches(1)[0]).backward()


class Failure(nn.Module):
    """Raises in backward."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.register_hook(self._fail)
        return x

    def _fail(self, gradient: Tensor) -> None:
        raise KeyboardInterrupt


def test_a_backward_pass_that_fails_half_way_is_noticed_and_can_be_given_up():
    model = network()
    optimizer = make_optimizer(model, "release")
    first, second = batches(2)
    handle = model.up.register_forward_hook(lambda module, inputs, output: Failure()(output))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, first).backward()
    handle.remove()

    after = model.state_dict()
    assert not torch.equal(before["down.weight_q"], after["down.weight_q"])
    assert torch.equal(before["up.weight_q"], after["up.weight_q"])
    with pytest.raises(
        RuntimeError, match=r"between two steps: reload .* optimizer\.zero_grad\(\)"
    ):
        loss_of(model, second).backward()

    optimizer.zero_grad()
    loss_of(model, second).backward()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def test_a_checkpoint_is_a_way_out_of_a_failed_backward_pass():
    straight, _ = train("release", steps=2)
    model, optimizer = train("release", steps=1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    handle = model.up.register_forward_hook(lambda module, inputs, output: Failure()(output))
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, batches(1)[0]).backward()
    handle.remove()

    model.load_state_dict(saved[0])
    model.zero_grad()
    optimizer.load_state_dict(saved[1])
    loss_of(model, batches(2)[1]).backward()
    optimizer.step()
    assert_same_tensors([*straight.state_dict().values()], [*model.state_dict().values()])


@pytest.mark.parametrize("settings", [{}, {"clipping": "previous", "max_grad_norm": 1.0}], ids=str)
def test_a_loss_that_is_not_finite_changes_nothing_and_the_step_says_so(settings):
    model = network()
    optimizer = make_optimizer(model, "release", **settings)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    before = copy.deepcopy(all_but_steps(model, optimizer))
    (loss_of(model, batches(1)[0]) * float("nan")).backward(
        inputs=[p for p in model.parameters() if p is not model.embed.weight]  # which is INT8
    )
    with pytest.raises(FloatingPointError, match=r"used the finite part.*Reload"):
        optimizer.step()
    assert_same_tensors(before, all_but_steps(model, optimizer))
    optimizer.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", [QFTLion, QFTAdamW, QFTSGD])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_in_an_int8_gradient_counts_as_zero(kind, accumulation, bad):
    runs = []
    for factor in (bad, 0.0):
        model = network()
        optimizer = make_optimizer(model, "release", kind)
        first, *data, last = batches(1 + accumulation)
        loss_of(model, first).backward()
        optimizer.step()
        mask = torch.ones(301, 1)
        mask[7] = factor
        model.up.weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        with optimizer.accumulate():
            for ids in data:
                loss_of(model, ids).backward()
        loss_of(model, last).backward()
        if factor == bad:
            with pytest.raises(FloatingPointError, match=r"used the finite part.*Reload"):
                optimizer.step()
        stored = [*model.up.weight.fields().values(), *model.down.weight.fields().values()]
        runs.append([*stored, *optimizer.state[model.up.weight].values()])
    assert_same_tensors(*runs)


def test_a_gradient_that_is_nowhere_finite_is_none_if_it_is_clipped_by_its_own_norm():
    runs = []
    for factor in (float("inf"), 0.0):
        model = network()
        optimizer = make_optimizer(model, "release", clipping="tensor", max_grad_norm=1.0)
        (loss_of(model, batches(1)[0]) * factor).backward()
        if factor:
            with pytest.raises(FloatingPointError, match="detected after"):
                optimizer.step()
        runs.append([p.detach().clone() for p in model.up.weight.fields().values()])
    assert_same_tensors(*runs)


def test_a_measured_norm_that_is_not_finite_is_refused_before_anything_is_updated():
    model = network()
    optimizer = make_optimizer(model, "release", clipping="exact", max_grad_norm=1.0)
    with (
        pytest.raises(FloatingPointError, match="nothing was updated"),
        optimizer.measure_norm(),
    ):
        (loss_of(model, batches(1)[0]) * float("nan")).backward()
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())


def test_a_nonfinite_gradient_that_was_kept_says_that_others_were_updated():
    model = network()
    optimizer = make_optimizer(model, "release")
    with optimizer.accumulate():
        loss_of(model, batches(1)[0]).backward()
    model.up.weight.grad.scales[0] = float("inf")
    model.up.requires_grad_(False)  # the last micro-batch has no gradient for it
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(FloatingPointError, match=r"after \d weights were updated"):
        optimizer.step()


def test_a_gradient_that_is_finite_in_some_rows_says_that_these_were_updated():
    model = network()
    optimizer = make_optimizer(model, "release")
    before = copy.deepcopy(model.state_dict())

    def spoil(gradient: Tensor) -> Tensor:  # of the inner activations: one row of `up.weight`
        gradient = gradient.clone()
        gradient[..., 7] = float("nan")
        return gradient

    model.up.register_forward_hook(lambda module, inputs, output: Identity.apply(output, spoil))
    loss_of(model, batches(1)[0]).backward(
        inputs=[p for p in model.parameters() if p is not model.embed.weight]
    )
    with pytest.raises(FloatingPointError, match=r"used the finite part.*Reload"):
        optimizer.step()

    assert optimizer.state[model.up.weight]["step"] == 1
    after = model.state_dict()["up.weight_q"]
    assert torch.equal(after[7], before["up.weight_q"][7])
    assert not torch.equal(after[8:], before["up.weight_q"][8:])


class Identity(torch.autograd.Function):
    """Returns its input and passes its gradient through a function."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_grad_norm": 1.0}, "'exact' .* 'previous' .* 'tensor'"),
        ({"clipping": "previous"}, "'exact' .* 'previous' .* 'tensor'"),
        ({"nonfinite": "skip"}, "Use nonfinite='raise', or gradient='stack'"),
        ({"clipping": "tensor", "max_grad_norm": -1.0}, "must be positive or None"),
        ({"clipping": "soft", "max_grad_norm": 1.0}, "clipping must be None or 'exact'"),
        ({"accumulation": "drop"}, "accumulation must be 'keep' or 'forbid'"),
    ],
)
def test_what_release_cannot_do_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(network(), "release", **arguments)


def test_measuring_would_drop_gradients_that_wait():
    model = network()
    optimizer = make_optimizer(model, "release", clipping="exact", max_grad_norm=1.0)
    with optimizer.accumulate():
        loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="run the last micro-batch without it"):
        optimizer.measure_norm()


def test_a_shared_layer_under_reentrant_checkpointing_says_what_to_do():
    """There each use is a separate backward pass, which completes a gradient of its own."""
    model = network()
    x = model.embed(batches(1)[0])
    for _ in range(2):
        x = x + checkpoint(model._mlp, x, use_reentrant=True)
    optimizer = make_optimizer(model, "release")
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        x.sum().backward()
    optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_shared_layer_is_updated_once(reentrant):
    states = []
    for gradient in ("stack", "release"):
        model = network()
        optimizer = make_optimizer(model, gradient)
        for ids in batches(2):
            x = model.embed(ids)
            for _ in range(2):
                x = x + (
                    model._mlp(x)
                    if reentrant is None
                    else checkpoint(model._mlp, x, use_reentrant=reentrant)
                )
            model.head(x).square().mean().backward()
            optimizer.step()
        states.append(everything(model, optimizer))
    assert_same_tensors(*states)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_that_are_frozen_or_not_used_in_some_batches(accumulation):
    """The last micro-batch of every second step has no gradient for the layers."""
    states = []
    for gradient in ("stack", "release"):
        model = network()
        model.norm.requires_grad_(False)
        optimizer = make_optimizer(model, gradient)
        for number, ids in enumerate(batches(6)):
            is_last = number % accumulation == accumulation - 1
            with nullcontext() if is_last else optimizer.accumulate():
                if number % (2 * accumulation) == accumulation - 1:
                    model.head(model.embed(ids)).square().mean().backward()
                else:
                    loss_of(model, ids).backward()
            if is_last:
                optimizer.step()
        states.append(everything(model, optimizer))
        assert model.norm.weight not in optimizer.state
    assert_same_tensors(*states)


def test_release_settings_are_refused_for_the_stack():
    with pytest.raises(ValueError, match=r"clip between backward and step by torch"):
        make_optimizer(network(), "stack", clipping="tensor", max_grad_norm=1.0)
    optimizer = make_optimizer(network(), "stack")
    with pytest.raises(RuntimeError, match="clip_grad_norm_ between backward and step"):
        optimizer.measure_norm()


def test_float_parameters_are_released_too():
    model, _ = train("release", steps=1)
    assert isinstance(model.up, QFTLinear)
    assert not isinstance(model.norm.weight, QFTWeight)
    assert not isinstance(model.norm.weight.grad, Int8Gradient | Tensor)
    assert not torch.equal(model.norm.weight, torch.ones(22))


@pytest.mark.parametrize("clipping", ["exact", "previous", "tensor"])
@pytest.mark.parametrize("attribute", ["max_grad_norm", "clipping"])
def test_clipping_that_changes_between_backward_and_step_is_refused(clipping, attribute):
    """Norms were once clipped by the new value, and the INT8 weights by the old one."""
    model = network()
    optimizer = QFTLion(model.parameters(), gradient="release", clipping=clipping, max_grad_norm=1)
    (ids,) = batches(1)
    if clipping == "exact":
        with optimizer.measure_norm():
            loss_of(model, ids).backward()
    loss_of(model, ids).backward()
    before = copy.deepcopy(model.state_dict())
    value = getattr(optimizer, attribute)
    others = {"max_grad_norm": 0.25, "clipping": "tensor" if value == "exact" else "exact"}
    other = others[attribute]
    setattr(optimizer, attribute, other)
    with pytest.raises(RuntimeError, match=rf"{attribute} was {value} .* is {other} now.*before"):
        optimizer.step()
    assert_same_tensors(model.state_dict(), before)

    setattr(optimizer, attribute, value)
    optimizer.step()


@pytest.mark.parametrize("norm", [0, -1.0, None, float("nan")])
def test_a_norm_to_clip_by_that_is_set_later_is_checked(norm):
    """With 0 all gradients once became 0, and with -1 the loss rose."""
    model = network()
    optimizer = QFTSGD(
        model.parameters(), 0.1, gradient="release", clipping="tensor", max_grad_norm=1
    )
    before = copy.deepcopy(model.state_dict())
    optimizer.max_grad_norm = norm
    with pytest.raises(ValueError, match=r"max_grad_norm must be positive|Set both"):
        loss_of(model, batches(1)[0]).backward()
    assert_same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_an_option_that_changes_between_backward_and_step_is_refused(name):
    """Norms once took the new rate, and the INT8 weights had taken the old one."""
    model = network()
    optimizer = QFTLion(model.parameters(), lr=1e-3, gradient="release")
    (ids,) = batches(1)
    loss_of(model, ids).backward()
    before = copy.deepcopy(model.state_dict())
    value = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = 0.01
    with pytest.raises(
        RuntimeError, match=rf"{name} of parameter group 0 was {value} .* 0\.01 now"
    ):
        optimizer.step()
    assert_same_tensors(model.state_dict(), before)

    optimizer.param_groups[0][name] = value
    optimizer.step()
    optimizer.param_groups[0][name] = 0.01  # between two steps it may change
    loss_of(model, ids).backward()
    optimizer.step()


def test_a_batch_that_is_given_up_after_backward_is_told(caplog):
    """A loop that skips a batch by zero_grad() once kept its updates without a word."""
    model = network()
    optimizer = QFTLion(model.parameters(), gradient="release")
    (ids,) = batches(1)
    optimizer.zero_grad()
    loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert caplog.text == ""

    loss_of(model, ids).backward()
    optimizer.zero_grad()
    n_weights = sum(isinstance(parameter, QFTWeight) for parameter in model.parameters())
    assert f"backward has updated {n_weights} weights of the step that is given up" in caplog.text


def test_a_norm_of_two_backward_passes_is_not_measured():
    """It was the root of the sum of their squares, not the norm of their sum."""
    model = network()
    optimizer = QFTLion(model.parameters(), gradient="release", clipping="exact", max_grad_norm=1.0)
    before = copy.deepcopy(model.state_dict())
    (ids,) = batches(1)
    with optimizer.measure_norm():
        loss_of(model, ids).backward()
        with pytest.raises(RuntimeError, match=r"second gradient .* under measure_norm.*'stack'"):
            loss_of(model, ids).backward()
    assert_same_tensors(model.state_dict(), before)

    for _ in range(2):
        with optimizer.measure_norm():
            loss_of(model, ids).backward()
        loss_of(model, ids).backward()
        optimizer.step()


def test_a_rate_in_memory_that_changes_between_backward_and_step_is_refused():
    """Schedulers write to a rate that is a tensor, so it is the same object afterwards."""
    model = network()
    optimizer = QFTLion(model.parameters(), lr=torch.tensor(1e-3), gradient="release")
    (ids,) = batches(1)
    for _ in range(2):
        loss_of(model, ids).backward()
        optimizer.step()
    loss_of(model, ids).backward()
    optimizer.param_groups[0]["lr"].fill_(0.5)
    with pytest.raises(RuntimeError, match=r"lr of parameter group 0 was 0\.001.* is 0\.5 now"):
        optimizer.step()


@pytest.mark.parametrize("optimizer_class", [QFTLion, QFTAdamW, QFTSGD])
def test_a_model_may_be_quantized_between_backward_and_step(optimizer_class):
    """It was a KeyError in the middle of the step. A conversion drops the gradients of weights."""
    states = []
    for mode in ("stack", "release"):
        torch.manual_seed(0)
        model = Network()
        optimizer = optimizer_class(model.parameters(), lr=1e-3, gradient=mode)
        for quantizes, ids in zip((True, False), batches(2), strict=True):
            loss_of(model, ids).backward()
            if quantizes:
                quantize_model_(model, QFTConfig())
            optimizer.step()
        states.append(model.state_dict())

    assert_same_tensors(*states)


@pytest.mark.parametrize("mode", ["stack", "release"])
def test_a_parameter_that_was_put_into_a_group_is_refused_before_anything_changes(mode):
    """It was a KeyError after all INT8 weights had been updated."""
    model = network()
    optimizer = QFTLion(model.parameters(), gradient=mode)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3)))
    before = copy.deepcopy(model.state_dict())
    loss = loss_of(model, batches(1)[0])
    if mode == "stack":
        loss.backward()
    first = optimizer.step if mode == "stack" else loss.backward
    with pytest.raises(ValueError, match=r"put into param_groups directly.*add_param_group"):
        first()
    assert_same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("mode", ["stack", "release"])
def test_a_model_that_was_cast_is_refused_before_anything_changes(mode):
    """Lightning Fabric casts after the optimizer is made; all INT8 weights were updated before."""
    model = network()
    optimizer = QFTLion(model.parameters(), gradient=mode)
    model.half()
    before = copy.deepcopy(model.state_dict())
    loss = loss_of(model, batches(1)[0])
    if mode == "stack":
        loss.backward()
    first = optimizer.step if mode == "stack" else loss.backward
    with pytest.raises(TypeError, match=r"got torch\.float16 .* dtype=torch\.bfloat16, and do not"):
        first()
    assert_same_tensors(model.state_dict(), before)


def test_skipped_steps_are_counted_on_after_a_checkpoint():
    model = network()
    optimizer = QFTLion(model.parameters(), nonfinite="skip")
    (loss_of(model, batches(1)[0]) * float("nan")).backward()
    optimizer.step()
    again = QFTLion(model.parameters(), nonfinite="skip")
    again.load_state_dict(optimizer.state_dict())
    assert (optimizer.skipped_steps, again.skipped_steps) == (1, 1)
    with pytest.raises(
        ValueError,
        match=r"whole number from 0, got 'one'.*earlier checkpoint",
    ):
        again.load_state_dict({**optimizer.state_dict(), "skipped_steps": "one"})
    assert again.skipped_steps == 1
    again.load_state_dict(QFTLion(model.parameters()).state_dict())
    assert again.skipped_steps == 0
