"""From data arguments to what the Trainer takes: examples, collator, counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from .arguments import DataArguments
from .chat import IGNORED
from .examples import chat_examples, classification_examples, label_names_of, text_examples
from .packing import count_tokens, pack
from .sources import load_rows, require_fields, split_rows


@dataclass(frozen=True, slots=True)
class DataCounts:
    """What became of the rows. Whatever is left out is counted here."""

    rows: int  # read
    examples: int  # rows or packed blocks that are used
    tokens: int  # in the examples, without padding
    cut_tokens: int  # beyond max_length, or in the last block that packing could not fill
    dropped_examples: int  # nothing in them is learned

    def __str__(self) -> str:
        """Return the counts in one line."""
        return (
            f"{self.rows:,} rows, {self.examples:,} examples, {self.tokens:,} tokens; "
            f"{self.cut_tokens:,} tokens cut off, {self.dropped_examples:,} examples dropped"
        )


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples ready for the Trainer, and where the rows went."""

    dataset: Dataset
    counts: DataCounts


@dataclass(frozen=True, slots=True)
class TaskData:
    """Everything a Trainer needs to know about the data."""

    train: Examples
    evaluation: Examples | None
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    label_names: list[str]  # classes; none for a language model


def prepare_data(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> TaskData:
    """Load, split, tokenize, bring to length, and drop what teaches nothing.

    Args:
        arguments: What to read and how.
        tokenizer: Has a padding token.
        seed: Draws the rows of `eval_fraction`.

    Raises:
        FileNotFoundError: A data file is not there.
        ValueError: No rows, or none with a learned token; a field is missing; a conversation cannot
            be rendered. The message says which.
    """
    parts = _load_parts(arguments, seed)
    for source, rows in parts.items():
        require_fields(rows, _fields(arguments), source)

    label_names = []
    if arguments.task == "classification":
        label_names = label_names_of(list(parts.values()), arguments.label_field)

    examples = {
        source: _prepare_part(rows, arguments, tokenizer, label_names, source)
        for source, rows in parts.items()
    }
    return TaskData(
        train=examples["training data"],
        evaluation=examples.get("evaluation data"),
        collator=_collator(arguments, tokenizer),
        label_names=label_names,
    )


def _load_parts(arguments: DataArguments, seed: int) -> dict[str, Dataset]:
    """Return the rows of the training data and, if asked for, the evaluation data."""
    rows = load_rows(
        arguments.train_data, arguments.train_split, configuration=arguments.train_config
    )
    parts = {"training data": rows}
    if arguments.eval_data is not None:
        parts["evaluation data"] = load_rows(
            arguments.eval_data, arguments.eval_split, configuration=arguments.eval_config
        )
    elif arguments.eval_fraction is not None:
        parts["training data"], parts["evaluation data"] = split_rows(
            rows, arguments.eval_fraction, seed
        )
    limits = {
        "training data": arguments.max_train_rows,
        "evaluation data": arguments.max_eval_rows,
    }
    return {source: _first(rows, limits[source]) for source, rows in parts.items()}


def _first(rows: Dataset, n_rows: int | None) -> Dataset:
    return rows if n_rows is None else rows.select(range(min(n_rows, len(rows))))


def _fields(arguments: DataArguments) -> list[str]:
    """Name the fields that the task reads."""
    match arguments.task:
        case "chat":
            return [arguments.messages_field]
        case "text":
            return [arguments.text_field]
        case "classification":
            return [*_text_fields(arguments), arguments.label_field]


def _text_fields(arguments: DataArguments) -> list[str]:
    pair = arguments.text_pair_field
    return [arguments.text_field] if pair is None else [arguments.text_field, pair]


def _prepare_part(
    rows: Dataset,
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    label_names: list[str],
    source: str,
) -> Examples:
    """Turn rows into examples of the right length that teach something."""
    encoded = _encode(rows, arguments, tokenizer, label_names)
    fitted, cut_tokens = encoded.remove_columns("cut"), sum(encoded["cut"])
    if arguments.packing:
        fitted = pack(encoded, arguments.max_length)
        cut_tokens = count_tokens(encoded) - count_tokens(fitted)
    used = fitted
    if arguments.task != "classification":
        used = fitted.filter(_teaches, input_columns="labels", desc="Checking")
    counts = DataCounts(
        rows=len(rows),
        examples=len(used),
        tokens=count_tokens(used),
        cut_tokens=cut_tokens,
        dropped_examples=len(fitted) - len(used),
    )
    if counts.examples == 0:
        raise ValueError(_nothing_to_learn(arguments, source, counts))
    return Examples(used, counts)


def _encode(
    rows: Dataset,
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    label_names: list[str],
) -> Dataset:
    """Tokenize the rows as the task says."""
    # Packing cuts the stream of all examples, not each of them.
    max_length = None if arguments.packing else arguments.max_length
    workers = arguments.preprocessing_workers
    match arguments.task:
        case "chat":
            return chat_examples(
                rows,
                tokenizer,
                messages_field=arguments.messages_field,
                assistant_only=arguments.assistant_only_loss,
                max_length=max_length,
                workers=workers,
            )
        case "text":
            return text_examples(
                rows,
                tokenizer,
                text_field=arguments.text_field,
                max_length=max_length,
                workers=workers,
            )
        case "classification":
            return classification_examples(
                rows,
                tokenizer,
                text_fields=_text_fields(arguments),
                label_field=arguments.label_field,
                label_names=label_names,
                max_length=arguments.max_length,
                workers=workers,
            )


def _teaches(labels: list[int]) -> bool:
    """Say whether anything is learned. The first token has no predecessor, so it never is."""
    return any(label != IGNORED for label in labels[1:])


def _nothing_to_learn(arguments: DataArguments, source: str, counts: DataCounts) -> str:
    start = f"nothing can be learned from the {counts.rows} rows of the {source}: "
    if arguments.packing and counts.dropped_examples == 0:
        return start + (
            f"together they do not fill one block of {arguments.max_length} tokens. Lower "
            "max_length or set packing to false."
        )
    if arguments.task == "chat" and arguments.assistant_only_loss:
        return start + (
            f"no assistant turn lies in the first {arguments.max_length} tokens of a conversation, "
            "so every label is masked. Raise max_length, check the roles in the data, or set "
            "assistant_only_loss to false."
        )
    return start + "all of them are empty."


def _collator(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Pad to the longest example of a batch; padding is masked from attention and from the loss.

    Labels are padded by position, not by token: where the padding token is also the end-of-turn
    token, the end of a turn is still learned.
    """
    if arguments.task == "classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
