"""A conversation as token ids, with the loss on what the assistant says.

Two ways lead to the assistant's tokens, and both are exact or raise:

- the template marks them itself with `{% generation %}` ... `{% endgeneration %}`;
- otherwise the conversation is rendered up to each assistant turn and up to its end. Each of these
  texts must begin the text of the whole, so their lengths say where the turn lies; a token that
  reaches across such a border is refused.
"""

import copy
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token outside the loss: the default `ignore_index` of torch

Message = dict[str, Any]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class ConversationEncoder:
    """Renders conversations with a tokenizer's chat template and labels what is to be learned.

    Args:
        tokenizer: A fast one, with a chat template. It is copied, not kept.
        assistant_only: Learn only the assistant turns, each with its end-of-turn token.
            Otherwise learn every token.

    Raises:
        ValueError: There is no chat template, or the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, assistant_only: bool) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"task 'chat' needs a chat template, but the tokenizer of "
                f"{tokenizer.name_or_path!r} has none. Set chat_template to a Jinja file, or use "
                "an instruction-tuned model's tokenizer."
            )
        if assistant_only and not tokenizer.is_fast:
            raise ValueError(
                "finding the assistant's tokens needs a fast tokenizer, which knows where each "
                f"token lies in the text; got {type(tokenizer).__name__}. Set assistant_only_loss "
                "to false, or use a model that comes with a tokenizer.json."
            )
        self.assistant_only = assistant_only
        self.marks_assistant = bool(_GENERATION_BLOCK.search(tokenizer.chat_template))
        self.tokenizer = tokenizer
        if assistant_only:
            # Many post-processors cut white space off a token's offsets, which then no longer say
            # where it begins. Their other work, adding special tokens, is the template's here.
            self.tokenizer = copy.deepcopy(tokenizer)
            self.tokenizer.backend_tokenizer.post_processor = None

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Return tokens and labels of one conversation.

        Args:
            messages: Turns with `role` and `content` (or ShareGPT's `from` and `value`), in order.
            max_length: Where the caller will cut. Turns that begin later are not looked for, which
                saves most of the time in long conversations; their labels are `IGNORED`.

        Returns:
            input_ids: The rendered conversation, not cut.
            labels: Same length: the token itself where it is learned, `IGNORED` elsewhere.

        Raises:
            ValueError: A turn lacks its fields, the template refuses the conversation, or the
                assistant turns cannot be told from the rest.
        """
        turns = [_as_turn(message) for message in messages]
        if not turns:
            return [], []
        if not self.assistant_only:
            text = self._render(turns)
            input_ids = list(
                self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            )
            return input_ids, list(input_ids)

        if self.marks_assistant:
            input_ids, learned = self._turns_from_template(turns)
        else:
            input_ids, learned = self._turns_from_prefixes(turns, max_length)
        labels = [
            token if is_learned else IGNORED
            for token, is_learned in zip(input_ids, learned, strict=True)
        ]
        return input_ids, labels

    def _turns_from_template(self, turns: list[Message]) -> tuple[list[int], list[bool]]:
        """Take the assistant tokens from the template's `{% generation %}` blocks."""
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError as error:
            raise _template_refusal(turns, error) from error
        return list(encoded["input_ids"]), [bool(mask) for mask in encoded["assistant_masks"]]

    def _turns_from_prefixes(
        self, turns: list[Message], max_length: int | None
    ) -> tuple[list[int], list[bool]]:
        """Find each assistant turn between the text before it and the text that ends with it."""
        text = self._render(turns)
        encoded: Any = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        input_ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        learned = [False] * len(input_ids)
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            if index == 0:
                raise ValueError(
                    "a conversation must not begin with an assistant turn: nothing asks for it, so "
                    "the template cannot tell where it starts. Drop the turn or put a user or "
                    f"system turn before it. It says {_excerpt(turn)}."
                )
            prompt = self._render(turns[:index], add_generation_prompt=True)
            answered = self._render(turns[: index + 1])
            if not text.startswith(answered) or not answered.startswith(prompt):
                raise ValueError(
                    "the chat template renders an assistant turn differently when others follow, "
                    "so its tokens cannot be told from the rest. Use a template with "
                    "{% generation %}, or set assistant_only_loss to false. The turn says "
                    f"{_excerpt(turn)}."
                )
            start, stop = _token_at(len(prompt), offsets), _token_at(len(answered), offsets)
            if start is None or stop is None:
                raise ValueError(
                    "the first or last characters of an assistant turn share a token with what the "
                    "chat template writes around it, so generation would see other tokens than "
                    "training. Strip white space from the messages, use a template whose prompt "
                    "does not end in a space, or set assistant_only_loss to false. The turn says "
                    f"{_excerpt(turn)}."
                )
            end = self._end_of_turn(input_ids, start, stop)
            learned[start:end] = [True] * (end - start)
            if max_length is not None and stop >= max_length:
                break
        return input_ids, learned

    def _end_of_turn(self, input_ids: list[int], start: int, stop: int) -> int:
        """Return where the turn in `input_ids[start:stop]` ends, its end-of-turn token included.

        White space after a special token separates turns (ChatML writes a line break); generation
        stops before it, so it is not learned. Without a special token, white space may itself be
        the end of the turn.
        """
        end = stop
        while end > start and str(self.tokenizer.decode([input_ids[end - 1]])).isspace():
            end -= 1
        ends_with_special = end > start and input_ids[end - 1] in self.tokenizer.all_special_ids
        return end if ends_with_special else stop

    def _render(self, turns: list[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise _template_refusal(turns, error) from error
        return str(text)


def _as_turn(message: Mapping[str, Any]) -> Message:
    """Return `role`, `content` and what else is set; `datasets` fills absent fields with None."""
    if not isinstance(message, Mapping):
        raise ValueError(
            "a conversation must be a list of messages with `role` and `content`, got "
            f"{type(message).__name__} in the place of a message. Is messages_field right?"
        )
    turn = {name: value for name, value in message.items() if value is not None}
    if "from" in turn and "value" in turn:
        speaker = turn.pop("from")
        turn |= {"role": _SHAREGPT_ROLES.get(speaker, speaker), "content": turn.pop("value")}
    if "role" not in turn or "content" not in turn:
        raise ValueError(
            "each message needs `role` and `content` (or ShareGPT's `from` and `value`), got one "
            f"with the fields {sorted(turn)}: {_excerpt(turn)}."
        )
    return turn


def _token_at(character: int, offsets: Sequence[tuple[int, int]]) -> int | None:
    """Return the index of the token that begins at `character`, None if one reaches across it."""
    index = bisect_right(offsets, character, key=lambda offset: offset[1])
    reaches_across = index < len(offsets) and offsets[index][0] < character
    return None if reaches_across else index


def _template_refusal(turns: list[Message], error: TemplateError) -> ValueError:
    roles = ", ".join(turn["role"] for turn in turns[:6])
    return ValueError(
        f"the chat template refused a conversation with the roles {roles}"
        f"{', ...' if len(turns) > 6 else ''}: {error}. Change the data, or set chat_template to "
        f"one that takes them. The conversation begins {_excerpt(turns[0])}."
    )


def _excerpt(turn: Message) -> str:
    text = str(turn.get("content", turn))
    return repr(text if len(text) <= 60 else text[:57] + "...")
