"""The task that predicts several classes of a text, and the notations of their lists."""

import ast
import io
import tokenize
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from datasets import List, Value

from .classification import Classification, number_in
from .evaluation import SEVERAL_CLASSES
from .task import RowError

SEPARATORS = (",", ";", "|")  # between several classes in a text cell


class MultiLabel(Classification):
    """Classification into any number of classes.

    A label is a list of classes, or a list of 0 and 1 with one entry per class. It may be written
    as text, as in CSV: `a, b`, `a;b`, `a|b` or `["a", "b"]`.
    """

    scoring = SEVERAL_CLASSES
    problem_type = "multi_label_classification"
    label_type = List(Value("float32"))

    def label(self, value: Any) -> list[float]:
        """Return 1 for each class that applies, and 0 for the others."""
        entries = self._listed(value)
        if entries is None:
            raise RowError(
                "not a list of classes",
                f"task 'multi_label' got the label {value!r}.{_advice_on_list(value)}",
            )
        bits = [entry for entry in entries if entry in (0, 1)]
        if self._is_multi_hot:
            entries = [index for index, entry in enumerate(entries) if entry]
        elif len(set(bits)) < len(bits):
            raise RowError(
                "0 or 1 twice in a list of classes",
                f"got {value!r}. Lists with a 0 or 1 for each class must all have the same length, "
                "that of the model's head if it has been trained; the lists of these data do not.",
            )
        chosen = {Classification.label(self, entry) for entry in entries}
        return [float(index in chosen) for index in range(len(self.names))]

    def describe(self, label: Any) -> str:
        """Return the names of the classes that apply."""
        names = [name for name, applies in zip(self.names, label, strict=True) if applies]
        return ", ".join(names) or "none"

    def _listed(self, label: Any) -> list[Any] | None:
        """Return the entries of a list, which may be written as text; None if it is not a list."""
        if isinstance(label, str) and _is_bracketed(text := label.strip()):
            try:
                label = ast.literal_eval(text)
            except (SyntaxError, TypeError, ValueError):
                return None
            if _joins_texts(text):
                return None
        elif isinstance(label, str):
            label = [entry.strip() for entry in label.split(self._separator) if entry.strip()]
        if not isinstance(label, list | tuple):
            return None
        return [number_in(entry) if isinstance(entry, str) else entry for entry in label]

    def _classes(self, labels: Sequence[Any]) -> Iterable[Any]:
        self._separator = self._separator_of(labels)
        lists = [entries for entries in map(self._listed, labels) if entries is not None]
        if not lists:
            raise ValueError(
                f"task 'multi_label' needs lists of classes in field "
                f"{self.arguments.label_field!r}, got {labels[0]!r}. Is label_field right? For one "
                f"class per row, set task to classification.{_advice_on_list(labels[0])}"
            )
        # Multi-hot lists: read as lists of classes, they would give every row the same label.
        self._is_multi_hot = (
            len({len(entries) for entries in lists}) == 1
            and len(lists[0]) > 1
            and (self._head is None or len(self._head) == len(lists[0]))
            and all(entry in (0, 1) for entries in lists for entry in entries)
        )
        if self._is_multi_hot:
            return range(len(lists[0]))
        return (self._canonical(entry) for entries in lists for entry in entries)

    def _separator_of(self, labels: Sequence[Any]) -> str:
        """Return the separator of classes in text cells; all cells must use the same one."""
        texts = [
            label for label in labels if isinstance(label, str) and not _is_bracketed(label.strip())
        ]
        found = [separator for separator in SEPARATORS if any(separator in t for t in texts)]
        if len(found) > 1:
            raise ValueError(
                f"field {self.arguments.label_field!r} has {' and '.join(map(repr, found))} in its "
                "texts, so it is not clear where one class ends. Separate classes by one of "
                'them, or write lists: ["a", "b"].'
            )
        return found[0] if found else SEPARATORS[0]


def _is_bracketed(text: str) -> bool:
    """Return whether a text is written as one list, tuple or set, which it may or may not be."""
    return text[:1] == "[" or text[:1] + text[-1:] in ("()", "{}")


def _joins_texts(text: str) -> bool:
    """Return whether Python would join texts in a list, as in `['a' 'b']`, which NumPy prints."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    return (tokenize.STRING, tokenize.STRING) in pairwise(kinds)


def _advice_on_list(label: Any) -> str:
    """Return how to write a list, for a text that begins like one and is none."""
    if not isinstance(label, str) or not _is_bracketed(label.strip()):
        return ""
    return (
        ' Separate the entries of a list by commas, as in ["a", "b"]. A NumPy array in a table has '
        "none: call tolist() before you write the table."
    )
