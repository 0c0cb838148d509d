"""Gradient release through the Trainers: the bits of the stack, true norms, and what raises."""

import pytest
import torch
from transformers import Trainer

from qft_hf import QFTTrainer
from tests.hf.test_trainer import assert_same_state, history, trainer_on
from tests.models import tiny_llama


def run(folder, cls=Trainer, resume=None, **overrides) -> Trainer:
    trainer = trainer_on(tiny_llama(tied=True), folder, cls, **{"max_grad_norm": 0} | overrides)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_release_equals_stack_and_logs_the_true_norm(accumulation, cls, tmp_path, caplog):
    settings = {"gradient_accumulation_steps": accumulation, "gradient_checkpointing": True}
    stack = run(tmp_path, cls, **settings)
    release = run(tmp_path, cls, **settings, optim_args="gradient=release")

    assert_same_state(stack.model.state_dict(), release.model.state_dict())
    assert history(stack, "loss") == history(release, "loss")
    assert history(release, "grad_norm") == pytest.approx(history(stack, "grad_norm"), rel=1e-6)
    assert ("kept until the last one" in caplog.text) == (accumulation > 1)


def test_resume_in_the_other_mode_equals_the_straight_run(tmp_path):
    straight = run(tmp_path, save_strategy="steps", save_steps=3)
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-3"), optim_args="gradient=release")
    assert_same_state(straight.model.state_dict(), resumed.model.state_dict())


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
                tmp_path, QFTTrainer, optim_args="gradient=release",
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
