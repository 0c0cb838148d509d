"""Conversations as token ids, with the loss on the assistant's turns.

The conversation is rendered up to the end of each assistant turn. The assistant's characters, and
then their tokens, are found in this text in one of two ways. Both are exact or raise:

- The template marks them with `{% generation %}` ... `{% endgeneration %}`.
- Otherwise the conversation is rendered up to the start of the turn, too. The shorter text must be
  a prefix of the longer one, so their lengths give the position of the turn.

Answers share an example as long as the text of each begins with that of the one before. If a
template rewrites earlier turns (Qwen3 drops their reasoning), an answer that is rewritten later
becomes an example of its own that ends with this answer: the model is trained on the prompt that it
sees, and the answer that it writes, during generation.

A conversation in which a token spans the boundary of a turn is refused.
"""

import copy
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ...nn.loss import IGNORED
from ..shipped import shipped_names
from .arguments import DataArguments
from .conversation import Conversation, Turn, excerpt, read_conversation
from .task import Example, LanguageTask, NothingToLearn, Row, RowError

logger = logging.getLogger(__name__)

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TEMPLATE_FAULTS = (  # errors that rendering a template can raise
    TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip
_REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a turn
_GREETING = Conversation(
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    learned=[True, True],
    tools=None,
)


class Chat(LanguageTask):
    """Learns the assistant's turns of a conversation, or the whole conversation."""

    def __init__(self, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(arguments, tokenizer)
        self.encoder = ConversationEncoder(tokenizer, assistant_only=arguments.assistant_only_loss)
        self.end_token = self.encoder.end_of_turn()

    def encode(self, row: Row) -> list[Example]:
        """Return one example, or several if the template rewrites earlier turns."""
        conversation = read_conversation(
            row,
            messages_field=self.arguments.messages_field,
            prompt_field=self.arguments.prompt_field,
            answer_field=self.arguments.answer_field,
        )
        examples = self.encoder.encode(conversation, max_length=self.max_length)
        return [self.example(*example) for example in examples]


@dataclass(slots=True)
class _Rendered:
    """A rendered text, and the positions of the learned answers in it."""

    text: str
    end: int  # of the last answer; what follows it is not learned
    answers: list[tuple[Turn, int, int]] = field(default_factory=list)  # each: turn, begin, end


class ConversationEncoder:
    """Renders conversations with a tokenizer's chat template and labels the tokens to learn.

    Args:
        tokenizer: Has a chat template, and is a fast one if `assistant_only`. It is not changed.
        assistant_only: Learn only the assistant turns, each with its end-of-turn token.
            Otherwise learn every token.

    Raises:
        ValueError: There is no chat template, or a fast tokenizer is needed and this is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, assistant_only: bool) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"task 'chat' needs a chat template, but the tokenizer of "
                f"{tokenizer.name_or_path!r} has none. Set chat_template to a Jinja file or to one "
                f"that ships ({', '.join(shipped_names('.jinja'))}), or use "
                "an instruction-tuned model's tokenizer."
            )
        if assistant_only and not tokenizer.is_fast:
            raise ValueError(
                "finding the assistant's tokens needs a fast tokenizer, which knows where each "
                f"token is in the text; got {type(tokenizer).__name__}. Set assistant_only_loss "
                "to false, or use a model that comes with a tokenizer.json."
            )
        self.assistant_only = assistant_only
        self.marks_assistant = bool(_GENERATION_BLOCK.search(tokenizer.get_chat_template()))
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special_ids = {token for token, added_token in added.items() if added_token.special}
        self.special_ids.update(tokenizer.all_special_ids)
        if assistant_only:
            # Many post-processors trim white space from a token's offsets, which then no longer
            # give its start. Their other task, adding special tokens, is done by the template.
            self.tokenizer = copy.deepcopy(tokenizer)
            self.tokenizer.backend_tokenizer.post_processor = None
            if not self.marks_assistant:
                self._use_training_template()

    def end_of_turn(self) -> int | None:
        """Return the special token that ends an answer, None if an answer ends in text."""
        try:
            ((_, labels),) = self.encode(_GREETING)
        except RowError:  # the template may accept the data; otherwise each row is refused
            return None
        learned = [label for label in labels if label != IGNORED]
        while learned and str(self.tokenizer.decode(learned[-1:])).isspace():
            learned.pop()
        return learned[-1] if learned and learned[-1] in self.special_ids else None

    def _use_training_template(self) -> None:
        """Use TRL's marked version of the template if the prefixes do not locate its answers."""
        try:
            self.encode(_GREETING)
        except RowError as refusal:
            try:
                from trl.chat_template_utils import get_training_chat_template

                self.tokenizer.chat_template = get_training_chat_template(self.tokenizer)
            except (ImportError, *_TEMPLATE_FAULTS):
                return  # the first row is refused with the reason
            self.marks_assistant = True
            logger.warning("TRL's training template is used instead of the model's: %s", refusal)

    def encode(
        self, conversation: Conversation, *, max_length: int | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Return tokens and labels of a conversation.

        Args:
            conversation: Turns in order.
            max_length: Number of tokens that the caller keeps. Later turns are not searched for,
                which saves most of the time in long conversations; their labels are `IGNORED`.

        Returns:
            One pair, or several if the template rewrites earlier turns:
            input_ids: Tokens of the rendered conversation, not cut.
            labels: Same length; the token id if the token is learned, otherwise `IGNORED`.

        Raises:
            RowError: The template refuses the conversation or leaves out a part of it, or the
                assistant turns cannot be located.
        """
        if not conversation.turns:
            raise NothingToLearn("empty", "there are no messages.")
        self._require_shown(conversation)
        if not self.assistant_only:
            if conversation.is_masked:
                raise RowError(
                    "weight or train with assistant_only_loss=false",
                    "this setting learns every token. Set assistant_only_loss to true.",
                )
            input_ids, _ = self._tokenize(self._render(conversation))
            return [(input_ids, list(input_ids))]
        return [self._locate(example) for example in self._render_answers(conversation, max_length)]

    def _render_answers(
        self, conversation: Conversation, max_length: int | None
    ) -> list[_Rendered]:
        """Render each answer as the last one, and join those that later turns leave as they are."""
        find = self._answer_by_mark if self.marks_assistant else self._answer_by_prompt
        whole = self._render(conversation)
        limit = len(whole)
        if max_length is not None and max_length < len(ends := self._tokenize(whole)[1]):
            limit = ends[max_length][1]
        rendered = [_Rendered("", end=0)]
        for index in _answers(conversation):
            text, begin, end = find(conversation, index)
            if text.startswith(rendered[-1].text[: rendered[-1].end]):
                rendered[-1].text, rendered[-1].end = text, end
            else:
                self._require_same_prompt(conversation, index, text[:begin])
                rendered.append(_Rendered(text, end))
            if conversation.learned[index]:
                rendered[-1].answers.append((conversation.turns[index], begin, end))
            if whole.startswith(text[:end]) and end >= limit:
                break
        if whole.startswith(rendered[-1].text[: rendered[-1].end]):
            rendered[-1].text = whole
        return [example for example in rendered if example.answers] or rendered[-1:]

    def _answer_by_mark(self, conversation: Conversation, index: int) -> tuple[str, int, int]:
        """Return the text that ends with an answer, and its `{% generation %}` block in it."""
        turns = conversation.turns[: index + 1]
        with _refusals(turns):
            rendered: Any = render_jinja_template(
                [turns],
                tools=conversation.tools,
                chat_template=self.tokenizer.get_chat_template(tools=conversation.tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,  # type: ignore[arg-type]
            )
        (text,), (blocks,) = rendered
        n_answers = sum(turn["role"] == "assistant" for turn in turns)
        if len(blocks) != n_answers:
            raise RowError(
                f"the chat template marks {len(blocks)} answers of {n_answers}",
                "it marks turns of other roles, too, or leaves out some of the assistant's. "
                "Use another chat_template.",
            )
        return text, *blocks[-1]

    def _answer_by_prompt(self, conversation: Conversation, index: int) -> tuple[str, int, int]:
        """Return the text that ends with an answer, and where the answer begins and ends in it."""
        turn = conversation.turns[index]
        if index == 0:
            raise RowError(
                "begins with the assistant",
                "no turn comes before it, so the template does not show where it starts. Drop "
                f"the turn or put a user or system turn before it. It says {excerpt(turn)}.",
            )
        prompt = self._render(conversation, n_turns=index, add_generation_prompt=True)
        text = self._render(conversation, n_turns=index + 1)
        if not text.startswith(prompt):
            raise RowError(
                "the chat template renders a prompt differently once its answer is added",
                "the answer's tokens cannot be located. Use a template with {% generation "
                f"%}}, or set assistant_only_loss to false. The turn says {excerpt(turn)}.",
            )
        return text, len(prompt), len(text)

    def _require_same_prompt(self, conversation: Conversation, index: int, before: str) -> None:
        """Raise `RowError` if generation would see another text than the one before an answer."""
        prompt = self._render(conversation, n_turns=index, add_generation_prompt=True)
        # A mark may begin before or after the words that a generation prompt ends with.
        if not (prompt.startswith(before) or before.startswith(prompt)):
            raise RowError(
                "the chat template renders a prompt differently once its answer is added",
                "the model would learn from another prompt than it sees. Use another chat_template,"
                " or remove from the data what it leaves out in earlier turns. The turn says "
                f"{excerpt(conversation.turns[index])}.",
            )

    def _locate(self, example: _Rendered) -> tuple[list[int], list[int]]:
        """Return the tokens and labels of a text; only its answers are learned."""
        input_ids, offsets = self._tokenize(example.text)
        labels = [IGNORED] * len(input_ids)
        for turn, first, last in example.answers:
            start, stop = _token_at(first, offsets), _token_at(last, offsets)
            if start is None or stop is None:
                raise RowError(
                    "an answer shares a token with the chat template",
                    "generation would see other tokens than training. Strip white space from the "
                    "messages, use a template whose prompt does not end in a space, or set "
                    f"assistant_only_loss to false. The turn says {excerpt(turn)}.",
                )
            end = self._end_of_turn(input_ids, start, stop)
            labels[start:end] = input_ids[start:end]
        return input_ids, labels

    def _end_of_turn(self, input_ids: list[int], start: int, stop: int) -> int:
        """Return the end of the turn in `input_ids[start:stop]`, after its end-of-turn token.

        White space after a special token separates turns (ChatML writes a line break); generation
        stops before it, so it is not learned. Without a special token, white space may itself be
        the end of the turn.
        """
        end = stop
        while end > start and str(self.tokenizer.decode([input_ids[end - 1]])).isspace():
            end -= 1
        return end if end > start and input_ids[end - 1] in self.special_ids else stop

    def _require_shown(self, conversation: Conversation) -> None:
        """Raise `RowError` if the template leaves out a part of the conversation.

        A part is left out if the rendered text stays the same when the part is changed; contents
        that the text has in their order need no such test. If each answer is rendered as the last
        one, the texts up to that answer are compared.
        """
        turns, text = conversation.turns, self._render(conversation)
        others: list[tuple[str, Conversation, int | None]] = []
        if conversation.tools:
            others.append(("tools", replace(conversation, tools=None), None))
        all_are_found = _in_order([turn["content"].strip() for turn in turns], text)
        for index, turn in enumerate(turns):
            content, calls = turn["content"], turn.get("tool_calls", [])
            changed: list[tuple[str, Turn]] = []
            if content.strip() and not all_are_found:
                changed.append((f"{turn['role']} turns", {"content": f"{content}?"}))
            thoughts, end, answer = content.partition("</think>")
            if end and thoughts.replace("<think>", "").strip() and not all_are_found:
                changed.append(("reasoning", {"content": f"{thoughts}?{end}{answer}"}))
            for said in {str(turn.get(name, "")) for name in _REASONING}:
                if said.strip():  # several names of the same thoughts are changed together
                    names = [name for name in _REASONING if str(turn.get(name, "")) == said]
                    changed.append(("reasoning", dict.fromkeys(names, f"{said}?")))
            for number, call in enumerate(calls):
                function = call["function"] | {"name": f"{call['function']['name']}?"}
                renamed = [*calls[:number], call | {"function": function}, *calls[number + 1 :]]
                changed.append(("tool calls", {"tool_calls": renamed}))
            is_last = turn["role"] == "assistant" and self.assistant_only
            n_turns = index + 1 if is_last else None
            for what, part in changed:
                changed_turns = [*turns[:index], turn | part, *turns[index + 1 :]]
                others.append((what, replace(conversation, turns=changed_turns), n_turns))
        for what, other, n_turns in others:
            try:
                shown = text if n_turns is None else self._render(conversation, n_turns=n_turns)
                is_left_out = self._render(other, n_turns=n_turns) == shown
            except RowError:  # the template refuses the change, so it reads the part
                continue
            if is_left_out:
                or_else = ""
                if what == "reasoning" and not self.assistant_only:
                    or_else = "set assistant_only_loss to true if it shows those of a last answer, "
                raise RowError(
                    f"the chat template leaves out {what}",
                    f"the model would not see them. Use a chat_template that shows them, {or_else}"
                    "or remove them from the data.",
                )

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a text, and where a fast tokenizer found each."""
        encoded: Any = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )
        return list(encoded["input_ids"]), encoded.get("offset_mapping", [])

    def _render(
        self,
        conversation: Conversation,
        *,
        n_turns: int | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        turns = conversation.turns[:n_turns]
        with _refusals(turns):
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        return str(text)


@contextmanager
def _refusals(turns: list[Turn]) -> Iterator[None]:
    """Raise errors of a template as `RowError` about these turns, syntax errors as `ValueError`."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is not valid Jinja: {error.message}, line {error.lineno}. Correct "
            "it, or set chat_template to another one."
        ) from error
    except _TEMPLATE_FAULTS as error:
        roles = [turn["role"] for turn in turns]
        raise RowError(
            "the chat template refuses the conversation",
            f"{error}. Its roles are {', '.join(roles[:6])}{', ...' if roles[6:] else ''}. "
            "Change the data, or set chat_template to one that accepts them. The first turn says "
            f"{excerpt(turns[0])}.",
        ) from error


def _answers(conversation: Conversation) -> list[int]:
    return [i for i, turn in enumerate(conversation.turns) if turn["role"] == "assistant"]


def _in_order(parts: Sequence[str], text: str) -> bool:
    """Return whether a text has all parts, each after the one before it."""
    end = 0
    for part in parts:
        begin = text.find(part, end)
        if begin < 0:
            return False
        end = begin + len(part)
    return True


def _token_at(character: int, offsets: Sequence[tuple[int, int]]) -> int | None:
    """Return the index of the token that begins at `character`, None if a token spans it."""
    index = bisect_right(offsets, character, key=lambda offset: offset[1])
    reaches_across = index < len(offsets) and offsets[index][0] < character
    return None if reaches_across else index
