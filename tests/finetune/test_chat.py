"""The loss lies on exactly what the assistant says, its end-of-turn token included."""

import re
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from qft_hf.hf.finetune.chat import IGNORED, ConversationEncoder
from tests.finetune.chats import CHATML, CHATML_MARKED, CHATS, END, chat, tiny_tokenizer

VICUNA = Path(__file__).parents[2] / "configs" / "vicuna.jinja"

both_ways = pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["prefix", "marked"])
each_chat = pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)


def encode_conversation(messages, tokenizer, *, assistant_only, max_length=None):
    encoder = ConversationEncoder(tokenizer, assistant_only=assistant_only)
    return encoder.encode(messages, max_length=max_length)


def learned_text(tokenizer, input_ids, labels):
    """What is learned, after checking that a label is its own token or ignored."""
    assert len(input_ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(input_ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORED])


@both_ways
@each_chat
def test_exactly_the_assistant_turns_are_learned(messages, template):
    tokenizer = tiny_tokenizer(template)

    input_ids, labels = encode_conversation(messages, tokenizer, assistant_only=True)

    spoken = [turn["content"] + END for turn in messages if turn["role"] == "assistant"]
    assert learned_text(tokenizer, input_ids, labels) == "".join(spoken)
    assert tokenizer.decode(input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    # Nothing before the first answer: the same words of a user are not taken for the assistant's.
    prompt = tokenizer.apply_chat_template(
        messages[: [turn["role"] for turn in messages].index("assistant")],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert input_ids[: len(prompt)] == prompt
    assert set(labels[: len(prompt)]) == {IGNORED}
    assert labels[len(prompt)] != IGNORED


@each_chat
def test_both_ways_agree(messages):
    results = [
        encode_conversation(messages, tiny_tokenizer(template), assistant_only=True)
        for template in (CHATML, CHATML_MARKED)
    ]
    assert results[0] == results[1]


@each_chat
def test_every_token_is_learned_when_asked_for(messages):
    input_ids, labels = encode_conversation(messages, tiny_tokenizer(), assistant_only=False)

    assert labels == input_ids
    assert labels is not input_ids


@pytest.mark.parametrize("max_length", [1, 20, 30, 31, 32, 100, 150, 500])
def test_a_limit_changes_no_label_before_it(max_length):
    messages, tokenizer = chat(*["how are you", "fine"] * 5), tiny_tokenizer()

    input_ids, labels = encode_conversation(
        messages, tokenizer, assistant_only=True, max_length=max_length
    )

    whole_ids, whole_labels = encode_conversation(messages, tokenizer, assistant_only=True)
    assert input_ids == whole_ids
    assert labels[:max_length] == whole_labels[:max_length]


def test_white_space_that_ends_a_turn_is_learned():
    """Without a special token the line break is all that tells generation to stop."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)

    input_ids, labels = encode_conversation(chat("hi", "fine"), tokenizer, assistant_only=True)

    assert learned_text(tokenizer, input_ids, labels) == " fine\n"


def test_vicuna_template_learns_answers_with_their_end():
    tokenizer = tiny_tokenizer(VICUNA.read_text())
    messages = chat("hi", "hello", "and you?", "fine")

    input_ids, labels = encode_conversation(messages, tokenizer, assistant_only=True)

    assert learned_text(tokenizer, input_ids, labels) == f" hello{END} fine{END}"
    assert tokenizer.decode(input_ids).endswith(
        f"questions. USER: hi ASSISTANT: hello{END} USER: and you? ASSISTANT: fine{END}"
    )


def test_sharegpt_and_absent_fields_are_the_same_conversation():
    tokenizer = tiny_tokenizer()
    expected = encode_conversation(
        chat("hi", "hello", system="Be brief."), tokenizer, assistant_only=True
    )
    sharegpt = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
    ]
    padded = [turn | {"tool_calls": None} for turn in chat("hi", "hello", system="Be brief.")]

    assert encode_conversation(sharegpt, tokenizer, assistant_only=True) == expected
    assert encode_conversation(padded, tokenizer, assistant_only=True) == expected


def test_no_messages_give_no_tokens():
    assert encode_conversation([], tiny_tokenizer(), assistant_only=True) == ([], [])


def test_missing_template_is_refused():
    with pytest.raises(ValueError, match="Set chat_template to a Jinja file"):
        encode_conversation(chat("a", "b"), tiny_tokenizer(None), assistant_only=True)


@pytest.mark.parametrize(
    "message", [{"role": "user"}, {"text": "hi"}, {"role": "user", "content": None}], ids=str
)
def test_message_without_its_fields_is_refused(message):
    with pytest.raises(ValueError, match=r"needs `role` and `content` .* got one with the fields"):
        encode_conversation([message], tiny_tokenizer(), assistant_only=True)


@pytest.mark.parametrize("messages", ["user: hi", [["hi"]]], ids=str)
def test_what_is_no_list_of_messages_is_refused(messages):
    with pytest.raises(ValueError, match=r"must be a list of messages .* Is messages_field right"):
        encode_conversation(messages, tiny_tokenizer(), assistant_only=True)


def test_assistant_first_is_refused():
    with pytest.raises(ValueError, match=r"Drop the turn or put a user or system turn .*'hello'"):
        encode_conversation(
            [{"role": "assistant", "content": "hello"}], tiny_tokenizer(), assistant_only=True
        )


def test_template_that_rewrites_history_is_refused():
    """Some templates drop the reasoning of every answer but the last one."""
    template = CHATML.replace("message['content']", "(message['content'] if loop.last else '...')")
    with pytest.raises(ValueError, match="differently when others follow"):
        encode_conversation(chat("a", "b", "c", "d"), tiny_tokenizer(template), assistant_only=True)


TWO_LINES = CHATML.replace("assistant\n'", "assistant\n\n'").replace("\n' + m", "\n\n' + m")
ENDS_IN_A_SPACE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "contents"),
    [
        (TWO_LINES, ["what?", "\nx"]),
        (TWO_LINES, ["what?", "x", "and?", "\nx"]),
        (ENDS_IN_A_SPACE, ["what?", "the answer"]),
    ],
    ids=["line break", "line break in a later turn", "space"],
)
def test_answer_that_shares_a_token_with_the_prompt_is_refused(template, contents):
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens(["\n\n\n"])
    with pytest.raises(ValueError, match=r"Strip white space .* The turn says '(\\nx|the answer)'"):
        encode_conversation(chat(*contents), tokenizer, assistant_only=True)


def test_conversation_that_the_template_refuses_is_named():
    check = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    for refusing in (check + CHATML, check + CHATML_MARKED):
        with pytest.raises(ValueError, match=r"roles system, user.*user first.* begins 'Be brief"):
            encode_conversation(
                chat("a", "b", system="Be brief."), tiny_tokenizer(refusing), assistant_only=True
            )


def test_slow_tokenizer_is_refused():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=re.escape("got ByT5Tokenizer. Set assistant_only_loss")):
        encode_conversation(chat("a", "b"), tokenizer, assistant_only=True)
