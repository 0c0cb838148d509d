"""How numbers, names and units read in messages for users."""

from collections.abc import Collection, Sequence
from math import isfinite, isnan

REGRESSION = "the squared unit of the labels"
NATS = "nats"


def counted(n: int, noun: str) -> str:
    """Return `1 row`, `2 rows`, `1,200 rows`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def score_text(score: float) -> str:
    """Return a score with four decimals, or with three significant digits if it is below 0.001."""
    if not isfinite(score):
        return "undefined" if isnan(score) else "infinite"
    return f"{score:.3g}" if 0 < abs(score) < 0.001 else f"{score:.4f}"


def and_more(names: Sequence[str]) -> str:
    """Return the first name and the number of others."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def loss_unit(tasks: Collection[str | None]) -> str:
    """Return the unit of the loss of these tasks: of a squared error, a cross-entropy, or both.

    Args:
        tasks: Tasks of `qft-hf finetune`; None for a run that did not record its task.
    """
    if "regression" not in tasks:
        return NATS
    return REGRESSION if set(tasks) == {"regression"} else f"{NATS}; regression: {REGRESSION}"
