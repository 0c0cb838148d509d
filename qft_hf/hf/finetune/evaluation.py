"""How a model is scored on held-out data, with the metric modules that the package ships.

Logits are reduced batch by batch: to one loss per token for a language model, to one class per
example for a classifier. Logits of the whole vocabulary would take gigabytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from ...nn.loss import IGNORED
from ..metrics.accuracy.accuracy import Accuracy
from ..metrics.perplexity.perplexity import Perplexity


@dataclass(frozen=True, slots=True)
class Scoring:
    """The two functions that a Trainer scores with, and the names of the scores."""

    preprocess_logits: Callable[[Any, Tensor], Tensor]  # preprocess_logits_for_metrics
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    names: tuple[str, ...]  # without the Trainer's prefix `eval_`

    def of(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Return the scores among the metrics of an evaluation, by name."""
        return {name: metrics[f"eval_{name}"] for name in self.names}


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each next token.

    Sequences are processed one at a time, so that the batch's logits are not copied as a whole.

    Args:
        logits: Float, `[batch, tokens, vocabulary]`, or a tuple whose first entry they are.
        labels: int64, `[batch, tokens]`; `IGNORED` at tokens without a loss.

    Returns:
        fp32, `[batch, tokens - 1]`, in nats; 0 at tokens without a loss.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    losses = [
        cross_entropy(row[:-1].float(), label[1:], ignore_index=IGNORED, reduction="none")
        for row, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses)


def perplexity_of_tokens(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean loss and the perplexity; every learned token counts once.

    The returned `loss` replaces the Trainer's own `eval_loss`, a mean of batch means in which the
    weight of a token depends on its batch.
    """
    losses, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    learned = labels[:, 1:] != IGNORED
    score = _computed(Perplexity, predictions=losses[learned])
    return {"loss": score["loss"], "perplexity": score["perplexity"]}


def predicted_classes(logits: Any, labels: Tensor) -> Tensor:
    """Return the most likely class of each example: int64, `[batch]`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)


def accuracy_of_examples(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy of predicted classes."""
    return _computed(Accuracy, predictions=prediction.predictions, references=prediction.label_ids)


def predicted_numbers(logits: Any, labels: Tensor) -> Tensor:
    """Return the outputs of the head: FP32, one per example, or one per class of each example."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.float()


def errors_of_numbers(prediction: EvalPrediction) -> dict[str, float]:
    """Return the root mean squared error and the Pearson correlation of predicted numbers."""
    predicted, labels = np.ravel(prediction.predictions), np.ravel(prediction.label_ids)
    varies = len(labels) > 1 and predicted.std() > 0 and labels.std() > 0
    correlation = np.corrcoef(predicted, labels)[0, 1] if varies else float("nan")
    error = np.sqrt(np.mean((predicted - labels) ** 2.0))
    return {"rmse": float(error), "pearson": float(correlation)}


def accuracy_of_several_classes(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy over all classes, and the share of examples with every class right."""
    right = (np.asarray(prediction.predictions) > 0) == (np.asarray(prediction.label_ids) > 0)
    return {"accuracy": float(right.mean()), "exact_match": float(right.all(axis=1).mean())}


def _computed(metric: Any, **values: Any) -> Any:
    """Return what a metric computes; it makes a folder, at home by default, and leaves it empty."""
    with TemporaryDirectory() as folder:
        return metric(keep_in_memory=True, cache_dir=folder).compute(**values)


ERRORS = ("loss", "perplexity", "rmse")  # scores of which lower is better
NEXT_TOKENS = Scoring(token_losses, perplexity_of_tokens, ("loss", "perplexity"))
CLASSES = Scoring(predicted_classes, accuracy_of_examples, ("loss", "accuracy"))
NUMBERS = Scoring(predicted_numbers, errors_of_numbers, ("loss", "rmse", "pearson"))
SEVERAL_CLASSES = Scoring(
    predicted_numbers, accuracy_of_several_classes, ("loss", "accuracy", "exact_match")
)
