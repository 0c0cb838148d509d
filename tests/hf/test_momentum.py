"""4-bit momentum, and none, in the Trainers: optimizer name, resume, ledger and card."""

import pytest
from transformers import Trainer

from qft_hf import QFTTrainer
from tests.hf.test_trainer import assert_same_state, history, trainer_on
from tests.models import tiny_llama

RATES = {4: 1e-3, 0: 0.1}  # by bits of the momentum; 0: SGD


def run(folder, bits, cls=Trainer, resume=None, gradient="stack", **overrides) -> Trainer:
    settings = {
        "optim": "qft_lion" if bits else "qft_sgd",
        "optim_args": f"gradient={gradient}" + (f",momentum_bits={bits}" if bits else ""),
        "learning_rate": RATES[bits],
        "max_grad_norm": 0,
    }
    trainer = trainer_on(tiny_llama(tied=True), folder, cls, **settings | overrides)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("bits", [4, 0])
def test_resume_in_the_other_mode_equals_the_straight_run(tmp_path, bits):
    straight = run(tmp_path, bits, save_strategy="steps", save_steps=3)
    resumed = run(tmp_path, bits, resume=str(tmp_path / "checkpoint-3"), gradient="release")

    assert_same_state(straight.model.state_dict(), resumed.model.state_dict())
    assert history(straight, "loss")[-1] == history(resumed, "loss")[-1]


def test_a_checkpoint_of_other_bits_says_what_to_do(tmp_path):
    run(tmp_path, 4, save_strategy="steps", save_steps=3)

    with pytest.raises(
        ValueError, match=r"momentum_bits=4, and this optimizer has momentum_bits=8"
    ):
        run(tmp_path, 4, resume=str(tmp_path / "checkpoint-3"), optim_args="momentum_bits=8")


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    run(tmp_path, 4, save_strategy="steps", save_steps=3)

    with pytest.raises(ValueError, match="saved by another model, another optimizer"):
        run(tmp_path, 0, resume=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (4, "updated by Lion (arXiv:2302.06675) with momentum in 4 bits"),
        (0, "updated by SGD without state (LOMO, arXiv:2306.09782)"),
    ],
)
def test_ledger_and_card_tell_what_was_stored(tmp_path, bits, text):
    trainer = run(tmp_path, bits, QFTTrainer, gradient="release")
    trainer.create_model_card()

    rows = {row.state: row.bytes for row in trainer.ledger.rows}
    assert ("momentum" in rows) == (bits == 4)
    assert rows.get("momentum", 0) < 0.8 * rows["INT8 weights"]
    assert text in (tmp_path / "README.md").read_text()


def test_betas_without_momentum_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optim_args has 'beta2=0\.98'; qft_sgd takes"):
        run(tmp_path, 0, optim_args="beta2=0.98")


def test_clipping_by_the_global_norm_shortens_the_steps_of_sgd(tmp_path):
    moved = []
    for max_grad_norm in (1e-3, 0):
        trainer = run(tmp_path, 0, max_grad_norm=max_grad_norm, max_steps=2)
        norm = trainer.model.model.norm.weight.detach().double()
        moved.append((norm - 1).abs().sum().item())
        assert min(history(trainer, "grad_norm")) > 1e-3
    assert moved[0] < 0.1 * moved[1]
