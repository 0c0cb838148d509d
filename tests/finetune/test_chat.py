"""The loss covers exactly what the assistant says, including its end-of-turn token."""

import re
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import ByT5Tokenizer

from qft_hf.hf import shipped
from qft_hf.hf.finetune.chat import ConversationEncoder
from qft_hf.hf.finetune.conversation import read_conversation
from qft_hf.hf.finetune.task import NothingToLearn, RowError
from qft_hf.nn.loss import IGNORED
from tests.finetune.chats import (
    CHATML,
    CHATML_MARKED,
    CHATS,
    END,
    FORGETFUL,
    FORGETFUL_MARKED,
    TURN,
    chat,
    tiny_tokenizer,
)

both_ways = pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["prefix", "marked"])
each_chat = pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)


def encode_row(row, tokenizer, *, assistant_only=True, max_length=None):
    encoder = ConversationEncoder(tokenizer, assistant_only=assistant_only)
    conversation = read_conversation(row, messages_field="messages")
    return encoder.encode(conversation, max_length=max_length)


def encode_conversation(messages, tokenizer, **options):
    (example,) = encode_row({"messages": messages}, tokenizer, **options)
    return example


def learned_text(tokenizer, input_ids, labels):
    """Return the learned text, after checking that each label is its own token or ignored."""
    assert len(input_ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(input_ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORED])


@both_ways
@each_chat
def test_exactly_the_assistant_turns_are_learned(messages, template):
    tokenizer = tiny_tokenizer(template)

    input_ids, labels = encode_conversation(messages, tokenizer)

    spoken = [turn["content"] + END for turn in messages if turn["role"] == "assistant"]
    assert learned_text(tokenizer, input_ids, labels) == "".join(spoken)
    assert tokenizer.decode(input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    # Nothing before the first answer is learned, even if a user says the same words.
    prompt = tokenizer.apply_chat_template(
        messages[: [turn["role"] for turn in messages].index("assistant")],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert input_ids[: len(prompt)] == prompt
    assert set(labels[: len(prompt)]) == {IGNORED}
    assert labels[len(prompt)] != IGNORED


@both_ways
@pytest.mark.parametrize("weights", [(1, 0, 1), (0, 1, 1), (1, 1, 0), (0, 0, 1)], ids=str)
def test_an_answer_of_weight_0_is_shown_and_not_learned(weights, template):
    tokenizer = tiny_tokenizer(template)
    messages = chat("hi", "one", "and?", "two", "more", "three")
    for message, weight in zip(messages[1::2], weights, strict=True):
        message["weight"] = weight

    input_ids, labels = encode_conversation(messages, tokenizer)

    said = [m["content"] + END for m in messages[1::2] if m["weight"]]
    assert learned_text(tokenizer, input_ids, labels) == "".join(said)
    assert tokenizer.decode(input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "templates",
    [(CHATML, CHATML_MARKED), (FORGETFUL, FORGETFUL_MARKED)],
    ids=["kept", "rewritten"],
)
@each_chat
def test_both_ways_agree(messages, templates):
    results = [encode_row({"messages": messages}, tiny_tokenizer(one)) for one in templates]
    assert results[0] == results[1]


@each_chat
def test_every_token_is_learned_when_asked_for(messages):
    input_ids, labels = encode_conversation(messages, tiny_tokenizer(), assistant_only=False)

    assert labels == input_ids
    assert labels is not input_ids


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"prompt": chat("a", "x", "c"), "completion": "d"},
        {"instruction": "a", "input": "c", "output": "b"},
        {"messages": chat("a", "b"), "system": "Be brief."},
    ],
    ids=str,
)
def test_every_token_of_every_form_is_learned_when_asked_for(row):
    """Prompts and system columns, which are not learned otherwise, used to count as masked."""
    ((input_ids, labels),) = encode_row(row, tiny_tokenizer(), assistant_only=False)
    assert labels == input_ids

    marked = row | {"weight": 0}
    with pytest.raises(RowError, match="Set assistant_only_loss to true"):
        encode_row(marked, tiny_tokenizer(), assistant_only=False)


@pytest.mark.parametrize("max_length", [1, 20, 30, 31, 32, 100, 150, 500])
def test_a_limit_changes_no_label_before_it(max_length):
    messages, tokenizer = chat(*["how are you", "fine"] * 5), tiny_tokenizer()

    input_ids, labels = encode_conversation(messages, tokenizer, max_length=max_length)

    whole_ids, whole_labels = encode_conversation(messages, tokenizer)
    assert input_ids == whole_ids
    assert labels[:max_length] == whole_labels[:max_length]


def test_white_space_that_ends_a_turn_is_learned():
    """Without a special token, only the line break tells generation to stop."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)

    input_ids, labels = encode_conversation(chat("hi", "fine"), tokenizer)

    assert learned_text(tokenizer, input_ids, labels) == " fine\n"


TOOL = {
    "type": "function",
    "function": {
        "name": "rain",
        "description": "Says whether it rains.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}
TOOL_USE = [
    {"role": "user", "content": "Does it rain?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "yes"},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "It does."},
]


def tokenizer_for(template):
    """Return a tokenizer that knows the special tokens of a template."""
    tokenizer = tiny_tokenizer(template)
    found = set(re.findall(r"<\|\w+\|>|<\w+_of_turn>|\[/?INST\]", template))
    tokenizer.add_tokens(sorted(found), special_tokens=True)
    return tokenizer


def shipped_tokenizer(name):
    return tokenizer_for(shipped.shipped_file(name, ".jinja").read_text())


THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("name", "answers", "end"),
    [
        ("chatml", [" hello<|im_end|> fine<|im_end|>"], "<|im_end|>"),
        ("llama3", ["hello<|eot_id|>fine<|eot_id|>"], "<|eot_id|>"),
        ("gemma", ["hello<end_of_turn>fine<end_of_turn>"], "<end_of_turn>"),
        ("mistral", [f" hello{END} fine{END}"], END),
        ("vicuna", [f" hello{END} fine{END}"], END),
        ("qwen3", [f"{THOUGHT} hello<|im_end|>", f"{THOUGHT} fine<|im_end|>"], "<|im_end|>"),
    ],
)
def test_shipped_templates_learn_answers_with_their_end(name, answers, end):
    tokenizer = shipped_tokenizer(name)
    messages = chat("hi", " hello", "and you?", " fine", system="Be brief.")

    examples = encode_row({"messages": messages}, tokenizer)

    assert [learned_text(tokenizer, *example) for example in examples] == answers
    encoder = ConversationEncoder(tokenizer, assistant_only=True)
    assert tokenizer.decode(encoder.end_of_turn()) == end
    for n_turns, (input_ids, labels) in zip((3, 5)[-len(examples) :], examples, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[: n_turns - 1], add_generation_prompt=True, return_dict=False
        )
        assert input_ids[: len(prompt)] == prompt
        assert labels[len(prompt)] != IGNORED


def test_vicuna_is_what_its_authors_wrote():
    text = shipped_tokenizer("vicuna").apply_chat_template(chat("hi", "yes", "so"), tokenize=False)
    assert text.startswith(f"{TURN}A chat between a curious user and an artificial")
    assert text.endswith(f"questions. USER: hi ASSISTANT: yes{END} USER: so")


@pytest.mark.parametrize("role", ["tool", "narrator", "system"])
@pytest.mark.parametrize("name", ["chatml", "gemma", "llama3", "mistral", "qwen3", "vicuna"])
def test_shipped_templates_take_no_role_for_another(name, role):
    turns = [*chat("a", "b"), {"role": role, "content": "c"}, *chat("d", "e")]
    tokenizer = shipped_tokenizer(name)
    known = {"chatml": ("tool", "system"), "llama3": ("system",), "qwen3": ("tool",)}
    if role in known.get(name, ()):
        learned = [learned_text(tokenizer, *e) for e in encode_row({"messages": turns}, tokenizer)]
        assert "c" not in "".join(learned)
    else:
        with pytest.raises(TemplateError, match=role):
            tokenizer.apply_chat_template(turns)


@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen3"])
def test_shipped_templates_write_what_the_models_read(name):
    """TRL contains the templates that the models' authors published."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    published = (folder / {"gemma": "gemma3.jinja"}.get(name, f"{name}.jinja")).read_text()
    ours, theirs = shipped_tokenizer(name), shipped_tokenizer(name)
    theirs.chat_template = published
    chats = [messages for case, messages in CHATS.items() if case != "two answers in a row"]
    for messages in [*chats, chat("a", "<think>\nhm\n</think>\n\nb", "c", "<think>x</think>d")]:
        for prompt in (True, False):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(
                messages, **options
            )
    if name == "qwen3":
        for n_turns in range(1, len(TOOL_USE) + 1):
            options = {"tokenize": False, "tools": [TOOL]}
            assert ours.apply_chat_template(
                TOOL_USE[:n_turns], **options
            ) == theirs.apply_chat_template(TOOL_USE[:n_turns], **options)


def test_tool_calls_are_learned_and_what_tools_say_is_not():
    tokenizer = shipped_tokenizer("qwen3")
    examples = encode_row({"messages": TOOL_USE, "tools": [TOOL]}, tokenizer)
    call = '<tool_call>\n{"name": "rain", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert [learned_text(tokenizer, *example) for example in examples] == [
        f"{THOUGHT}I look.\n{call}\n{call}<|im_end|>",
        f"{THOUGHT}It does.<|im_end|>",
    ]


WITHOUT_SYSTEM = CHATML.replace("{{", "{% if message['role'] != 'system' %}{{", 1).replace(
    "{% endfor", "{% endif %}{% endfor"
)


@pytest.mark.parametrize(
    ("template", "row", "what"),
    [
        (CHATML, {"messages": chat("a", "b"), "tools": [TOOL]}, "tools"),
        (CHATML_MARKED, {"messages": TOOL_USE}, "tool calls"),
        (WITHOUT_SYSTEM, {"messages": chat("a", "b"), "system": "Be brief."}, "system turns"),
    ],
)
def test_what_the_template_leaves_out_is_refused(template, row, what):
    for assistant_only in (True, False):
        with pytest.raises(RowError, match=f"the chat template leaves out {what}"):
            encode_row(row, tiny_tokenizer(template), assistant_only=assistant_only)


def test_a_template_that_takes_others_for_the_assistant_is_refused():
    template = CHATML_MARKED.replace("== 'assistant'", "!= 'user'")
    with pytest.raises(RowError, match="marks 2 answers of 1"):
        encode_conversation(chat("a", "b", system="Be brief."), tiny_tokenizer(template))


def test_the_training_template_of_trl_is_used_where_answers_cannot_be_told(caplog):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    template = (folder / "nemotron_3_nano.jinja").read_text()
    tokenizer = tokenizer_for(template)

    input_ids, labels = encode_conversation(chat("hi", "hello", "so?", "yes"), tokenizer)

    answers = "".join(f"<think></think>{said}<|im_end|>" for said in ("hello", "yes"))
    assert learned_text(tokenizer, input_ids, labels) == answers
    assert "TRL's training template is used instead of the model's" in caplog.text
    assert tokenizer.chat_template == template  # the template saved with the model is unchanged


def test_no_messages_give_no_example():
    with pytest.raises(NothingToLearn, match="empty"):
        encode_conversation([], tiny_tokenizer())


def test_missing_template_is_refused():
    with pytest.raises(ValueError, match=r"Set chat_template to a Jinja file .* \(chatml, "):
        encode_conversation(chat("a", "b"), tiny_tokenizer(None))


def test_assistant_first_is_refused():
    with pytest.raises(ValueError, match=r"Drop the turn or put a user or system turn .*'hello'"):
        encode_conversation([{"role": "assistant", "content": "hello"}], tiny_tokenizer())


@pytest.mark.parametrize("template", [FORGETFUL, FORGETFUL_MARKED], ids=["prefix", "marked"])
@pytest.mark.parametrize("max_length", [None, 40])
def test_an_answer_that_is_rewritten_later_is_learned_as_it_is_said(max_length, template):
    tokenizer = tiny_tokenizer(template)
    messages = [*chat("a", "b", "c", "d", "e"), *chat("f", "g")[1:], *chat("", "h", "i")[1:]]

    examples = encode_row({"messages": messages}, tokenizer, max_length=max_length)

    texts = [learned_text(tokenizer, *example) for example in examples]
    # The last two answers have no user turn between them, and both keep their thoughts.
    assert texts == [f"<thought>{said}{END}" for said in "bd"] + [f"<thought>g{END}<thought>h{END}"]
    for (input_ids, labels), n_before in zip(examples, (1, 3, 5), strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:n_before], add_generation_prompt=True, return_dict=False
        )
        assert input_ids[: len(prompt)] == prompt
        assert set(labels[: len(prompt)]) == {IGNORED}


def test_what_a_template_adds_at_the_end_splits_no_marked_answers():
    """The end of the text is no part of an answer, so no answer is rewritten."""
    template = CHATML_MARKED + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    messages, tokenizer = chat("a", "b", "c", "d"), tiny_tokenizer(template)

    input_ids, labels = encode_conversation(messages, tokenizer)

    assert input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert learned_text(tokenizer, input_ids, labels) == f"b{END}d{END}"


TWO_LINES = CHATML.replace("assistant\n'", "assistant\n\n'").replace("\n' + m", "\n\n' + m")
TWO_LINES_MARKED = CHATML_MARKED.replace("] + '\n' }}", "] + '\n\n' }}")
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
        (TWO_LINES_MARKED, ["what?", "x", "and?", "\nx"]),
    ],
    ids=["line break", "line break in a later turn", "space", "marked"],
)
def test_answer_that_shares_a_token_with_the_prompt_is_refused(template, contents):
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens(["\n\n\n"])
    with pytest.raises(ValueError, match=r"Strip white space .* The turn says '(\\nx|the answer)'"):
        encode_conversation(chat(*contents), tokenizer)


def test_conversation_that_the_template_refuses_is_named():
    check = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    for refusing in (check + CHATML, check + CHATML_MARKED):
        with pytest.raises(
            ValueError, match=r"user first\. .*roles are system, user.* turn says 'Be brief"
        ):
            encode_conversation(chat("a", "b", system="Be brief."), tiny_tokenizer(refusing))


@pytest.mark.parametrize("fault", ["1 / 0", "'a'.index('b')", "'{x}'.format()", "'x' * none"])
def test_what_a_template_stumbles_over_is_said_of_the_conversation(fault):
    """Python's own errors in a template once ended in a traceback."""
    tokenizer = tiny_tokenizer(f"{{{{ {fault} }}}}{CHATML}")
    with pytest.raises(RowError, match="the chat template refuses the conversation"):
        encode_conversation(chat("a", "b"), tokenizer)


PRINTS_NO_WORDS_BESIDE_A_CALL = CHATML.replace(
    "message['content'] +", "('CALL' if message.tool_calls else message['content']) +"
)


@pytest.mark.parametrize(
    ("template", "answer", "what"),
    [
        (CHATML, {"content": "b", "reasoning_content": "Let me think."}, "reasoning"),
        (CHATML, {"content": "b", "thinking": "Let me think."}, "reasoning"),
        (
            PRINTS_NO_WORDS_BESIDE_A_CALL,
            {"content": "I will look.", "tool_calls": [{"function": {"name": "f"}}]},
            "assistant turns",
        ),
    ],
    ids=["reasoning_content", "thinking", "words beside a call"],
)
def test_what_an_answer_says_is_not_left_out(template, answer, what):
    messages = [*chat("a"), {"role": "assistant", **answer}, *chat("c", "d")]
    with pytest.raises(RowError, match=f"the chat template leaves out {what}"):
        encode_conversation(messages, tiny_tokenizer(template))
    shows_all = template.replace(
        "message['content']",
        "(message.reasoning_content or message.thinking or '') + message['content']",
    )
    if what == "reasoning":
        encode_conversation(messages, tiny_tokenizer(shows_all))


def replaced(template, new):
    """Return the template with another expression for what a turn says."""
    return template.replace("message['content']", new)


ONLY_ANSWERS = replaced(CHATML, "message['content'].split('</think>')[-1]")
ONLY_THE_FIRST_CALL = replaced(CHATML, "message.content + (message.tool_calls or [''])[0] | string")
WITHOUT_TOOLS = WITHOUT_SYSTEM.replace("'system'", "'tool'")
THOUGHTS_OF_THE_LAST = "(message.reasoning_content if loop.last else '') ~ message['content']"
LOOK = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THINK = [
    turn | ({"reasoning_content": "I think."} if turn["role"] == "assistant" else {})
    for turn in chat("a", "b", "c", "d")
]


@pytest.mark.parametrize(
    ("template", "messages", "assistant_only", "what"),
    [
        (CHATML, [*chat("a"), LOOK], True, "tool calls"),
        (ONLY_THE_FIRST_CALL, TOOL_USE, True, "tool calls"),
        (ONLY_ANSWERS, chat("a", "<think>\nb\n</think>\n\nc"), True, "reasoning"),
        (WITHOUT_TOOLS, [*chat("Warm?", "I look."), {"role": "tool", "content": "18"},
            {"role": "assistant", "content": "It has 18 degrees."}], True, "tool turns"),
        (replaced(CHATML, THOUGHTS_OF_THE_LAST), THINK, False, "reasoning"),
        (replaced(CHATML_MARKED, THOUGHTS_OF_THE_LAST), THINK, False, "reasoning"),
    ],
    ids=[
        "a call without words", "the second of two calls", "thoughts in the text",
        "words that a later turn repeats", "earlier thoughts, learned",
        "earlier thoughts, marked and learned",
    ],
)  # fmt: skip
def test_nothing_is_left_out_behind_something_that_is_shown(
    template, messages, assistant_only, what
):
    """Such rows were once learned without the part: empty answers, and answers without reasons."""
    tokenizer = tiny_tokenizer(template)
    with pytest.raises(RowError, match=f"the chat template leaves out {what}") as refused:
        encode_row({"messages": messages}, tokenizer, assistant_only=assistant_only)
    if "set assistant_only_loss to true if" in str(refused.value):
        assert len(encode_row({"messages": messages}, tokenizer)) == len(messages) / 2
    else:
        assert assistant_only


@both_ways
@pytest.mark.parametrize(
    ("row", "learned"),
    [
        ({"messages": THINK}, ["I think.b", "I think.d"]),
        ({"messages": [THINK[0], THINK[1] | {"train": False}, *THINK[2:]]}, ["I think.d"]),
        ({"messages": [*THINK[:3], THINK[3] | {"weight": 0}]}, ["I think.b"]),
        ({"prompt": THINK[:3], "completion": THINK[3:]}, ["I think.d"]),
        (
            {"messages": [*THINK[:2], {"role": "tool", "content": "c"}, THINK[3]]},
            ["I think.b", "I think.d"],
        ),
    ],
    ids=["both", "the last", "the first", "given", "after a tool"],
)
def test_an_answer_whose_thoughts_are_left_out_later_is_an_example_of_its_own(
    row, learned, template
):
    """Where the template marks answers, such rows were refused."""
    tokenizer = tiny_tokenizer(replaced(template, THOUGHTS_OF_THE_LAST))

    examples = encode_row(row, tokenizer)

    assert [learned_text(tokenizer, *e) for e in examples] == [f"{text}{END}" for text in learned]
    for input_ids, labels in examples:
        shown = tokenizer.decode([i for i, j in zip(input_ids, labels, strict=True) if i != j])
        assert "I think." not in shown


@pytest.mark.parametrize(
    ("template", "message"),
    [(CHATML, "cannot be located"), (CHATML_MARKED, "another prompt than it sees. Use another")],
    ids=["prefix", "marked"],
)
def test_thoughts_that_only_the_prompt_shows_are_refused(template, message):
    """As with gpt-oss after a tool call: the last answer itself removes what its prompt shows."""
    thoughts = "(message.reasoning_content if loop.last or messages[-1].role == 'user' else '')"
    tokenizer = tiny_tokenizer(replaced(template, f"({thoughts} or '') ~ message['content']"))
    with pytest.raises(RowError, match=rf"prompt differently .*{message}.* turn says 'd'"):
        encode_row({"messages": THINK}, tokenizer)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "lfm2_2_5", "glm4moe_training"])
@pytest.mark.parametrize("with_tools", [False, True])
def test_published_templates_learn_each_answer_as_it_is_generated(name, with_tools):
    """Qwen3's have no marks. Those of LFM2.5, and TRL's for GLM 4, do; all forget thoughts."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer = tokenizer_for((folder / f"{name}.jinja").read_text())
    messages, tools = chat("a", "b", "c", "d", "e", "f"), None
    if with_tools:
        look = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        messages[3:3], tools = [look, {"role": "tool", "content": "yes"}], [TOOL]
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    for i in answers:
        messages[i]["thinking"] = messages[i]["reasoning_content"] = f"I think of {i}."

    examples = encode_row({"messages": messages, "tools": tools}, tokenizer)

    generated, texts = [], []
    for i in answers:
        options = {"tools": tools, "tokenize": False}
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, **options)
        text = tokenizer.apply_chat_template(messages[: i + 1], **options)
        assert text.startswith(prompt)
        generated.append(text.removeprefix(prompt).removesuffix("\n"))
        texts.append(text)
        assert f"I think of {i}." in generated[-1]
    if with_tools:  # the call and the answer after it are one example
        generated[1:3], texts[1:3] = ["".join(generated[1:3])], texts[2:3]
    assert [learned_text(tokenizer, *example) for example in examples] == generated
    assert [tokenizer.decode(input_ids) for input_ids, _ in examples] == texts


def test_thoughts_in_two_fields_are_shown_if_one_of_them_is():
    """Some servers answer with both, and one of the two used to count as left out."""
    tokenizer = tiny_tokenizer(replaced(CHATML, "(message.reasoning or '') + message['content']"))
    turn = {"role": "assistant", "content": "b", "reasoning": "hm", "reasoning_content": "hm"}

    example = encode_conversation([*chat("a"), turn], tokenizer)

    assert learned_text(tokenizer, *example) == f"hmb{END}"
    with pytest.raises(RowError, match="leaves out reasoning"):
        encode_conversation([*chat("a"), turn | {"reasoning_content": "so"}], tokenizer)


def test_thoughts_without_words_may_be_left_out():
    """Qwen3 writes such a block in an answer that it gives without thinking."""
    answer = {"role": "assistant", "content": "<think>\n\n</think>\n\nc", "reasoning_content": "\n"}
    encode_conversation([*chat("a"), answer], tiny_tokenizer(ONLY_ANSWERS))


@pytest.mark.parametrize("said", ["?", "", "1 < 2", "</s>"])
def test_what_is_shown_in_another_form_is_not_left_out(said):
    """The system turn comes last here, so no content is found in order."""
    template = "{% for m in messages[1:] %}{{ m.role + ': ' + m.content | trim + '<|im_end|>' }}"
    template += "{% endfor %}{{ messages[0].content if not add_generation_prompt }}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    conversation = chat(f" {said} ", "c", system="Be brief.")
    encode_conversation(conversation, tiny_tokenizer(template), assistant_only=False)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content }", CHATML_MARKED + "{%"]
)
def test_a_template_that_is_no_jinja_is_refused_before_the_first_row(template):
    """Each row was once reported as bad, and with `on_bad_row: skip` all were left out."""
    with pytest.raises(ValueError, match=r"valid Jinja: .*, line [14]\. Correct it, or") as refused:
        ConversationEncoder(tiny_tokenizer(template), assistant_only=True).end_of_turn()
    assert not isinstance(refused.value, RowError)


SHOWS_TOOLS = "{{ tools | tojson }}" + CHATML


def test_tools_that_the_template_shows_are_part_of_the_prompt():
    tokenizer = tiny_tokenizer(SHOWS_TOOLS)

    ((input_ids, labels),) = encode_row({"messages": chat("a", "b"), "tools": [TOOL]}, tokenizer)

    assert "rain" in tokenizer.decode(input_ids)
    assert learned_text(tokenizer, input_ids, labels) == f"b{END}"


def test_slow_tokenizer_is_refused():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=re.escape("got ByT5Tokenizer. Set assistant_only_loss")):
        encode_conversation(chat("a", "b"), tokenizer)
