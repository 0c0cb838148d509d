"""Runs on images and sound: other trainers and collators, and speech models."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, default_data_collator

from qft_hf import QFTTrainer, QFTTrainingArguments
from tests.hf.checkpoints import assert_same_state
from tests.scripts.commands import load

TINY = load("families").TINY
N_ROWS = 8


class Rows(Dataset):
    """Repeats the batch of a family."""

    def __init__(self, name: str) -> None:
        self.batch = TINY[name].batch()

    def __len__(self) -> int:
        return N_ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        halves = {name: value.chunk(2)[index % 2] for name, value in self.batch.items()}
        return {name: half.squeeze(0) for name, half in halves.items()}


def settings(folder, **overrides):
    return {
        "output_dir": str(folder), "optim": "qft_lion", "learning_rate": 1e-3, "max_steps": 6,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "save_steps": 3,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "lr_scheduler_type": "constant", "remove_unused_columns": False,
    } | overrides  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@dataclass
class SpeechArguments(QFTTrainingArguments, Seq2SeqTrainingArguments):
    """The options of both classes."""


class SpeechTrainer(QFTTrainer, Seq2SeqTrainer):
    """Trains in INT8 and is scored by generated tokens."""


def spoken(prediction):
    """Score a prediction, which has tokens rather than logits."""
    tokens, labels = prediction
    assert tokens.dtype == np.int64
    assert len(tokens) == len(labels) == N_ROWS
    return {"agreement": float((tokens[:, :3] == labels[:, :3]).mean())}


def whisper(folder, resume=None, **overrides):
    trainer = SpeechTrainer(
        model=TINY["Whisper"].model(),
        args=SpeechArguments(**settings(folder, **overrides)),
        train_dataset=Rows("Whisper"),
        eval_dataset=Rows("Whisper"),
        data_collator=default_data_collator,
        compute_metrics=spoken,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient": "release", "clipping": "exact", "gradient_checkpointing": True},
        {"matmul": "int8", "bf16": True},
    ],
    ids=str,
)
def test_speech_is_learned_and_goes_on_as_if_never_interrupted(options, tmp_path):
    whole = whisper(tmp_path / "whole", **options)
    half = whisper(tmp_path / "half", **options, resume=tmp_path / "whole/checkpoint-3")

    assert losses(whole)[-1] < losses(whole)[0]
    assert losses(half) == losses(whole)
    assert_same_state(half.model.state_dict(), whole.model.state_dict())


def test_speech_is_scored_by_what_is_generated(tmp_path):
    trainer = whisper(
        tmp_path, max_steps=1, predict_with_generate=True, generation_max_length=8,
    )  # fmt: skip

    assert 0 <= trainer.evaluate()["eval_agreement"] <= 1


@pytest.mark.parametrize("name", ["ViT", "Qwen2.5-VL", "Wav2Vec2"])
def test_a_run_ends_lower_than_it_began(name, tmp_path):
    def collate(rows):
        batch = default_data_collator(rows)
        if name == "Qwen2.5-VL":  # which takes the patches of all images in one row
            batch |= {k: v.flatten(0, 1) for k, v in batch.items() if k == "pixel_values"}
        return batch

    trainer = QFTTrainer(
        model=TINY[name].model(),
        args=QFTTrainingArguments(**settings(tmp_path)),
        train_dataset=Rows(name),
        eval_dataset=Rows(name),
        data_collator=collate,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()

    assert trainer.evaluate()["eval_loss"] < before
