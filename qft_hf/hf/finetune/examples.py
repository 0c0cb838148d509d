"""Dataset rows as token examples, one function a task.

Each returns the model's inputs, `labels`, and `cut`: how many tokens `max_length` has cut off.
"""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from .chat import ConversationEncoder

Row = dict[str, Any]


def chat_examples(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    messages_field: str,
    assistant_only: bool,
    max_length: int | None,
    workers: int | None = None,
) -> Dataset:
    """Render and tokenize conversations; see `ConversationEncoder`.

    Args:
        rows: `messages_field` holds a list of messages.
        tokenizer: Has a chat template.
        messages_field: Name of the field.
        assistant_only: Learn the assistant turns only.
        max_length: Cut each conversation after this many tokens; None keeps it whole.
        workers: Processes that tokenize.

    Returns:
        Columns `input_ids`, `labels` and `cut`.
    """
    encoder = ConversationEncoder(tokenizer, assistant_only=assistant_only)

    def encode(row: Row) -> Row:
        input_ids, labels = encoder.encode(row[messages_field] or [], max_length=max_length)
        return _cut(input_ids, labels, max_length)

    return _map(rows, encode, workers)


def text_examples(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_field: str,
    max_length: int | None,
    workers: int | None = None,
) -> Dataset:
    """Tokenize plain texts, each ended by the end-of-text token; every token is learned.

    Args:
        rows: `text_field` holds a string. An empty one gives an empty example.
        tokenizer: Has an end-of-text token.
        text_field: Name of the field.
        max_length: Cut each text after this many tokens; None keeps it whole.
        workers: Processes that tokenize.

    Returns:
        Columns `input_ids`, `labels` and `cut`.

    Raises:
        ValueError: The tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"task 'text' ends each text with the end-of-text token, but the tokenizer of "
            f"{tokenizer.name_or_path!r} has none. Set eos_token in its tokenizer_config.json."
        )

    def encode(row: Row) -> Row:
        if not isinstance(row[text_field], str | None):
            raise ValueError(
                f"task 'text' needs strings in field {text_field!r}, got {row[text_field]!r}. Is "
                "text_field right?"
            )
        input_ids = []
        if row[text_field]:
            input_ids = list(tokenizer(row[text_field], verbose=False)["input_ids"])
            if input_ids[-1] != end:
                input_ids.append(end)
        return _cut(input_ids, input_ids, max_length)

    return _map(rows, encode, workers)


def classification_examples(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_fields: Sequence[str],
    label_field: str,
    label_names: Sequence[str],
    max_length: int,
    workers: int | None = None,
) -> Dataset:
    """Tokenize one text or a pair of texts, with the class as the label.

    Args:
        rows: The text fields hold strings; the label field holds what `label_names` was read from.
        tokenizer: Any.
        text_fields: One or two fields.
        label_field: Name of the label's field.
        label_names: Class names; the label is the index in this list. See `label_names_of`.
        max_length: Cut after this many tokens, from the longer text of a pair first.
        workers: Processes that tokenize.

    Returns:
        The tokenizer's columns, `labels` (an index) and `cut`.

    Raises:
        ValueError: A row has no text.
    """
    index_of = {name: index for index, name in enumerate(label_names)}
    name_of = _label_namer(rows, label_field)

    def encode(row: Row) -> Row:
        texts = [row[field] for field in text_fields]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"classification needs a string in each of {list(text_fields)}, got {texts!r} in a "
                f"row labelled {row[label_field]!r}. Remove such rows or name another field."
            )
        encoded = tokenizer(*texts, verbose=False)
        cut = max(0, len(encoded["input_ids"]) - max_length)
        if cut:
            encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**encoded, "labels": index_of[name_of(row[label_field])], "cut": cut}

    return _map(rows, encode, workers)


def label_names_of(parts: Sequence[Dataset], label_field: str) -> list[str]:
    """Return the class names in all parts: as the dataset declares them, or else its labels sorted.

    Raises:
        ValueError: A row has no label, or there are fewer than two classes.
    """
    values = set().union(*(rows.unique(label_field) for rows in parts))
    declared = parts[0].features[label_field]
    if None in values or (isinstance(declared, ClassLabel) and -1 in values):
        raise ValueError(
            f"some rows have no label in field {label_field!r}. Remove them: a row without a label "
            "can neither be learned nor scored."
        )
    names = declared.names if isinstance(declared, ClassLabel) else map(str, sorted(values))
    names = list(names)
    if len(names) < 2:
        raise ValueError(
            f"classification needs at least two classes, but field {label_field!r} holds only "
            f"{names}. Is label_field right?"
        )
    return names


def _label_namer(rows: Dataset, label_field: str) -> Callable[[Any], str]:
    """Return the function from a stored label to its class name."""
    declared = rows.features[label_field]
    return declared.int2str if isinstance(declared, ClassLabel) else str


def _cut(input_ids: list[int], labels: list[int], max_length: int | None) -> Row:
    kept = slice(max_length)
    return {
        "input_ids": input_ids[kept],
        "labels": labels[kept],
        "cut": len(input_ids) - len(input_ids[kept]),
    }


def _map(rows: Dataset, encode: Callable[[Row], Row], workers: int | None) -> Dataset:
    return rows.map(encode, remove_columns=rows.column_names, num_proc=workers, desc="Tokenizing")
