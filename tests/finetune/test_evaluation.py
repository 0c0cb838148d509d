"""Scores agree with their definitions, also in a Trainer."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Trainer, TrainingArguments

import qft_hf.hf.metrics
from qft_hf.hf.finetune.evaluation import (
    NEXT_TOKENS,
    accuracy_of_examples,
    perplexity_of_tokens,
    predicted_classes,
    token_losses,
)
from qft_hf.nn.loss import IGNORED
from tests.finetune.chats import tiny_tokenizer
from tests.models import tiny_llama

METRICS = Path(qft_hf.hf.metrics.__file__).parent


@pytest.fixture(scope="module")
def perplexity():
    return evaluate.load(str(METRICS / "perplexity"))


@pytest.fixture(scope="module")
def accuracy():
    return evaluate.load(str(METRICS / "accuracy"))


def test_perplexity_is_the_inverse_geometric_mean_probability(perplexity):
    probabilities = np.array([0.5, 0.25, 0.1, 0.9, 1.0])

    score = perplexity.compute(predictions=-np.log(probabilities))

    assert score["perplexity"] == pytest.approx(np.prod(probabilities) ** (-1 / 5), rel=1e-14)
    assert score["loss"] == pytest.approx(-np.log(probabilities).mean(), rel=1e-14)
    assert score["tokens"] == 5


def test_perplexity_of_guessing_is_the_size_of_the_vocabulary(perplexity):
    score = perplexity.compute(predictions=[np.log(131.0)] * 7)
    assert score["perplexity"] == pytest.approx(131.0, rel=1e-14)


def test_perplexity_that_no_float_holds_is_infinite(perplexity):
    assert perplexity.compute(predictions=[1e4])["perplexity"] == float("inf")


def test_accuracy_is_the_share_of_equal_pairs(accuracy):
    score = accuracy.compute(predictions=[0, 1, 2, 2, 1], references=[0, 2, 2, 1, 1])
    assert score == {"accuracy": 3 / 5}


def test_no_predictions_are_refused(perplexity, accuracy):
    with pytest.raises(ValueError, match="at least one predicted token, got none"):
        perplexity.compute(predictions=[])
    with pytest.raises(ValueError, match="at least one prediction, got none"):
        accuracy.compute(predictions=[], references=[])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_losses_are_log_probabilities_of_the_next_token(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator).to(dtype)
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, :4] = labels[2, 3] = IGNORED

    losses = token_losses((logits, "past"), labels)

    log_probabilities = logits.double().log_softmax(-1)
    for row in range(3):
        for token in range(5):
            label = labels[row, token + 1]
            expected = 0.0 if label == IGNORED else -log_probabilities[row, token, label]
            assert losses[row, token] == pytest.approx(float(expected), abs=1e-6)


def test_eval_loss_is_a_mean_over_tokens_not_over_batches(tmp_path):
    """The Trainer averages batch means, so one learned token could weigh as much as eight."""
    tokenizer, model = tiny_tokenizer(), tiny_llama(vocab_size=320)
    examples = []
    for seed, (length, n_learned) in enumerate([(9, 8), (5, 1), (12, 3)]):
        ids = torch.randint(2, 320, (length,), generator=torch.Generator().manual_seed(seed))
        labels = [IGNORED] * (length - n_learned) + ids[length - n_learned :].tolist()
        examples.append({"input_ids": ids.tolist(), "labels": labels})
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True),
        eval_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=NEXT_TOKENS.compute_metrics,
        preprocess_logits_for_metrics=NEXT_TOKENS.preprocess_logits,
    )

    metrics = trainer.evaluate()

    losses = []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            log_probabilities = model(ids).logits[0].double().log_softmax(-1)
        losses += [
            -log_probabilities[token - 1, label].item()
            for token, label in enumerate(example["labels"])
            if label != IGNORED
        ]
    assert len(losses) == 12
    # fp32 logits of size about 1 leave a few units in the last place in each loss of about 6.
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["eval_loss"]), rel=1e-12)


def test_classes_are_scored_by_the_largest_logit():
    logits = torch.tensor([[0.1, 0.3, 0.2], [2.0, -1.0, 1.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([1, 2, 2])

    classes = predicted_classes(logits, labels)

    assert classes.tolist() == [1, 0, 2]
    score = accuracy_of_examples(EvalPrediction(classes.numpy(), labels.numpy()))
    assert score == {"accuracy": pytest.approx(2 / 3)}


def test_scores_need_no_home_folder(tmp_path, monkeypatch):
    """The first evaluation of a run failed if nothing could be written at home."""
    home = tmp_path / "home"
    home.write_text("a file, in which no folder can be made")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", home / "metrics")
    losses, labels = np.log([[2.0, 8.0]]), np.array([[1, 1, 1]])
    assert perplexity_of_tokens(EvalPrediction(losses, labels))["perplexity"] == pytest.approx(4)
    classes = np.array([0, 1, 1])
    assert accuracy_of_examples(EvalPrediction(classes, np.array([0, 1, 0])))["accuracy"] == 2 / 3
