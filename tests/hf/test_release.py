"""Gradient release in the Trainers: the bits of the stack, correct norms, and errors."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers import trainer as trainer_module

from qft_hf import QFTConfig, QFTLion, QFTTrainer, quantize_model_
from qft_hf.hf import is_accumulating
from tests.hf.test_trainer import assert_same_state, history, sequences, trainer_on
from tests.models import tiny_llama

RELEASE = "gradient=release"
CHECKPOINTING = {
    "off": {},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "nonreentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


def run(folder, cls=Trainer, *, resume=None, tied=True, callbacks=None, **overrides) -> Trainer:
    model = tiny_llama(tied=tied)
    trainer = trainer_on(model, folder, cls, callbacks, **{"max_grad_norm": 0} | overrides)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_run(one: Trainer, other: Trainer) -> None:
    """Assert equal bits of weights, optimizer state and logs; norms are summed in another order."""
    assert_same_state(one.model.state_dict(), other.model.state_dict())
    states = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert_same_state(
            {name: torch.as_tensor(value) for name, value in state.items()},
            {name: torch.as_tensor(value) for name, value in states[1][index].items()},
        )
    for key in ("loss", "learning_rate", "eval_loss"):
        assert history(one, key) == history(other, key)
    assert history(other, "grad_norm") == pytest.approx(history(one, "grad_norm"), rel=1e-6)


# The rate differs at each step, and released weights need that of the current step.
SCHEDULE = {"max_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 2}


# Half of all combinations: every pair of two settings occurs.
@pytest.mark.parametrize(
    ("accumulation", "tied", "checkpointing"),
    [
        (accumulation, (number + place) % 2 == 0, checkpointing)
        for number, accumulation in enumerate((1, 2, 4))
        for place, checkpointing in enumerate(CHECKPOINTING)
    ],
)
def test_release_equals_stack_bit_for_bit(accumulation, tied, checkpointing, tmp_path, caplog):
    settings = {"tied": tied, "gradient_accumulation_steps": accumulation}
    settings |= SCHEDULE | CHECKPOINTING[checkpointing]
    assert_same_run(run(tmp_path, **settings), run(tmp_path, **settings, optim_args=RELEASE))
    assert "waited for the step" not in caplog.text  # a lost hook changes memory, not results


@pytest.mark.parametrize(("accumulation", "checkpointing"), [(1, "reentrant"), (2, "off")])
def test_a_resumed_run_in_either_mode_equals_the_straight_one(
    accumulation, checkpointing, tmp_path, caplog
):
    settings = {"save_strategy": "steps", "save_steps": 2}
    settings |= {"gradient_accumulation_steps": accumulation}
    settings |= SCHEDULE | CHECKPOINTING[checkpointing]
    straight = run(tmp_path / "stack", **settings)
    run(tmp_path / "release", **settings, optim_args=RELEASE)
    for saved_by, optim_args in (("stack", RELEASE), ("release", RELEASE), ("release", None)):
        resume = str(tmp_path / saved_by / "checkpoint-2")
        resumed = run(tmp_path / "other", resume=resume, **settings, optim_args=optim_args)
        assert_same_run(straight, resumed)
    assert "waited for the step" not in caplog.text  # hooks survive saving and loading


@pytest.mark.parametrize("accumulation", [1, 3])
def test_both_trainers_release_evaluate_stop_early_and_load_the_best(accumulation, tmp_path):
    runs = []
    for cls, optim_args in ((Trainer, None), (Trainer, RELEASE), (QFTTrainer, RELEASE)):
        trainer = run(
            tmp_path / f"{cls.__name__}-{optim_args}", cls, optim_args=optim_args,
            max_steps=12, learning_rate=0.05,  # too high: the loss rises
            gradient_accumulation_steps=accumulation,
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        )  # fmt: skip
        losses = history(trainer, "eval_loss")
        assert 2 < len(losses) < 12
        assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
        runs.append(trainer)
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])


def test_a_frozen_part_stays(tmp_path):
    trainers = []
    for optim_args in (None, RELEASE):
        model = tiny_llama()
        model.model.layers[0].requires_grad_(False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = trainer_on(model, tmp_path, max_grad_norm=0, optim_args=optim_args)
        trainer.train()
        for name, value in before.items():
            if name.startswith("model.layers.0.") and "norm" in name:
                assert torch.equal(model.state_dict()[name], value)
        trainers.append(trainer)
    assert_same_run(*trainers)


def test_accumulation_is_announced(tmp_path, caplog):
    for accumulation in (1, 2):
        run(tmp_path, max_steps=1, gradient_accumulation_steps=accumulation, optim_args=RELEASE)
        assert ("kept until the last one" in caplog.text) == (accumulation > 1)


def test_forbidden_accumulation_raises_before_the_first_batch(tmp_path):
    with pytest.raises(ValueError, match="Set gradient_accumulation_steps=1, or accumulation='k"):
        run(
            tmp_path, gradient_accumulation_steps=2,
            optim_args="gradient=release,accumulation=forbid",
        )  # fmt: skip
    run(tmp_path, max_steps=1, optim_args="gradient=release,accumulation=forbid")


# --- hooks ----------------------------------------------------------------------------------


def test_two_trainers_on_one_model_do_not_meet(tmp_path):
    """As in a notebook, the first trainer still exists when the second one trains."""
    models = [tiny_llama(), tiny_llama()]
    kept = []
    for model, modes in zip(models, ((None, None), (RELEASE, RELEASE)), strict=True):
        for mode in modes:
            trainer = trainer_on(model, tmp_path, max_grad_norm=0, optim_args=mode)
            trainer.train()
            kept.append(trainer)
    assert_same_run(kept[1], kept[3])


def test_after_training_a_backward_pass_updates_nothing(tmp_path):
    trainer = run(tmp_path, optim_args=RELEASE)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    ids = torch.arange(6)[None]
    trainer.model(input_ids=ids, labels=ids).loss.backward()
    assert_same_state(before, trainer.model.state_dict())
    assert trainer.model.lm_head.weight.grad is not None


class AtTheEnd(TrainerCallback):
    """Run a backward pass on the trained model at the end of training."""

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self.before = {name: value.clone() for name, value in model.state_dict().items()}
        ids = torch.arange(6)[None]
        model(input_ids=ids, labels=ids).loss.backward()


def test_a_backward_pass_of_a_callback_at_the_end_of_training_updates_nothing(tmp_path):
    looks = AtTheEnd()
    trainer = run(tmp_path, optim_args=RELEASE, callbacks=[looks])
    assert_same_state(looks.before, trainer.model.state_dict())
    assert trainer.model.lm_head.weight.grad is not None


class Interrupted(TrainerCallback):
    """Interrupt the backward pass of one step after half of the layers are updated."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == self.at_step:
            self.at_step = -1
            model.model.layers[0].register_forward_hook(self._break)

    def _break(self, module, inputs, output) -> None:
        output.register_hook(self._raise)

    def _raise(self, gradient) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_interrupted_backward_pass_is_refused_until_a_checkpoint_is_loaded(
    accumulation, tmp_path, caplog
):
    settings = {
        "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0,
        "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    straight = run(tmp_path / "straight", **settings)
    assert "between two steps" not in caplog.text

    trainer = trainer_on(
        tiny_llama(tied=True), tmp_path / "broken", callbacks=[Interrupted(at_step=3)],
        optim_args=RELEASE, **settings,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # The first of two micro-batches updates nothing.
    assert ("the model is between two steps" in caplog.text) == (accumulation == 1)
    trainer.model.model.layers[0]._forward_hooks.clear()
    if accumulation == 1:
        with pytest.raises(RuntimeError, match="between two steps: reload a checkpoint"):
            trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert_same_run(straight, trainer)


def test_a_loop_with_accelerate_accumulates(tmp_path):
    states = []
    for gradient in ("stack", "release"):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = quantize_model_(tiny_llama(tied=True), QFTConfig()).train()
        optimizer = QFTLion(
            model.parameters(), lr=1e-3, gradient=gradient, is_accumulating=is_accumulating
        )
        model, optimizer = accelerator.prepare(model, optimizer)
        for batch in sequences(6):
            with accelerator.accumulate(model):
                ids = batch["input_ids"][None]
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                if accelerator.sync_gradients and gradient == "release":
                    assert all(p.grad is None for p in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
        states.append(model.state_dict())
    assert_same_state(*states)


def test_a_loop_with_accelerate_that_does_not_say_when_it_accumulates_is_told_how():
    """It was told to call `accumulate`, which an optimizer prepared by Accelerate does not have."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = quantize_model_(tiny_llama(), QFTConfig()).train()
    optimizer = QFTLion(model.parameters(), gradient="release")
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = sequences(1)[0]["input_ids"][None]
    for error in (None, r"second gradient .* is_accumulating=qft_hf\.hf\.is_accumulating\."):
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            with nullcontext() if error is None else pytest.raises(RuntimeError, match=error):
                accelerator.backward(loss)
            optimizer.step()


# --- norms ----------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Record the norms that a reporter such as TensorBoard's receives."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.norms += [logs["grad_norm"]] if "grad_norm" in logs else []


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_every_reporter_gets_the_true_norm(cls, tmp_path, monkeypatch):
    expected = history(run(tmp_path), "grad_norm")
    by_name = Reporter()
    monkeypatch.setattr(trainer_module, "get_reporting_integration_callbacks", lambda _: [by_name])
    at_init, added = Reporter(), Reporter()
    trainer = trainer_on(
        tiny_llama(tied=True), tmp_path, cls, [at_init], max_grad_norm=0, optim_args=RELEASE,
    )  # fmt: skip
    trainer.add_callback(added)
    trainer.train()
    for norms in (history(trainer, "grad_norm"), by_name.norms, at_init.norms, added.norms):
        assert norms == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("clipping", ["exact", "previous", "tensor"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_logged_norm_is_that_of_all_gradients_before_clipping(accumulation, clipping, tmp_path):
    """An epoch has eight or seven micro-batches, so the last window of three has two or one.

    The norm is too large to clip, so every kind of clipping must equal the unclipped run.
    """
    for examples in (32, 28):
        trainers = []
        for optim_args in (None, f"gradient=release,clipping={clipping}"):
            trainer = trainer_on(
                tiny_llama(tied=True), tmp_path, QFTTrainer, max_steps=5, max_grad_norm=1e6,
                gradient_accumulation_steps=accumulation, optim_args=optim_args,
            )  # fmt: skip
            trainer.train_dataset = sequences(examples)
            trainer.train()
            trainers.append(trainer)
        assert_same_run(*trainers)


@pytest.mark.parametrize(("cls", "examples"), [(Trainer, 28), (QFTTrainer, 28), (QFTTrainer, 4)])
def test_exact_clipping_of_a_last_window_of_one_micro_batch(cls, examples, tmp_path):
    """Seven micro-batches are windows of three, three and one; 4 examples are one micro-batch."""
    trainers = []
    for optim_args in (None, "gradient=release,clipping=exact"):
        trainer = trainer_on(
            tiny_llama(tied=True), tmp_path, cls, max_steps=5, max_grad_norm=0.5,
            gradient_accumulation_steps=3, optim_args=optim_args,
        )  # fmt: skip
        trainer.train_dataset = sequences(examples)
        trainer.train()
        trainers.append(trainer)
    norms, released = (history(trainer, "grad_norm") for trainer in trainers)
    assert min(norms) > 0.5
    assert released == pytest.approx(norms, rel=1e-3)


class Freeze(TrainerCallback):
    """Leave a layer without a gradient in the last micro-batch of each step."""

    def on_substep_end(self, args, state, control, model=None, **kwargs) -> None:
        model.model.layers[1].requires_grad_(False)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        model.model.layers[1].requires_grad_(True)


def test_gradients_that_were_kept_and_not_released_count_in_the_norm(tmp_path):
    stack, release = (
        run(tmp_path, optim_args=optim_args, gradient_accumulation_steps=2, callbacks=[Freeze()])
        for optim_args in (None, RELEASE)
    )
    assert_same_run(stack, release)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_exact_clipping_logs_and_learns_what_the_stack_does(accumulation, tmp_path):
    settings = {"max_grad_norm": 0.5, "gradient_accumulation_steps": accumulation}
    stack = run(tmp_path, QFTTrainer, **settings)
    release = run(tmp_path, QFTTrainer, **settings, optim_args="gradient=release,clipping=exact")
    assert min(history(stack, "grad_norm")) > 0.5
    assert history(release, "grad_norm") == pytest.approx(history(stack, "grad_norm"), rel=1e-3)
    assert history(release, "loss") == pytest.approx(history(stack, "loss"), rel=1e-3)


def test_the_ledger_has_no_gradients_unless_they_are_accumulated(tmp_path):
    states = {
        accumulation: {
            row.state: row.bytes
            for row in run(
                tmp_path, QFTTrainer, optim_args=RELEASE,
                gradient_accumulation_steps=accumulation,
            ).ledger.rows
        }
        for accumulation in (1, 2)
    }  # fmt: skip
    assert "gradients" not in states[1]
    assert states[2]["gradients"] > states[2]["INT8 weights"]


def test_a_norm_that_cannot_be_honoured_names_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"clipping='exact' .* 'previous' .* or 'tensor'"):
        run(tmp_path, max_grad_norm=1.0, optim_args="gradient=release")


def test_exact_clipping_in_the_stock_trainer_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match="as QFTTrainer does, or set clipping='previous'"):
        run(tmp_path, max_grad_norm=1.0, optim_args="gradient=release,clipping=exact")


class Masked(nn.Module):
    """Masks by NumPy's and Python's random numbers, as SpecAugment does, and has a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(131, 24)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 131)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        if self.training:
            x = x * torch.from_numpy(np.random.rand(*x.shape) > 0.3) * random.choice([1.0, 5.0])
        logits = self.head(self.norm(x.mT).mT)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_exact_clipping_leaves_no_trace_of_its_first_pass(tmp_path):
    """The first pass once used other masks and counted each batch twice in the statistics."""
    runs = []
    for optim_args in (None, "gradient=release,clipping=exact"):
        trainer = trainer_on(
            Masked(), tmp_path, QFTTrainer, max_grad_norm=0.3, optim_args=optim_args
        )
        trainer.train()
        runs.append(trainer)
    assert_same_run(*runs)
    assert runs[1].model.norm.num_batches_tracked == 6
    norms = history(runs[0], "grad_norm")
    assert min(norms) > 0.3  # all are clipped


def test_dropout_is_the_same_in_both_passes_of_exact_clipping(tmp_path):
    """Without the same random state the two passes would have different norms."""
    norms = []
    for optim_args in (None, "gradient=release,clipping=exact"):
        model = tiny_llama(attention_dropout=0.5)
        trainer = trainer_on(
            model, tmp_path, QFTTrainer, max_steps=1, max_grad_norm=1e-3, optim_args=optim_args
        )
        torch.manual_seed(9)
        trainer.train()
        norms.append(history(trainer, "grad_norm")[0])
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


class SetNorm(TrainerCallback):
    """Sets a norm to clip by before step 3."""

    def __init__(self, holder) -> None:
        self.holder = holder

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        if state.global_step == 2:
            holder = args if self.holder == "arguments" else optimizer.optimizer
            holder.max_grad_norm = 0.05


def test_a_norm_that_changes_counts_or_is_refused(tmp_path):
    """That of the arguments, by which stack clips at each step, once had no effect."""
    callback = SetNorm("arguments")
    for clipping in ("exact", "previous"):
        release = {"optim_args": f"gradient=release,clipping={clipping}", "max_grad_norm": 0.5}
        with pytest.raises(ValueError, match=r"was 0\.5 at the start .* is 0\.05 now.*optimizer\."):
            run(tmp_path, QFTTrainer, callbacks=[callback], **release)

    sgd = {"optim": "qft_sgd", "learning_rate": 0.1, "max_grad_norm": 0.5}
    stack = run(tmp_path, QFTTrainer, callbacks=[callback], **sgd)
    plain = run(tmp_path, QFTTrainer, **sgd)
    modes = {**sgd, "optim_args": "gradient=release,clipping=exact"}
    release = run(tmp_path, QFTTrainer, callbacks=[SetNorm("optimizer")], **modes)
    assert history(release, "loss") == pytest.approx(history(stack, "loss"), rel=1e-3)
    assert history(release, "loss") != pytest.approx(history(plain, "loss"), rel=1e-3)
