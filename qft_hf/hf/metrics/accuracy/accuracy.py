"""Share of correct predictions.

An `evaluate` module: `evaluate.load("<this folder>")` works without a network.
"""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Accuracy is the share of predictions that equal their reference: (correct) / (all), in [0, 1].
"""

_INPUTS = """
Args:
    predictions: Predicted class of each example, an integer.
    references: True class of each example, an integer.

Returns:
    accuracy: Share of predictions that equal their reference.
"""


class Accuracy(evaluate.Metric):
    """Share of correct predictions; see `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("accuracy needs at least one prediction, got none.")
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
