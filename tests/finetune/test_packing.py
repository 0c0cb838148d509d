"""Packing keeps every token, in order, but the declared remainder."""

import random

import pytest
from datasets import Dataset

from qft_hf.hf.finetune.packing import count_tokens, pack

LENGTHS = [[5], [1, 1, 1], [0, 7, 0, 0, 3], [13, 0, 1, 6, 29, 2]]  # short, empty, over many blocks


def examples_of(lengths):
    """Examples of distinct tokens; every third label is ignored."""
    tokens = iter(range(sum(lengths)))
    ids = [[next(tokens) for _ in range(length)] for length in lengths]
    labels = [[-100 if token % 3 else token for token in row] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.mark.parametrize("block_tokens", [1, 4, 5, 7, 100])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks_are_the_stream_without_its_remainder(lengths, block_tokens):
    examples = examples_of(lengths)

    blocks = pack(examples, block_tokens)

    for name in ("input_ids", "labels"):
        stream = [token for row in examples[name] for token in row]
        kept = len(stream) - len(stream) % block_tokens
        assert [token for row in blocks[name] for token in row] == stream[:kept]
        assert all(len(row) == block_tokens for row in blocks[name])
    assert count_tokens(examples) - count_tokens(blocks) == sum(lengths) % block_tokens


def test_rows_that_were_filtered_out_are_not_packed():
    """`Dataset.data` still holds them: reading it directly would bring them back."""
    examples = examples_of([3, 4, 5, 6]).select([3, 1])

    blocks = pack(examples, 2)

    assert [token for row in blocks["input_ids"] for token in row] == [*range(12, 18), *range(3, 7)]
    assert count_tokens(examples) == 10


def test_count_of_many_chunks():
    lengths = random.Random(0).choices(range(20), k=300)
    examples = examples_of(lengths).map(lambda row: row, writer_batch_size=7)

    assert count_tokens(examples) == sum(lengths)
    assert len(pack(examples, 16)) == sum(lengths) // 16
