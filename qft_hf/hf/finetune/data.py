"""Turns data arguments into examples for the Trainer, the task that encodes them, and counts."""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..wording import and_more, counted
from .arguments import DataArguments
from .chat import Chat
from .classification import Classification, Regression
from .multi_label import MultiLabel
from .packing import count_tokens, pack
from .sources import Rows, code_hash, count_shared, fingerprint, load_rows, select_rows, split_rows
from .task import DROPPED, Example, LanguageTask, NothingToLearn, Row, RowError, Task, teaches
from .text import Text

logger = logging.getLogger(__name__)

LANGUAGE_TASKS: dict[str, type[LanguageTask]] = {"chat": Chat, "text": Text}
LABEL_TASKS = {
    "classification": Classification,
    "regression": Regression,
    "multi_label": MultiLabel,
}
TASKS: dict[str, type[Task]] = {**LANGUAGE_TASKS, **LABEL_TASKS}


@dataclass(frozen=True, slots=True)
class DataCounts:
    """Counts of the rows that were read, of what they became, and of everything left out."""

    rows: int  # that were read
    examples: int  # or packed blocks that are used; a row may give several examples
    tokens: int  # in the examples, without padding
    cut_tokens: int  # cut off the examples, beyond max_length
    dropped: dict[str, int]  # rows, examples and packed blocks that are left out, by reason
    held_out: str | None = None  # fingerprint of the rows of eval_fraction, before max_eval_rows

    def __str__(self) -> str:
        """Return the counts in one line."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        return (
            f"{counted(self.rows, 'row')}, {counted(self.examples, 'example')}, "
            f"{counted(self.tokens, 'token')}; {counted(self.cut_tokens, 'token')} cut off, "
            f"{sum(self.dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")
        )


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples ready for the Trainer, and the counts of their rows."""

    dataset: Dataset
    counts: DataCounts


@dataclass(frozen=True, slots=True)
class TaskData:
    """Everything a Trainer needs to know about the data."""

    task: Task
    train: Examples
    evaluation: Examples | None
    shared: dict[str, int]  # by source: number of rows that are both learned and scored

    @property
    def unlearned(self) -> list[str]:
        """Names of the classes that evaluation examples have, and no training example."""
        if not self.task.names or self.evaluation is None:
            return []
        learned, scored = map(_classes_in, (self.train, self.evaluation))
        return [self.task.names[index] for index in np.setdiff1d(scored, learned)]

    @property
    def of_trainer(self) -> dict[str, Any]:
        """Arguments of a Trainer: the examples, and how they are batched and scored."""
        return {
            "train_dataset": self.train.dataset,
            "eval_dataset": None if self.evaluation is None else self.evaluation.dataset,
            "data_collator": self.task.collator,
            "processing_class": self.task.tokenizer,
            "compute_metrics": self.task.scoring.compute_metrics,
            "preprocess_logits_for_metrics": self.task.scoring.preprocess_logits,
        }


def _classes_in(examples: Examples) -> Any:
    """Return the indices of the classes that the examples have."""
    labels = np.asarray(examples.dataset["labels"][:])
    return np.unique(labels) if labels.ndim == 1 else np.flatnonzero(labels.any(axis=0))


def prepare_data(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    seed: int,
) -> TaskData:
    """Load, split and tokenize rows, cut or pack them, and drop those with nothing to learn.

    Args:
        arguments: What to read and how.
        tokenizer: Has a padding token.
        config: Configuration of the model; a trained head defines the classes.
        seed: Seed that draws the rows of `eval_fraction` and of fractional weights.

    Raises:
        FileNotFoundError: A data file does not exist.
        ValueError: There are no rows, or none with a learned token; a row cannot be read (the text
            gives its file and number); or the labels do not fit the model.
    """
    train, held_out, drawn = _load_parts(arguments, seed)
    task = _make_task(arguments, tokenizer, config, [*train, *held_out])
    return TaskData(
        task,
        _prepare_part(train, task, "training data", seed),
        _prepare_part(held_out, task, "evaluation data", seed, drawn) if held_out else None,
        count_shared(train, held_out),
    )


def _load_parts(arguments: DataArguments, seed: int) -> tuple[list[Rows], list[Rows], str | None]:
    """Return rows to learn, rows that are held out, and the fingerprint of a drawn fraction."""
    train = [
        replace(rows, weight=weight)
        for source, weight in zip(arguments.train_data, arguments.weights, strict=True)
        for rows in load_rows(source, arguments.train_split, configuration=arguments.train_config)
    ]
    held_out, drawn = list[Rows](), None
    if arguments.eval_data is not None:
        held_out = [
            rows
            for source in arguments.eval_data
            for rows in load_rows(source, arguments.eval_split, configuration=arguments.eval_config)
        ]
    elif arguments.eval_fraction is not None:
        train, held_out = split_rows(train, arguments.eval_fraction, seed)
        held_out = [replace(rows, weight=1.0) for rows in held_out]
        drawn = fingerprint(held_out)
    train = _limited(train, arguments.max_train_rows)
    return train, _limited(held_out, arguments.max_eval_rows), drawn


def _limited(parts: list[Rows], n_rows: int | None) -> list[Rows]:
    """Return the first rows of each part, as many as is its share of the limit."""
    ends = np.cumsum([0, *(len(rows.table) for rows in parts)])
    if n_rows is None or n_rows >= ends[-1]:
        return parts
    shares = np.diff((ends * n_rows + ends[-1] // 2) // ends[-1])  # rounded; their sum is the limit
    without = [rows.source for rows, n in zip(parts, shares, strict=True) if n == 0]
    if without:
        logger.warning(
            "a limit of %s leaves none of %s: rows are taken from each file in proportion to its "
            "size. Raise max_train_rows or max_eval_rows to include all",
            counted(n_rows, "row"),
            and_more(without),
        )
    begun = zip(ends[:-1], shares, strict=True)
    return select_rows(parts, [row for begin, n in begun for row in range(begin, begin + n)])


def _make_task(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    parts: list[Rows],
) -> Task:
    if arguments.task in LANGUAGE_TASKS:
        return LANGUAGE_TASKS[arguments.task](arguments, tokenizer)
    labels, row, has_labels = [], {}, False
    declared = dict.fromkeys(n for rows in parts for n in rows.class_names(arguments.label_field))
    for rows in parts:
        for record in rows.table:
            try:
                row = rows.read(record)
            except RowError:
                continue  # it is reported or counted when it is encoded
            labels.append(row.get(arguments.label_field))
            has_labels = has_labels or arguments.label_field in row
    if labels and not has_labels:
        raise ValueError(
            f"no row has a field {arguments.label_field!r}: the fields are "
            f"{', '.join(map(repr, row))}. Set label_field to the one that holds the labels."
        )
    return LABEL_TASKS[arguments.task](arguments, tokenizer, config, labels, list(declared))


def _prepare_part(
    parts: list[Rows], task: Task, name: str, seed: int, drawn: str | None = None
) -> Examples:
    """Turn rows into examples of the right length that have something to learn."""
    weighted, dropped, cut_tokens = [], Counter[str](), 0
    for rows in parts:
        encoded = _encode(rows, task)
        dropped.update(reason for reason in encoded[DROPPED] if reason is not None)
        kept = encoded.filter(lambda reason: reason is None, input_columns=DROPPED, desc="Checking")
        kept = _repeat(kept, rows.weight, seed)
        cut_tokens += sum(kept["cut"])
        weighted.append(kept.select_columns(list(task.features)))
    used = concatenate_datasets(weighted)
    if task.arguments.packing and len(used):
        blocks = pack(used, task.arguments.max_length)
        used = blocks.filter(teaches, input_columns="labels", desc="Checking")
        if len(used) < len(blocks):
            dropped["no learned token in a packed block"] = len(blocks) - len(used)
    counts = DataCounts(
        rows=sum(len(rows.table) for rows in parts),
        examples=len(used),
        tokens=count_tokens(used),
        cut_tokens=cut_tokens,
        dropped=dict(dropped),
        held_out=drawn,
    )
    if counts.examples == 0:
        raise ValueError(
            f"nothing can be learned from the {counted(counts.rows, 'row')} of the {name}. Dropped "
            f"are: {', '.join(f'{count:,} {reason}' for reason, count in dropped.items())}. Raise "
            "max_length if answers begin later; otherwise check the roles and fields of the data."
        )
    return Examples(used, counts)


def _encode(rows: Rows, task: Task) -> Dataset:
    """Encode rows as examples; the column `DROPPED` has the reason if one is left out."""
    features = Features({**task.features, "cut": Value("int64"), DROPPED: Value("string")})

    def encode(records: dict[str, list[Any]], code: str) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in features}
        for values in zip(*records.values(), strict=True):
            for example in _examples(dict(zip(records, values, strict=True))):
                for name, column in columns.items():
                    column.append(example.get(name))
        return columns

    def _examples(record: Row) -> list[Example]:
        try:
            return task.encode(rows.read(record))
        except NothingToLearn as error:
            return [{DROPPED: error.reason}]
        except RowError as error:
            if task.arguments.on_bad_row == "skip":
                return [{DROPPED: error.reason}]
            raise ValueError(
                f"{rows.place(record)}: {error} To leave out such rows and count them, set "
                "on_bad_row to skip."
            ) from error

    return rows.table.map(
        encode,
        batched=True,
        fn_kwargs={"code": code_hash()},  # part of the cache key: other code encodes again
        features=features,
        remove_columns=rows.table.column_names,
        num_proc=task.arguments.preprocessing_workers,
        desc="Tokenizing",
    )


def _repeat(examples: Dataset, weight: float, seed: int) -> Dataset:
    """Return every example `weight` times; the examples of a fraction are drawn by seed."""
    if weight == 1:
        return examples
    whole, n_more = divmod(round(len(examples) * weight), len(examples) or 1)
    if not whole and not n_more and len(examples):
        raise ValueError(
            f"a weight of {weight:g} leaves none of {counted(len(examples), 'example')}. Increase "
            "train_weights, or max_train_rows if it is set, or leave that file out of train_data."
        )
    drawn = np.random.default_rng(seed).permutation(len(examples))[:n_more]
    return examples.select([*list(range(len(examples))) * whole, *sorted(drawn)])
