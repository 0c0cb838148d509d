"""How long a sequence of a model may be, as its configuration tells."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

# Other names, such as `n_positions`, have the first as an alias.
NAMES = ("max_position_embeddings", "max_seq_len")


def n_positions(config: PreTrainedConfig) -> int | None:
    """Return the tokens of the longest sequences that a model takes, or was made for.

    Beyond them a table of positions has no row, and rotary positions are of lengths that were never
    learned. Where those are scaled by a factor, they reach as many times as far as before, if that
    is beyond what the configuration says. Models like RoBERTa number positions from behind the
    padding token's number, and have so many fewer than their table has rows.

    Args:
        config: Of a model.

    Returns:
        Tokens; None if the configuration knows no limit.
    """
    text: Any = config.get_text_config()
    rows = next((n for name in NAMES if (n := getattr(text, name, None)) is not None), None)
    if rows is None or rows < 1:  # XLNet says -1
        return None
    rotary = getattr(text, "rope_parameters", None)
    if rotary is None:
        return int(rows) - _rows_before_the_first(text, int(rows))
    before = rotary.get("original_max_position_embeddings") or rows
    return max(int(rows), int((rotary.get("factor") or 1) * before))


def _rows_before_the_first(config: PreTrainedConfig, rows: int) -> int:
    """Return how many rows of a table of positions stand for no position of a token."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (AttributeError, KeyError, TypeError, ValueError):  # not of transformers alone
        return 0
    tables = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == rows
    ]
    return max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
