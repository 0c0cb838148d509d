"""Trainers of Sentence Transformers, whose models contain transformers models."""

from pathlib import Path

import pytest
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertModel, TrainerCallback

from qft_hf import QFTTrainer
from qft_hf.quant import QFTWeight
from tests.finetune.chats import tiny_tokenizer
from tests.hf.checkpoints import assert_same_state
from tests.models import tiny_bert

STEPS = 30
TEXTS = [f"the answer to question {n}" for n in range(16)]
PAIRS = {"question": TEXTS, "answer": [text[::-1] for text in TEXTS]}
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
TOO_LONG = {**SAVES, **BEST, "learning_rate": 0.1}  # steps: the first checkpoint is the best
TRAINED = {
    "embedding": (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        MultipleNegativesRankingLoss,
        PAIRS,
    ),
    "pair": (
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        BinaryCrossEntropyLoss,
        {"question": TEXTS, "answer": ["I am fine", "a lazy dog"] * 8, "label": [0.0, 1.0] * 8},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = tiny_tokenizer()
    bert = tiny_bert(num_labels=1, vocab_size=len(tokenizer), hidden_dropout_prob=0.0)
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trainer_of(kind, folder, output_dir, cls=None, **changes):
    trainer, arguments, loss, data = TRAINED[kind]
    if kind == "pair":
        model = CrossEncoder(str(folder), device="cpu", num_labels=1)
    else:
        bert = Transformer(str(folder), max_seq_length=32)
        model = SentenceTransformer(
            modules=[bert, Pooling(bert.get_embedding_dimension())], device="cpu"
        )
    args = arguments(
        **{
            "output_dir": output_dir,
            "optim": "qft_lion",
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            **changes,
        }
    )
    rows = Dataset.from_dict(data)
    return (cls or trainer)(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, loss=loss(model)
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", TRAINED)
def test_a_model_of_sentence_transformers_trains_in_int8(kind, folder, tmp_path):
    trainer = trainer_of(kind, folder, tmp_path)
    beside = losses(trainer_of(kind, folder, tmp_path, optim="sgd", learning_rate=0.0))

    int8 = losses(trainer)

    assert {type(p) for p in trainer.model.parameters() if p.ndim > 1} == {QFTWeight}
    assert int8[0] == pytest.approx(beside[0], rel=0.02)  # the effect of rounding the weights
    assert int8[-1] < 0.5 * beside[-1]
    trainer.save_model(tmp_path / "saved")
    again = type(trainer.model)(str(tmp_path / "saved"), device="cpu")
    assert_same_state(again.state_dict(), trainer.model.state_dict())


class Mixed(QFTTrainer, SentenceTransformerTrainer):
    """Combines whole checkpoints with Sentence Transformers' saving of modules by their names."""


def test_a_mixed_trainer_resumes_exactly_and_ends_with_the_best_model(folder, tmp_path):
    whole = trainer_of("embedding", folder, tmp_path / "whole", Mixed, **SAVES)
    whole.train()
    resumed = trainer_of("embedding", folder, tmp_path / "resumed", Mixed, max_steps=6)

    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))

    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())
    last = trainer_of("embedding", folder, tmp_path / "best", Mixed, **TOO_LONG)
    last.train()
    assert last.state.best_model_checkpoint == str(tmp_path / "best" / "checkpoint-2")
    bert = BertModel.from_pretrained(tmp_path / "best" / "checkpoint-2")
    assert_same_state(last.model[0].model.state_dict(), bert.state_dict())


class Damages(TrainerCallback):
    """Flip a bit of the best checkpoint when the last one is written."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            weights = Path(state.best_model_checkpoint) / "model.safetensors"
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)


def test_a_mixed_trainer_does_not_go_on_without_the_best_model(folder, tmp_path):
    """Sentence Transformers alone would log an error and keep the last weights."""
    trainer = trainer_of("embedding", folder, tmp_path, Mixed, **TOO_LONG)
    trainer.add_callback(Damages())

    with pytest.raises(ValueError, match=r"No weights can be loaded from .*checkpoint-2"):
        trainer.train()
