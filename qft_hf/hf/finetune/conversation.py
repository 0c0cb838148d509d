"""Reads the usual formats of conversations into one form: turns, tools, and which turns to learn.

The formats are lists of messages (`role` and `content`, or ShareGPT's `from` and `value`), and
columns with a question and its answer. Nothing is guessed: an unknown role or value is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .task import Row, RowError
from .text_rows import parsed

Turn = dict[str, Any]

ROLES = {
    **dict.fromkeys(["system", "developer"], "system"),
    **dict.fromkeys(["user", "human", "prompter"], "user"),
    **dict.fromkeys(["assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"], "assistant"),
    **dict.fromkeys(["tool", "observation", "function", "tool_response", "ipython"], "tool"),
    "function_call": "function_call",  # the assistant, with a tool call as the content
}
MESSAGES = ("messages", "conversations", "conversation")  # columns
SYSTEM = ("system", "system_prompt")  # columns
BESIDE_AN_INSTRUCTION = ("input", "context")  # columns of Alpaca and Dolly
QUESTION_AND_ANSWER = (  # columns
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
)
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # columns, or keys of a message
_REFUSED = {  # columns that would change the text, with what to write instead
    "functions": "write them as `tools`: a list of {'type': 'function', 'function': ...}",
    "documents": "templates get none. Write them into a message, and remove the field",
    **dict.fromkeys(_MEDIA, "only text is read. Remove the field, or the row if its text needs it"),
    "chat_template_kwargs": "templates get no options of a row; remove the field, or put what it "
    "does into the chat template",
}
_ROW_MARKS = ("weight", "train")  # columns
# Keys of a message, also of Axolotl (`training`) and ms-swift (`loss`).
_MESSAGE_MARKS = (*_ROW_MARKS, "training", "loss")
_FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1}  # CSV holds only text


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns with the roles system, user, assistant and tool."""

    turns: list[Turn]  # `role`, `content`, and other keys that a template may read
    learned: list[bool]  # for each turn: whether it is learned; used for assistant turns only
    tools: list[Any] | None  # JSON schemas
    is_masked: bool = False  # whether a mark in the data says that something is not learned


def read_conversation(
    row: Row,
    *,
    messages_field: str | None = None,
    prompt_field: str | None = None,
    answer_field: str | None = None,
) -> Conversation:
    """Read the conversation in a row.

    A field of `SYSTEM` becomes the first turn, and `tools` are the tools that the template shows.
    `weight` and `train`, in a message or in the row, and `training` and `loss` in a message, say
    whether assistant turns are learned. Turns of a prompt are not learned, because they are given.

    Args:
        row: Holds messages, or a question and an answer.
        messages_field: Field of the messages; None: one of `MESSAGES`.
        prompt_field: Field of the question, given together with `answer_field`; both None: a pair
            of `QUESTION_AND_ANSWER`.
        answer_field: Field of the answer.

    Raises:
        RowError: The row is not a conversation, or has an unknown role or value.
    """
    if prompt_field is not None and answer_field is not None:
        messages, n_given = _question_and_answer(row, prompt_field, answer_field)
    else:
        messages, n_given = _messages(row, messages_field)
    chosen = (messages_field, prompt_field, answer_field)
    rest = {name: value for name, value in row.items() if name not in chosen}
    for field, instead in _REFUSED.items():
        values = [holder.get(field) for holder in (rest, *(messages if field in _MEDIA else ()))]
        if any(any(value) if isinstance(value, list) else value for value in values):
            raise RowError(f"field {field!r}", f"{instead}.")
    learned = _is_learned(row, _ROW_MARKS)
    read = [_read_message(message) for message in messages]
    turns = [turn for turn, _ in read]
    marks = [learned and is_learned for _, is_learned in read]
    is_masked = not learned or not all(marks)
    marks[:n_given] = [False] * n_given
    for system in _texts(row, SYSTEM):
        if turns[:1] == [{"role": "system", "content": system}]:
            continue
        if turns and turns[0]["role"] == "system":
            raise RowError(
                "two system prompts",
                f"only one of the fields {', '.join(SYSTEM)} and the messages may have one.",
            )
        turns, marks = [{"role": "system", "content": system}, *turns], [False, *marks]
    return Conversation(turns, marks, _tools(row.get("tools")), is_masked)


def excerpt(turn: Any) -> str:
    """Return the beginning of a turn's content, for an error message."""
    text = str(turn.get("content", turn) if isinstance(turn, Mapping) else turn)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _messages(row: Row, messages_field: str | None) -> tuple[list[Any], int]:
    """Return the messages of a row, or its question and answer as messages.

    A field without a value is one that only other rows have, unless there is no field with one.

    Returns:
        messages: As they are in the row.
        n_given: How many of them, from the first, are a prompt.
    """
    names = MESSAGES if messages_field is None else (messages_field,)
    for present in ({name for name, value in row.items() if value is not None}, set(row)):
        found = [name for name in names if name in present]
        pairs = [pair for pair in QUESTION_AND_ANSWER if present.issuperset(pair)]
        if found or pairs:
            break
    fields = f"the fields are {', '.join(map(repr, row))}."
    if len(found) > 1:
        raise RowError(f"both {found[0]!r} and {found[1]!r}", f"{fields} Set messages_field.")
    if found:
        return _as_list(row[found[0]], f"field {found[0]!r}"), 0
    if len(pairs) == 1:
        return _question_and_answer(row, *pairs[0])
    if pairs:
        raise RowError(
            "more than one question or answer", f"{fields} Set prompt_field and answer_field."
        )
    other = (
        "labeled texts need task classification" if "label" in row else "plain text needs task text"
    )
    raise RowError(
        f"no field {names[0]!r}",
        f"{fields} Set messages_field, or prompt_field and answer_field, to those that hold the "
        f"conversation{f'; {other}' if 'text' in row else ''}.",
    )


def _question_and_answer(row: Row, prompt_field: str, answer_field: str) -> tuple[list[Any], int]:
    """Return messages, and how many of them are the prompt."""
    for field in (prompt_field, answer_field):
        if field not in row:
            raise RowError(f"no field {field!r}", f"the fields are {', '.join(map(repr, row))}.")
    prompt, answer = row[prompt_field], row[answer_field]
    for field, value in ((prompt_field, prompt), (answer_field, answer)):
        if not isinstance(value, str | list | None):
            raise RowError("not a text", f"{field!r} must be a text or messages, got {value!r}.")
    beside = BESIDE_AN_INSTRUCTION if prompt_field == "instruction" else ()
    read = {prompt_field, answer_field, *(() if isinstance(prompt, list) else beside)}
    for field in ("history", "context", *beside):
        if row.get(field) and field not in read:
            raise RowError(
                f"field {field!r}",
                f"its place in {prompt_field!r} is not known. Write messages, or remove the field.",
            )
    if isinstance(prompt, str):
        prompt = "\n\n".join([prompt, *_texts(row, beside)])
        prompt = [{"role": "user", "content": prompt}]
    given = _as_list(prompt, prompt_field)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return [*given, *_as_list(answer, answer_field)], len(given)


def _texts(row: Row, fields: Sequence[str]) -> list[str]:
    """Return the texts of those fields that are present and not empty."""
    texts = [(field, row[field]) for field in fields if row.get(field)]
    for field, value in texts:
        if not isinstance(value, str):
            raise RowError("not a text", f"{field!r} must be a text, got {value!r}.")
    return [value for _, value in texts]


def _as_list(messages: Any, name: str) -> list[Any]:
    if messages is None:
        return []
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # a CSV cell
        messages = _from_json(messages, name)
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise RowError(
            "not a list of messages",
            f"{name} must be a list of messages with `role` and `content`, got "
            f"{excerpt(messages)}. Is messages_field right?",
        )
    return messages


def _read_message(message: Mapping[str, Any]) -> tuple[Turn, bool]:
    """Return a turn and whether it may be learned; a field that is None counts as absent."""
    turn = {name: value for name, value in message.items() if value is not None}
    learned = _is_learned(turn, _MESSAGE_MARKS)
    if turn.pop("train_detail", None):
        raise RowError(
            "train_detail", "parts of a message cannot be masked, only all of it: `train: false`."
        )
    turn = {name: value for name, value in turn.items() if name not in _MESSAGE_MARKS}
    if "from" in turn and "value" in turn:
        if "role" in turn or "content" in turn:
            raise RowError(
                "a message in two forms",
                f"write either `role` and `content` or `from` and `value`, got {sorted(turn)}.",
            )
        turn |= {"role": turn.pop("from"), "content": turn.pop("value")}
    role = turn.get("role")
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        known = ", ".join(ROLES)
        raise RowError(f"unknown role {role!r}", f"expected one of {known} in {excerpt(turn)}.")
    turn["role"] = ROLES[role.strip().lower()]
    if turn["role"] == "function_call":
        turn |= {"role": "assistant", "tool_calls": turn.pop("content", None)}
    if call := turn.pop("function_call", None):
        turn["tool_calls"] = [call]
    if calls := turn.pop("tool_calls", None):
        turn["tool_calls"] = _tool_calls(calls)
        turn.setdefault("content", "")  # a turn with a call needs no text
    if "content" not in turn:
        raise RowError(
            "message without content",
            "each message needs `role` and `content` (or ShareGPT's `from` and `value`), got one "
            f"with the fields {sorted(turn)}.",
        )
    turn["content"] = _text_of_parts(turn["content"])
    return turn, learned


def _text_of_parts(content: Any) -> str:
    """Return a text, which may be given as a list of its parts."""
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        is_text = isinstance(part, Mapping) and str(part.get("type", "text")).endswith("text")
        text = part.get("text") if is_text else part
        if not isinstance(text, str):
            raise RowError("content is not text", f"got {str(part)[:60]}. Write it as a text.")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any) -> list[Any]:
    """Return calls in OpenAI's format, with arguments as objects: templates write them as JSON."""
    calls = _from_json(calls, "tool calls")
    named = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise RowError("tool call without a name", f"got {excerpt(call)}.")
        arguments = _from_json(function.get("arguments") or {}, "arguments of a tool call")
        if not isinstance(arguments, Mapping):
            raise RowError(
                "arguments of a tool call are not an object", f"got {excerpt(arguments)}."
            )
        rest = {"type": "function"} | (dict(call) if "function" in call else {})
        named.append({**rest, "function": {**function, "arguments": arguments}})
    return named


def _tools(value: Any) -> list[Any] | None:
    """Return the tools of a row, None if there are none."""
    tools = _from_json(value or None, "tools") or None
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise RowError(
            "tools are not a list of objects",
            f"write a list of JSON schemas, one for each tool, got {excerpt(tools)}.",
        )
    return tools


def _from_json(value: Any, what: str) -> Any:
    """Return a value, which is parsed if it is stored as JSON text."""
    return parsed(value, what) if isinstance(value, str) else value


def _is_learned(holder: Mapping[str, Any], marks: Sequence[str]) -> bool:
    """Return what the marks say; templates do not know these keys."""
    for name in marks:
        value = holder.get(name)
        value = _FLAGS.get(str(value).lower(), value)
        if value is not None and value not in (0, 1):
            raise RowError(
                f"{name} {value!r}", "expected 0 or false (masked), or 1 or true (learned)."
            )
        if value is not None and not value:
            return False
    return True
