"""All notations of a conversation are read alike, and unknown parts are refused by name."""

import json

import pytest

from qft_hf.hf.finetune.conversation import read_conversation
from qft_hf.hf.finetune.task import RowError
from tests.finetune.chats import chat

ASKED = chat("hi", "hello")
SYSTEM = chat("hi", "hello", system="Be brief.")
CALL = {"name": "weather", "arguments": {"city": "Oslo", "zone": None}}
TOOL_USE = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
CALL_TEXT = '{"name": "weather", "arguments": {"city": "Oslo", "zone": null}}'


def said(*turns):
    return [{"from": speaker, "value": text} for speaker, text in turns]


def read(row, **fields):
    return read_conversation(row, **fields)


def called(**changes):
    return {"messages": [TOOL_USE[0], {"role": "assistant"} | changes, *TOOL_USE[2:]]}


@pytest.mark.parametrize(
    ("row", "turns"),
    {
        "messages": ({"messages": SYSTEM}, SYSTEM),
        "absent fields": ({"messages": [t | {"tool_calls": None} for t in SYSTEM]}, SYSTEM),
        "ShareGPT": (
            {"conversations": said(("system", "Be brief."), ("human", "hi"), ("gpt", "hello"))},
            SYSTEM,
        ),
        "one conversation": ({"conversation": ASKED, "text": "-"}, ASKED),
        "fields of other rows": (
            {"messages": None, "prompt": "hi", "completion": "hello", "query": None},
            ASKED,
        ),
        "messages of other rows": ({"messages": None, "conversation": ASKED}, ASKED),
        "a pair of other rows": (
            {"prompt": "hi", "completion": "hello", "question": "-", "answer": None},
            ASKED,
        ),
        "messages without a value": ({"messages": None, "prompt": None}, []),
        "a question without an answer": ({"prompt": "hi", "completion": None}, ASKED[:1]),
        "prompt and completion": ({"prompt": "hi", "completion": "hello", "id": 7}, ASKED),
        "turns as prompt": ({"prompt": SYSTEM[:2], "completion": SYSTEM[2:]}, SYSTEM),
        "alpaca": (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            chat("Add.\n\n1 2", "3"),
        ),
        "alpaca without input": ({"instruction": "hi", "input": "", "output": "hello"}, ASKED),
        "dolly": (
            {"instruction": "Add.", "context": "1 2", "response": "3"},
            chat("Add.\n\n1 2", "3"),
        ),
        "question and answer": ({"question": "hi", "answer": "hello", "prompt": "-"}, ASKED),
        "system beside messages": ({"messages": ASKED, "system": "Be brief."}, SYSTEM),
        "one system prompt twice": ({"messages": SYSTEM, "system_prompt": "Be brief."}, SYSTEM),
        "OpenOrca": (
            {"id": "t0.1", "system_prompt": "Be brief.", "question": "hi", "response": "hello"},
            SYSTEM,
        ),
        "NuminaMath": ({"source": "aops", "problem": "hi", "solution": "hello"}, ASKED),
        "the same with messages": (
            {"source": "-", "problem": "-", "solution": "-", "messages": ASKED},
            ASKED,
        ),
        "parts": (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "h"}, "i"]},
                    ASKED[1],
                ]
            },
            ASKED,
        ),
        "system beside columns": (
            {"query": "hi", "response": "hello", "system": "Be brief."},
            SYSTEM,
        ),
    }.values(),
    ids=str,
)
def test_every_way_to_write_it_is_the_same_conversation(row, turns):
    conversation = read(row)

    assert conversation.turns == turns
    assert conversation.tools is None


def test_named_columns_are_read_and_no_others():
    row = {"q": "hi", "a": "hello", "prompt": "x", "completion": "y", "messages": SYSTEM}
    assert read(row, prompt_field="q", answer_field="a").turns == ASKED


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (["user", "human", "User", " HUMAN "], "user"),
        (["assistant", "gpt", "chatgpt", "bing", "model", "bot", "Assistant"], "assistant"),
        (["system", "System", "developer"], "system"),
        (["tool", "observation", "function"], "tool"),
    ],
)
def test_roles_by_the_names_that_people_give_them(names, role):
    for name in names:
        for message in ({"role": name, "content": "x"}, {"from": name, "value": "x"}):
            assert read({"messages": [message]}).turns == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    "row",
    {
        "content is null": called(content=None, tool_calls=TOOL_USE[1]["tool_calls"]),
        "no content": called(tool_calls=TOOL_USE[1]["tool_calls"]),
        "arguments as text": called(
            tool_calls=[{"function": CALL | {"arguments": '{"city": "Oslo", "zone": null}'}}]
        ),
        "bare call": called(tool_calls=[CALL]),
        "calls as text": called(tool_calls=f"[{CALL_TEXT}]"),
        "function_call": called(content=None, function_call=CALL),
        "ShareGPT": {
            "messages": said(
                ("human", "hi"),
                ("function_call", CALL_TEXT),
                ("observation", "rain"),
                ("gpt", "It rains."),
            )
        },
    }.values(),
    ids=str,
)
def test_tool_calls_have_one_form_and_keep_what_is_null(row):
    assert read(row).turns == TOOL_USE


@pytest.mark.parametrize("tools", ['[{"name": "weather"}]', [{"name": "weather"}]], ids=str)
def test_tools_are_a_list_or_its_text(tools):
    assert read({"messages": ASKED, "tools": tools}).tools == [{"name": "weather"}]
    for nothing in ("[]", "", None):
        assert read({"messages": ASKED, "tools": nothing}).tools is None


@pytest.mark.parametrize(
    ("marks", "row_marks", "learned"),
    [
        ([{}, {}], {}, [True, True]),
        ([{"weight": 0}, {"weight": 1}], {}, [False, True]),
        ([{"train": True}, {"train": False}], {}, [True, False]),
        ([{"weight": 1.0}, {"weight": None}], {}, [True, True]),
        ([{}, {"weight": 1}], {"weight": 0}, [False, False]),
        ([{}, {}], {"weight": "0", "train": "True"}, [False, False]),  # as in csv
        ([{"training": False}, {"training": True}], {}, [False, True]),  # Axolotl's
        ([{"loss": True}, {"loss": False}], {"loss": 2.5}, [True, False]),  # ms-swift's
        ([{"train_detail": []}, {}], {}, [True, True]),
    ],
    ids=str,
)
def test_weight_and_train_say_what_is_learned(marks, row_marks, learned):
    turns = chat("a", "b", "c", "d")
    messages = [turns[0], turns[1] | marks[0], turns[2], turns[3] | marks[1]]

    conversation = read({"messages": messages} | row_marks)

    assert conversation.learned[1::2] == learned
    assert conversation.is_masked is not all(learned)
    assert conversation.turns == turns  # templates do not see the marks


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_messages_may_be_a_text_as_in_csv(name):
    """A CSV column holds only text, and a list written as text was once refused."""
    turns = chat("a", 'b, "c"\n', "d", "e")
    assert read({name: " " + json.dumps(turns)}) == read({name: turns})
    assert read({"prompt": json.dumps(turns[:1]), "completion": "b"}).turns[0]["content"] == (
        json.dumps(turns[:1])  # a prompt is read as text
    )


def test_fields_without_a_value_change_nothing():
    turns = [ASKED[0] | {"images": [], "from": None, "value": None}, *ASKED[1:]]
    row = {"messages": turns, "images": [None], "videos": [], "documents": None}
    assert read(row).turns[1:] == ASKED[1:]


@pytest.mark.parametrize("name", ["context", "documents", "image"])
def test_what_is_refused_beside_a_prompt_may_be_the_prompt_itself(name):
    row = {name: "a", "response": "b"}
    assert read(row, prompt_field=name, answer_field="response").turns == chat("a", "b")


def test_a_prompt_of_turns_is_given_not_learned():
    turns = chat("a", "b", "c", "d")
    assert read({"prompt": turns[:3], "completion": turns[3:]}).learned == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ({"messages": [{"from": "critic", "value": "x"}]}, "unknown role 'critic'"),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        ({"messages": [{"role": "user"}]}, "message without content"),
        ({"messages": [{"role": "user", "content": None}]}, "message without content"),
        ({"messages": "user: hi"}, "not a list of messages"),
        ({"messages": [["hi"]]}, "not a list of messages"),
        ({"messages": "[{'role': 'user'}]"}, r"invalid JSON in field 'messages': .* with .\["),
        ({"messages": '[{"role": "user", "role": "bot"}]'}, "a field twice: 'role' occurs more"),
        ({"messages": '[{"role": "user", "content": "\\ud83d"}]'}, "half a character: .*emoji"),
        ({"messages": [{"role": "user", "content": 5}]}, "content is not text: got 5. Write"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content is not text"),
        ({"question": "2 + 2", "answer": 4}, "not a text: 'answer' must be .* messages, got 4"),
        ({"question": float("nan"), "answer": "x"}, "not a text: 'question' must be"),
        ({"messages": SYSTEM, "system": "Be long."}, "two system prompts"),
        ({"messages": [ASKED[0], ASKED[1] | {"weight": 0.5}]}, "weight 0.5"),
        ({"messages": ASKED, "tools": "weather"}, "invalid JSON in tools"),
        ({"messages": ASKED, "tools": ["weather"]}, "tools are not a list of objects: write a lis"),
        ({"messages": ASKED, "tools": {"name": "weather"}}, "tools are not a list of objects"),
        (
            {"messages": [ASKED[0], ASKED[1] | {"train_detail": [{"begin_offset": 0}]}]},
            "train_detail: parts of a message cannot be masked",
        ),
        (called(tool_calls=[{"arguments": {}}]), "tool call without a name"),
        (
            called(tool_calls=[{"name": "f", "arguments": "{"}]),
            "invalid JSON in arguments of a tool call",
        ),
        (
            called(tool_calls=[{"name": "f", "arguments": "1"}]),
            "arguments of a tool call are not an obj",
        ),
        ({"text": "hi"}, "no field 'messages': .* 'text'.* conversation; plain text needs task"),
        ({"text": "hi", "label": 1}, "no field 'messages': .*; labeled texts need task classif"),
        ({"words": "hi"}, "no field 'messages': the fields are 'words'.* the conversation.$"),
        ({"messages": [], "conversations": []}, "both 'messages' and 'conversations': .* Set mess"),
        (
            {"prompt": "a", "response": "b", "question": "c", "answer": "d"},
            "more than one question",
        ),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "field 'history'"),
        ({"question": "a", "answer": "b", "context": "c"}, "field 'context': its place in 'quest"),
        ({"prompt": ASKED[:1], "completion": "b", "context": "c"}, "field 'context'"),
        ({"prompt": ASKED[:1], "response": "b", "history": [["c", "d"]]}, "field 'history'"),
        ({"instruction": ASKED[:1], "output": "b", "input": "c"}, "field 'input'"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "not a text: 'input' must be a text"),
        (
            {"messages": ASKED, "functions": [{"name": "f"}]},
            "field 'functions': write them as `tools`",
        ),
        (
            {"prompt": "a", "response": "b", "chat_template_kwargs": {"enable_thinking": False}},
            "field 'chat_template_kwargs': templates get no options of a row",
        ),
        ({"messages": ASKED, "images": ["cat.png"]}, "field 'images': only text is read. Rem"),
        ({"messages": [ASKED[0] | {"audio": {"id": "x"}}]}, "field 'audio': only text is read"),
        ({"question": "a", "answer": "b", "documents": ["c"]}, "field 'documents': templates get"),
        (
            {"messages": [{"from": "human", "value": "a", "role": "assistant"}]},
            r"a message in two forms: write either .* got \['from', 'role', 'value'\]",
        ),
        ({"question": "a", "answer": "b", "system": 5}, "not a text: 'system' must .* text, got 5"),
        (
            {"messages": [{"role": "user", "content": ["a", {"type": "image", "image": "b"}]}]},
            "content is not text: got {'type': 'image'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_has_a_reason(row, reason):
    with pytest.raises(RowError, match=reason) as error:
        read(row)
    assert reason.startswith(error.value.reason[:20])
