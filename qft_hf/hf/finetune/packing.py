"""Examples of all lengths laid end to end and cut into blocks of one length."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

SEQUENCES = ("input_ids", "labels")  # columns with one entry a token


def pack(examples: Dataset, block_tokens: int) -> Dataset:
    """Concatenate the examples in order and cut the stream into full blocks: no padding at all.

    A block may hold the end of one example and the start of the next, which can then see it: the
    usual price of packing. The last tokens, fewer than a block, are left out. The stream is held in
    memory once, at 16 bytes a token.

    Args:
        examples: Columns `input_ids` and `labels`, lists of equal length in each row.
        block_tokens: Length of a block, at least 1.

    Returns:
        The same two columns, every row `block_tokens` long.
    """
    table = _table(examples)
    blocks = {}
    for name in SEQUENCES:
        stream = pc.list_flatten(table[name]).to_numpy().astype(np.int64)
        n_blocks = len(stream) // block_tokens
        blocks[name] = stream[: n_blocks * block_tokens].reshape(n_blocks, block_tokens)
    return Dataset.from_dict(blocks)


def count_tokens(examples: Dataset) -> int:
    """Return the tokens in all examples."""
    return pc.sum(pc.list_value_length(_table(examples)["input_ids"])).as_py() or 0


def _table(examples: Dataset) -> pa.Table:
    """Return the rows as they are after every filter and selection, unlike `examples.data`."""
    return examples.with_format("arrow")[:]
