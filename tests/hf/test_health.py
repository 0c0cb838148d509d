"""The logged `qft/` figures agree with copies of a model so small that samples hold all of it."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from qft_hf import QFTConfig, QFTLion, QFTTrainer, QFTWeight, quantize_model_
from qft_hf.hf.health import SAMPLED, SMALLEST_STEP, Health, sample, trained_tensors
from qft_hf.kernels.groups import TINY
from tests.hf.test_trainer import arguments, history, sequences, trainer_on
from tests.models import tiny_llama

OURS = (
    "codes_moved",
    "codes_saturated",
    "parameters_changed",
    "tensors_unchanged",
    "scale_growth",
    "outlier_drift",
    "updates_too_small",
)


def codes(model):
    weights = [p for p in model.parameters() if isinstance(p, QFTWeight)]
    return torch.cat([w.codes.flatten() for w in weights]).int()


class Copies(TrainerCallback):
    """Keep the codes before and after each step."""

    def __init__(self):
        self.before, self.after = {}, {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before[state.global_step + 1] = codes(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = codes(model)


def trained(tmp_path, **overrides):
    """Train a model whose tensors are all smaller than a sample for six steps."""
    model = tiny_llama()
    assert max(p.numel() for p in model.parameters()) > SAMPLED  # the table is too large
    model = tiny_llama(vocab_size=90)
    assert max(p.numel() for p in model.parameters()) <= SAMPLED
    data = [{k: v % 90 for k, v in row.items()} for row in sequences()]
    args = arguments(tmp_path, **{"learning_rate": 2e-3, "logging_steps": 2, **overrides})
    copies = Copies()
    trainer = QFTTrainer(model=model, args=args, train_dataset=data, callbacks=[copies])
    first = sample(*trained_tensors(trainer.model))
    trainer.train()
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    return trainer, logs, copies, first


@pytest.fixture(scope="module", params=["stack", "release"])
def run(request, tmp_path_factory):
    options = f"gradient={request.param}"
    return trained(tmp_path_factory.mktemp("out"), optim_args=options, max_grad_norm=0)


def test_shares_are_those_of_whole_copies(run):
    _, logs, copies, _ = run
    assert list(logs) == [2, 4, 6]
    moves = {}
    for step, entry in logs.items():
        before, after = copies.before[step], copies.after[step]
        moves[step] = torch.sign(after - before)
        assert entry["qft/codes_moved"] == pytest.approx((moves[step] != 0).float().mean())
        assert entry["qft/codes_saturated"] == pytest.approx((after.abs() == 127).float().mean())
        assert 0 < entry["qft/codes_moved"] < 1
    assert "qft/sign_flips" not in logs[2]
    for step in (4, 6):
        both = (moves[step] != 0) & (moves[step - 2] != 0)
        flipped = both & (moves[step] != moves[step - 2])
        assert logs[step]["qft/sign_flips"] == pytest.approx(flipped.sum() / both.sum())
        assert 0 < logs[step]["qft/sign_flips"] < 1


def test_change_since_the_start_is_that_of_all_parameters(run):
    trainer, logs, copies, first = run
    now = sample(*trained_tensors(trainer.model))
    changed = (copies.after[6] != copies.before[1]).sum()
    changed += (now.outliers != first.outliers).sum() + (now.floats != first.floats).sum()
    n_parameters = sum(p.numel() for p in trainer.model.parameters())
    assert logs[6]["qft/parameters_changed"] == pytest.approx(changed / n_parameters)
    assert logs[2]["qft/parameters_changed"] < logs[6]["qft/parameters_changed"]
    assert logs[6]["qft/tensors_unchanged"] == 0
    began = first.scales > TINY
    growth = (now.scales.double() / first.scales.double())[began].mean()
    assert logs[6]["qft/scale_growth"] == pytest.approx(growth.item(), rel=1e-6)
    drift = (now.outliers - first.outliers).double().norm() / first.outliers.double().norm()
    assert logs[6]["qft/outlier_drift"] == pytest.approx(drift.item(), rel=1e-5)
    assert logs[6]["qft/outlier_drift"] > 0


def test_bytes_by_state_are_those_of_the_ledger(run):
    trainer, logs, _, _ = run
    rows = {row.state: row.bytes for row in trainer.ledger.rows}
    found = {name: logs[6][f"qft/{name}_gb"] * 1e9 for name in ("weights", "gradients", "momentum")}
    assert found["momentum"] == pytest.approx(rows["momentum"])
    assert found["gradients"] == pytest.approx(rows.get("gradients", 0))
    assert sum(found.values()) == pytest.approx(trainer.ledger.total_bytes)
    assert logs[6]["qft/peak_memory_gb"] > 0.01  # this process, with torch


def test_tensors_that_are_not_trained_are_counted(tmp_path):
    """One case is a parameter whose gradient a user's callback removes."""

    class Zero(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.grad = None
                layer.input_layernorm.weight.grad = None

    model = tiny_llama()
    trainer = QFTTrainer(
        model=model,
        args=arguments(tmp_path, learning_rate=2e-3, logging_steps=3, max_steps=3),
        train_dataset=sequences(),
        callbacks=[Zero()],
    )
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["qft/tensors_unchanged"] == 4


def test_layers_may_be_frozen_and_released_on_the_way(tmp_path):
    """Steps then sample different tensors, which once made the run fail."""

    class Freezing(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.requires_grad_(state.global_step % 2 == 0)

    trainer = trainer_on(tiny_llama(), tmp_path, QFTTrainer, callbacks=[Freezing()])
    trainer.train()

    unchanged = history(trainer, "qft/tensors_unchanged")
    assert len(unchanged) == 6
    assert unchanged[-1] == 0
    moved = trainer.health.sample_changes()["changed"]
    assert moved["lm_head.weight"] > 0.5  # by the steps in which it was trained


@pytest.mark.parametrize(("rate", "expected"), [(1e-2, 0.0), (1e-12, 1.0)])
def test_a_rate_that_moves_no_code_is_seen(rate, expected, tmp_path):
    _, logs, _, _ = trained(tmp_path, learning_rate=rate, lr_scheduler_type="constant")
    assert logs[6]["qft/updates_too_small"] == pytest.approx(expected, abs=0.01)  # a row of zeros
    assert (logs[6]["qft/codes_moved"] == 0) == bool(expected)
    assert (logs[6]["qft/tensors_unchanged"] > 0) == bool(expected)


def test_the_rate_is_that_of_the_step_and_not_of_the_next_one(tmp_path):
    """The log once used the next step's rate, which is zero at the end of a schedule."""
    _, logs, _, _ = trained(tmp_path, learning_rate=1e-2, lr_scheduler_type="linear")
    assert logs[6]["learning_rate"] > 0
    assert logs[6]["qft/updates_too_small"] == 0


def test_the_journey_of_the_codes_is_that_of_the_first_and_the_last_ones(run):
    trainer, _, copies, _ = run
    found = trainer.health.sample_changes()
    first, last = copies.before[1], copies.after[6]
    for when, values in (("before", first), ("after", last)):
        assert found[f"codes_{when}"] == [(values == code).sum() for code in range(-127, 128)]
    weights = {n: p for n, p in trainer.model.named_parameters() if isinstance(p, QFTWeight)}
    shares = (first != last).split([p.numel() for p in weights.values()])
    assert found["changed"] == pytest.approx(
        {name: part.float().mean().item() for name, part in zip(weights, shares, strict=True)}
    )


def test_figures_of_a_resumed_run_are_those_of_the_straight_one(tmp_path):
    """They once referred to the values at the resume, though they say: since the start."""
    straight, logs, *_ = trained(tmp_path / "straight", save_strategy="steps", save_steps=4)

    model = tiny_llama(vocab_size=90)
    data = [{k: v % 90 for k, v in row.items()} for row in sequences()]
    args = arguments(tmp_path / "resumed", learning_rate=2e-3, logging_steps=2)
    resumed = QFTTrainer(model=model, args=args, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))

    assert resumed.health.sample_changes() == straight.health.sample_changes()
    found = {entry["step"]: entry for entry in resumed.state.log_history if "loss" in entry}
    assert found[6].keys() == logs[6].keys() >= {"qft/sign_flips", "qft/outlier_drift"}
    for name in found[6].keys() - {"qft/peak_memory_gb"}:
        assert found[6][name] == logs[6][name], name

    resumed.health.load(tmp_path / "straight" / "checkpoint-4" / "qft_sample.pt")  # then it failed
    resumed.train()  # not resumed: the sample is that of the weights of now
    journeys = [trainer.health.sample_changes() for trainer in (straight, resumed)]
    assert journeys[1]["codes_before"] == journeys[0]["codes_after"]


@pytest.mark.parametrize("factor", [0.99, 256.0])
def test_the_step_where_rounding_ends_is_that_of_the_rounding(factor):
    """Just below that step size Lion changes no code of a group; above it Lion changes some.

    The layer is so large that one code in 2**16 shows: a small model did not show that rounding has
    24 bits, and not 16.
    """
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(2048, 2048, bias=False)
    nn.init.normal_(model.weight, generator=generator)
    weight = quantize_model_(model, QFTConfig()).weight
    codes_before, scales_before = weight.codes.clone(), weight.scales.clone()
    optimizer = QFTLion([weight], lr=factor * scales_before.min().item() * SMALLEST_STEP)
    model(torch.randn(4, 2048, generator=generator)).square().sum().backward()
    optimizer.step()

    # When a scale grows, all codes of its row are rounded again.
    kept = (weight.scales == scales_before).squeeze(1)
    assert kept.sum() > 500
    moved = (weight.codes != codes_before)[kept].sum().item()
    assert (moved == 0) == (factor < 1)


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
def test_only_steps_that_are_logged_are_sampled(strategy, tmp_path, monkeypatch):
    sampled = []
    original = Health.on_step_begin

    def count(health, args, state, control, **kwargs):
        original(health, args, state, control, **kwargs)
        if health._before is not None:
            sampled.append(state.global_step + 1)

    monkeypatch.setattr(Health, "on_step_begin", count)
    flags = {"logging_strategy": strategy, "logging_steps": 3, "max_steps": -1}
    args = arguments(tmp_path, num_train_epochs=2, **flags)
    trainer = QFTTrainer(model=tiny_llama(), args=args, train_dataset=sequences())
    trainer.train()
    logged = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert sampled == logged
    assert all("qft/codes_moved" in e for e in trainer.state.log_history if "loss" in e)
    assert len(logged) == {"steps": trainer.state.max_steps // 3, "epoch": 2, "no": 0}[strategy]


def test_a_model_of_many_weights_is_sampled_in_few_operations(tmp_path):
    """Sampling takes two operations per kind of tensor, for any number; each is a GPU launch."""
    model = quantize_model_(tiny_llama(num_hidden_layers=12), QFTConfig())
    weights, floats = trained_tensors(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sample(weights, floats)
    found = {event.key: event.count for event in profile.key_averages()}
    copies = found.get("aten::copy_", 0) + found.get("aten::clone", 0)
    assert found["aten::cat"] == 4
    assert copies == 0


def test_what_begins_at_zero_does_not_count_as_growth(tmp_path):
    """The zero embedding of a padding token moves with a tied head; its scale once grew by 1e22."""
    model = tiny_llama(tied=True)
    args = arguments(tmp_path, learning_rate=2e-3, logging_steps=2)
    trainer = QFTTrainer(model=model, args=args, train_dataset=sequences())
    first = sample(*trained_tensors(trainer.model))
    trainer.train()
    assert (first.scales <= TINY).any()
    assert (sample(*trained_tensors(trainer.model)).scales > TINY).all()
    for entry in trainer.state.log_history:
        assert 0.5 < entry.get("qft/scale_growth", 1) < 2
