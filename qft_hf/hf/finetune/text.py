"""Plain texts, each ended by the end-of-text token; every token is learned."""

from transformers import PreTrainedTokenizerBase

from .arguments import DataArguments
from .task import Example, LanguageTask, NothingToLearn, Row, RowError


class Text(LanguageTask):
    """Plain text.

    Raises:
        ValueError: The tokenizer has no end-of-text token.
    """

    def __init__(self, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(arguments, tokenizer)
        self.end_token = tokenizer.eos_token_id
        if self.end_token is None:
            raise ValueError(
                f"task 'text' ends each text with the end-of-text token, but the tokenizer of "
                f"{tokenizer.name_or_path!r} has none. Set eos_token in its tokenizer_config.json."
            )

    def encode(self, row: Row) -> list[Example]:
        """Tokenize one text; its first and last special tokens are not doubled."""
        text = self.field(row, self.arguments.text_field)
        if not isinstance(text, str | None):
            raise RowError(
                "not a text",
                f"task 'text' needs strings in field {self.arguments.text_field!r}, got {text!r}. "
                "Is text_field right?",
            )
        if not text:
            raise NothingToLearn("empty", "there is no text in it.")
        input_ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        begin, end = self.tokenizer.bos_token_id, self.end_token
        if input_ids[:2] == [begin, begin]:  # in the text, and added by the tokenizer
            del input_ids[0]
        while input_ids[-2:] == [end, end]:
            del input_ids[-1]
        if input_ids[-1] != end:
            input_ids.append(end)
        return [self.example(input_ids, list(input_ids))]
