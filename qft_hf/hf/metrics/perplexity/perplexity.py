"""Perplexity of a language model from the loss of each predicted token.

An `evaluate` module: `evaluate.load("<this folder>")` works without a network.
"""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Perplexity is exp(mean negative log-likelihood), and each predicted token counts once. A model that
is always certain and right has 1; one that guesses at random has the size of its vocabulary.
"""

_INPUTS = """
Args:
    predictions: Negative log-likelihood of each predicted token in nats, flat. Leave out the tokens
        that take no part in the loss (padding, prompts).

Returns:
    perplexity: exp(loss); inf if that exceeds a double.
    loss: Mean of `predictions` in nats per token.
    tokens: Number of predicted tokens.
"""


class Perplexity(evaluate.Metric):
    """Perplexity, mean loss and token count; see `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        losses = np.asarray(predictions, dtype=np.float64)
        if losses.size == 0:
            raise ValueError("perplexity needs the loss of at least one predicted token, got none.")
        mean = losses.mean()
        with np.errstate(over="ignore"):  # a very large loss gives perplexity inf
            perplexity = np.exp(mean)
        return {"perplexity": float(perplexity), "loss": float(mean), "tokens": int(losses.size)}
