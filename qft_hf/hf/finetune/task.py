"""The task of a run: one object that defines examples, batches, scores and the model's head."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from datasets import Features, List, Value
from transformers import DataCollatorForSeq2Seq, PreTrainedConfig, PreTrainedTokenizerBase

from ...nn.loss import IGNORED
from ..language_model import language_class
from .arguments import DataArguments
from .evaluation import NEXT_TOKENS, Scoring
from .packing import collate_blocks

Row = dict[str, Any]  # field -> value, as in the file
# The columns of a `Task`, and `cut`: how many tokens were cut off. Or only `DROPPED`.
Example = dict[str, Any]
DROPPED = "dropped"  # column: the reason why a row, or an example of it, is left out
Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        reason: What is wrong, in words that many rows share: skipped rows are counted by it.
        detail: What was expected, what this row has and what to do.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason

    def __str__(self) -> str:
        """Return reason and detail in one sentence."""
        return ": ".join(self.args)


class NothingToLearn(RowError):
    """A row that can be read but has nothing to learn. It is left out and counted."""


class Task(ABC):
    """One kind of fine-tuning, from a row to the scores.

    Args:
        arguments: Names of the fields, and the maximum length of examples.
        tokenizer: Has a padding token.
    """

    scoring: ClassVar[Scoring]
    features: Features  # columns of an example
    names: Sequence[str] = ()  # of the outputs, in order; empty if no class is learned
    end_token: int | None = None  # token that ends an answer or a text
    collator: Collator

    def __init__(self, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        self.arguments = arguments
        self.tokenizer = tokenizer

    @abstractmethod
    def encode(self, row: Row) -> list[Example]:
        """Return the examples of a row, each with the columns of `features` and `cut`.

        An example that has nothing to learn is `{DROPPED: reason}`; others of the row may have.

        Raises:
            RowError: The row cannot be read.
            NothingToLearn: The row can be read but has nothing to learn.
        """

    @staticmethod
    @abstractmethod
    def model_class(config: Any) -> Any:
        """Return the class of transformers that makes and loads the model of a config, or raise."""

    @abstractmethod
    def configure(self, config: PreTrainedConfig) -> None:
        """Write the head that the task needs into the model's config."""

    def field(self, row: Row, name: str) -> Any:
        """Return a field of a row; raise `RowError` if there is no field of that name."""
        if name not in row:
            raise RowError(
                f"no field {name!r}",
                f"the fields are {', '.join(map(repr, row))}. Name the right one in the config "
                "(messages_field, prompt_field, answer_field, text_field, text_pair_field or "
                "label_field).",
            )
        return row[name]


class LanguageTask(Task):
    """Prediction of next tokens; an example is a sequence of tokens and their labels."""

    model_class = staticmethod(language_class)
    scoring = NEXT_TOKENS
    features = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})

    def __init__(self, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(arguments, tokenizer)
        # Packing cuts the concatenation of all examples, not each example.
        self.max_length = None if arguments.packing else arguments.max_length
        # Labels are padded by position, not by token: if the padding token is also the end-of-turn
        # token, the end of a turn is still learned.
        self.collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        if arguments.packing:
            self.collator = partial(collate_blocks, pad_token_id=tokenizer.pad_token_id)

    def configure(self, config: PreTrainedConfig) -> None:
        """Do nothing: the head of a language model already has all tokens."""

    def example(self, input_ids: list[int], labels: list[int]) -> Example:
        """Return tokens and labels cut to `max_length`, or the reason if no label is left."""
        kept = slice(self.max_length)
        if not teaches(labels[kept]):
            where = f" in the first {self.max_length} tokens" if teaches(labels) else ""
            return {DROPPED: f"nothing to learn{where}"}
        return {
            "input_ids": input_ids[kept],
            "labels": labels[kept],
            "cut": len(input_ids) - len(input_ids[kept]),
        }


def teaches(labels: Sequence[int]) -> bool:
    """Whether any token is learned. The first one has no predecessor, so it never is."""
    return any(label != IGNORED for label in labels[1:])
