"""The longest sequence of a model, derived from its configuration."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

# Configurations with another name, such as `n_positions`, define the first one as an alias.
NAMES = ("max_position_embeddings", "max_seq_len")


def n_positions(config: PreTrainedConfig) -> int | None:
    """Return the length in tokens of the longest sequence that a model supports.

    Beyond it, a position table has no row, and rotary positions were never learned. With a scaling
    factor, rotary positions reach the original length times that factor, or the length in the
    configuration if that is larger. Models like RoBERTa number positions from after the padding
    token's index, so they support that many fewer positions than their table has rows.

    Args:
        config: Configuration of the model.

    Returns:
        Tokens; None if the configuration sets no limit.
    """
    text: Any = config.get_text_config()
    rows = next((n for name in NAMES if (n := getattr(text, name, None)) is not None), None)
    if rows is None or rows < 1:  # XLNet has -1
        return None
    rotary = getattr(text, "rope_parameters", None)
    if rotary is None:
        return int(rows) - _rows_before_the_first(text, int(rows))
    before = rotary.get("original_max_position_embeddings") or rows
    return max(int(rows), int((rotary.get("factor") or 1) * before))


def _rows_before_the_first(config: PreTrainedConfig, rows: int) -> int:
    """Return how many rows of the position table precede the first token's position."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (AttributeError, KeyError, TypeError, ValueError):  # needs code outside transformers
        return 0
    tables = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == rows
    ]
    return max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
