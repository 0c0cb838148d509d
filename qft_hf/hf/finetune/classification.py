"""Tasks that predict a class or a number for a text or a text pair."""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np
from datasets import Features, List, Value
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .arguments import DataArguments
from .evaluation import CLASSES, NUMBERS, Scoring
from .task import Example, NothingToLearn, Row, RowError, Task

UNLABELLED = -1  # the convention of `datasets.ClassLabel`


def classifier_class(config: PreTrainedConfig) -> Any:
    """Return the auto class of transformers that adds a head for labels to a text model.

    Raises:
        ValueError: transformers has no classifier of texts for this configuration.
    """
    auto = AutoModelForSequenceClassification
    is_known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if is_known or auto.__name__ in (getattr(config, "auto_map", None) or {}):
        return auto
    raise ValueError(
        f"Labeled texts need a model that transformers can give a classification head, and "
        f"{type(config).__name__} belongs to none. Choose a model of another family, or task "
        "'chat' or 'text'."
    )


class Classification(Task):
    """Classification into one of several classes.

    The classes are in the order of the model's head if it has been trained, otherwise in the order
    that the data declare, otherwise sorted.

    Args:
        arguments: Names of the fields, and the maximum length of examples.
        tokenizer: Has a padding token.
        config: Configuration of the model; not changed.
        labels: The labels of all rows; None for a row without a label.
        declared: Class names that the data declare, in order; may be empty.

    Raises:
        ValueError: There are fewer than two classes, some differ only in case, white space or the
            Unicode form of accents, or the model's head does not have them.
    """

    model_class = staticmethod(classifier_class)
    scoring: ClassVar[Scoring] = CLASSES
    problem_type: ClassVar[Any] = "single_label_classification"
    label_type: ClassVar[Any] = Value("int64")

    def __init__(
        self,
        arguments: DataArguments,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        labels: Sequence[Any],
        declared: Sequence[str] = (),
    ) -> None:
        super().__init__(arguments, tokenizer)
        self.features = Features(
            {name: List(Value("int64")) for name in tokenizer(" ")} | {"labels": self.label_type}
        )
        self.collator = DataCollatorWithPadding(tokenizer)
        self._begin, self._end = _tokens_around_texts(tokenizer)
        self._declared = declared
        self._head = _names_of_head(config)
        self.names = self._names(labels)
        self._index_of = {_key(name): index for index, name in enumerate(self.names)}

    def configure(self, config: PreTrainedConfig) -> None:
        """Set the head's size, problem type and output names in `config`."""
        config.problem_type = self.problem_type
        config.num_labels = max(1, len(self.names))
        if self.names:
            config.id2label = dict(enumerate(self.names))
            config.label2id = {name: index for index, name in enumerate(self.names)}

    def encode(self, row: Row) -> list[Example]:
        """Tokenize; the longer text of a pair is cut first, and special tokens are not doubled."""
        names = [self.arguments.text_field, self.arguments.text_pair_field]
        texts = [self.field(row, name) for name in names if name is not None]
        if not all(isinstance(text, str) for text in texts):
            raise RowError("not a text", f"expected a string in each of {names}, got {texts!r}.")
        texts = [self._bare(text) for text in texts]
        label = self.label(self.field(row, self.arguments.label_field))
        encoded = self.tokenizer(*texts, verbose=False)
        if not encoded["input_ids"]:
            raise NothingToLearn("empty", "there is no text in it.")
        cut = max(0, len(encoded["input_ids"]) - self.arguments.max_length)
        if cut:
            length = self.arguments.max_length
            encoded = self.tokenizer(*texts, truncation=True, max_length=length)
        return [{**encoded, "labels": label, "cut": cut}]

    def label(self, value: Any) -> Any:
        """Return a stored label in the form that the loss takes.

        Raises:
            RowError: The label is missing, or is not one of the classes.
        """
        label = self._canonical(value)
        if label is None or label == UNLABELLED:
            raise RowError(
                f"no label ({label})",
                "a row without a label cannot be learned or scored. Remove it, or give a class "
                f"that is stored as {UNLABELLED} a name.",
            )
        index = self._index_of.get(_key(label))
        if index is None and isinstance(label, int) and 0 <= label < len(self.names):
            index = label
        if index is None:
            raise RowError(f"unknown class {label!r}", f"the classes are {self.names}.")
        return index

    def describe(self, label: Any) -> str:
        """Return the label of an example as text: the name of its class."""
        return str(self.names[label])

    def _bare(self, text: str) -> str:
        """Return a text without the special tokens that the tokenizer adds around it anyway."""
        for token in self._begin:
            while (rest := text.lstrip()).startswith(token):
                text = rest.removeprefix(token).lstrip()
        for token in self._end:
            while (rest := text.rstrip()).endswith(token):
                text = rest.removesuffix(token).rstrip()
        return text

    def _canonical(self, label: Any) -> Any:
        """Return a name, a number or None: CSV holds only text, and pandas turns 1 into 1.0."""
        if isinstance(label, str):
            label = number_in(label) if label.strip() else None
        if isinstance(label, bool):
            return str(label)
        if isinstance(label, float) and (math.isnan(label) or label.is_integer()):
            label = None if math.isnan(label) else int(label)
        return label

    def _classes(self, labels: Sequence[Any]) -> Iterable[Any]:
        """Return the classes that occur in the labels."""
        return map(self._canonical, labels)

    def _names(self, labels: Sequence[Any]) -> list[str]:
        where = f"field {self.arguments.label_field!r}"
        found = list(self._classes(labels))
        values = [value for value in found if value not in (None, UNLABELLED)]
        for value in values:
            if not isinstance(value, int | str):
                raise ValueError(
                    f"{where} holds {value!r}, which is not a class. Set task to regression for "
                    "numbers with a fraction and to multi_label for lists, or store classes as "
                    "names or whole numbers."
                )
        numbers = all(isinstance(value, int) for value in values)
        names = [str(value) for value in sorted(set(values), key=None if numbers else str)]
        names = list(self._declared) or names
        if self._head is not None:
            names = self._of_head(self._head, names, numbers=numbers)
        if len({_key(name) for name in names}) < len(names):
            raise ValueError(
                f"some classes in {where} differ only in case, in white space or in the Unicode "
                f"form of accents: {names}. Give each class one spelling."
            )
        if len(names) < 2:
            beside = f", and {UNLABELLED}, which means no label: give that class a name"
            raise ValueError(
                f"classification needs at least two classes, but {where} holds only {names}"
                f"{beside if UNLABELLED in found else ''}. Is label_field right?"
            )
        return names

    def _of_head(self, head: list[str], names: list[str], *, numbers: bool) -> list[str]:
        """Return the classes in the order of a trained head."""
        known = {_key(name) for name in head}
        unknown = [name for name in names if _key(name) not in known]
        nameless = head == [f"LABEL_{index}" for index in range(len(head))]
        if not unknown:
            return head
        if nameless and self._declared and len(names) == len(head):
            return names
        if numbers and unknown == names and all(0 <= int(name) < len(head) for name in names):
            return head
        raise ValueError(
            f"the model's head has the classes {head}, and it is not known which of them the "
            f"labels {unknown} mean. Rename the labels, write their names into id2label of "
            "the model's config.json, or start from a model without a classification head."
        )


class Regression(Classification):
    """Prediction of a number; the loss is the squared error."""

    scoring = NUMBERS
    problem_type = "regression"
    label_type = Value("float32")

    def label(self, value: Any) -> float:
        """Return the number."""
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError) as error:
            raise RowError("not a number", f"task 'regression' got the label {value!r}.") from error
        if not abs(number) <= float(np.finfo(np.float32).max):
            raise RowError("not a finite number", f"task 'regression' got the label {value!r}.")
        return number

    def describe(self, label: Any) -> str:
        """Return the number."""
        return str(label)

    def _names(self, labels: Sequence[Any]) -> list[str]:
        if self._head is not None and len(self._head) != 1:
            raise ValueError(
                f"the model's head has the classes {self._head}, but task 'regression' needs one "
                "output. Start from a model without a classification head."
            )
        return []


def number_in(text: str) -> int | float | str:
    """Return the number that `str` writes as this text; the text itself if there is none."""
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        if str(value) == text.strip():
            return value
    return text


def _tokens_around_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Return the special tokens that a tokenizer adds before a text, and those after it."""
    ids, special = tokenizer("x")["input_ids"], set(tokenizer.all_special_ids)
    before, after = (
        [str(tokenizer.convert_ids_to_tokens(id)) for id in takewhile(special.__contains__, run)]
        for run in (ids, ids[::-1])
    )
    return before, after


def _key(name: Any) -> str:
    return unicodedata.normalize("NFC", str(name)).strip().casefold()


def _names_of_head(config: PreTrainedConfig) -> list[str] | None:
    """Return the names of the outputs, None if the checkpoint has no trained head."""
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        return None
    names: Any = config.id2label
    return [str(names[index]) for index in sorted(names)]
