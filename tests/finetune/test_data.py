"""From rows to batches: labels, masks, counts, and refused rows."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import PreTrainedConfig

from qft_hf.hf.finetune import sources
from qft_hf.hf.finetune.arguments import DataArguments
from qft_hf.hf.finetune.chat import Chat
from qft_hf.hf.finetune.data import DataCounts
from qft_hf.hf.finetune.data import prepare_data as prepare_data_for
from qft_hf.hf.finetune.task import DROPPED
from qft_hf.nn.loss import IGNORED
from tests.finetune.chats import END, FORGETFUL, FORGETFUL_MARKED, TURN, chat, tiny_tokenizer
from tests.finetune.flags import write_jsonl

CONVERSATIONS = [
    chat("hi", "hello"),
    chat("how are you today?", "I am fine, thank you.", "what is the answer?", "twice"),
    chat("the dog", "the fox\njumps", "the end"),
]


def prepare_data(arguments, tokenizer, *, config=None, seed=0):
    return prepare_data_for(arguments, tokenizer, config or PreTrainedConfig(), seed=seed)


@pytest.fixture
def chats_file(tmp_path):
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": m} for m in CONVERSATIONS])


def test_padding_is_never_learned_and_the_end_of_a_turn_always_is(chats_file):
    """Padding and the end of a turn are one token: masking by token would unlearn stopping."""
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id

    data = prepare_data(DataArguments(train_data=chats_file), tokenizer)
    examples = list(data.train.dataset)
    batch = data.task.collator(examples)

    lengths = [len(example["input_ids"]) for example in examples]
    assert len(set(lengths)) == len(lengths)
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    for row, example in zip(batch["labels"].tolist(), examples, strict=True):
        assert row[: len(example["labels"])] == example["labels"]
    n_answers = sum(turn["role"] == "assistant" for turns in CONVERSATIONS for turn in turns)
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == n_answers


def test_counts_of_cut_and_dropped_conversations(chats_file):
    tokenizer = tiny_tokenizer()
    whole = [
        len(tokenizer.apply_chat_template(messages, return_dict=False))
        for messages in CONVERSATIONS
    ]
    answer = len(
        tokenizer.apply_chat_template(
            CONVERSATIONS[1][:1], add_generation_prompt=True, return_dict=False
        )
    )

    # The second conversation is cut before its first answer; the others are shorter.
    arguments = DataArguments(train_data=chats_file, max_length=answer)
    data = prepare_data(arguments, tokenizer)

    kept = [min(length, answer) for length in whole]
    assert data.train.counts == DataCounts(
        rows=3,
        examples=2,
        tokens=kept[0] + kept[2],
        cut_tokens=sum(whole) - whole[1] - kept[0] - kept[2],
        dropped={f"nothing to learn in the first {answer} tokens": 1},
    )


@pytest.mark.parametrize("is_parquet", [False, True])
def test_other_code_encodes_the_same_rows_again(is_parquet, chats_file, tmp_path, monkeypatch):
    """Two commits of one version used to share what `datasets` had kept on the disk."""
    if is_parquet:  # which `datasets` reads itself
        Dataset.from_dict({"messages": CONVERSATIONS}).to_parquet(tmp_path / "chats.parquet")
        chats_file = str(tmp_path / "chats.parquet")
    arguments = DataArguments(train_data=chats_file)
    before = prepare_data(arguments, tiny_tokenizer()).train.counts
    monkeypatch.setattr(Chat, "encode", lambda task, row: [task.example([5, 6], [5, 6])])
    assert prepare_data(arguments, tiny_tokenizer()).train.counts == before  # taken from the disk

    code = shutil.copytree(Path(sources.__file__).parent, tmp_path / "code")
    with (code / "chat.py").open("a") as file:
        file.write("# changed\n")
    monkeypatch.setattr(sources, "__file__", str(code / "sources.py"))
    sources.code_hash.cache_clear()
    try:
        assert prepare_data(arguments, tiny_tokenizer()).train.counts.tokens == 6
    finally:
        sources.code_hash.cache_clear()


def test_an_answer_beyond_the_limit_takes_no_other_answer_of_its_row_with_it(tmp_path):
    """A row was dropped with all of its examples if one of them had nothing to learn."""
    tokenizer = tiny_tokenizer(FORGETFUL)
    messages = chat("a", "b", "c", "d", "e " * 50, "f")
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": messages}])
    lengths = [
        len(tokenizer.apply_chat_template(messages[:n_turns], return_dict=False))
        for n_turns in (2, 4, 6)
    ]

    # The third answer begins beyond the limit, and the second one is cut.
    arguments = DataArguments(train_data=path, max_length=lengths[1] - 1)
    data = prepare_data(arguments, tokenizer)

    assert data.train.counts == DataCounts(
        rows=1,
        examples=2,
        tokens=lengths[0] + lengths[1] - 1,
        cut_tokens=1,
        dropped={f"nothing to learn in the first {lengths[1] - 1} tokens": 1},
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("template", [FORGETFUL, FORGETFUL_MARKED], ids=["prefix", "marked"])
def test_answers_of_a_row_are_held_out_together_weighted_and_packed(template, packing, tmp_path):
    """Each answer is an example; a row is never learned in one part and scored in another."""
    tokenizer = tiny_tokenizer(template)
    words = "ABCDEF"
    path = write_jsonl(
        tmp_path / "t.jsonl",
        [{"messages": chat("q", f"{w}1", "q", f"{w}2", "q", f"{w}3")} for w in words],
    )

    arguments = DataArguments(
        train_data=path, eval_fraction=1 / 3, train_weights=[2.0], packing=packing, max_length=512
    )
    data = prepare_data(arguments, tokenizer)

    def learned(part):
        ids = [i for labels in part.dataset["labels"] for i in labels if i != IGNORED]
        return sorted(tokenizer.decode(ids).replace("<thought>", "").split(END)[:-1])

    scored = learned(data.evaluation)
    held_out = sorted({text[0] for text in scored})
    assert len(held_out) == 2
    assert scored == [f"{w}{n}" for w in held_out for n in (1, 2, 3)]
    rest = [w for w in words if w not in held_out]
    assert learned(data.train) == [f"{w}{n}" for w in rest for n in (1, 2, 3) for _ in range(2)]
    counts = data.train.counts
    assert (counts.rows, counts.examples) == (4, len(data.train.dataset) if packing else 24)


def test_text_is_ended_and_learned_from_its_second_token(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write_jsonl(tmp_path / "t.jsonl", [{"body": "the fox"}, {"body": ""}, {"body": None}])

    arguments = DataArguments(train_data=path, task="text", text_field="body")
    data = prepare_data(arguments, tokenizer)

    (example,) = data.train.dataset
    assert example["input_ids"] == [*tokenizer("the fox")["input_ids"], tokenizer.eos_token_id]
    assert example["labels"] == example["input_ids"]
    assert data.train.counts.dropped == {"empty": 2}


def test_text_that_is_cut_does_not_end(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "the fox jumps over the dog"}])

    arguments = DataArguments(train_data=path, task="text", max_length=3)
    (example,) = prepare_data(arguments, tokenizer).train.dataset

    assert example["input_ids"] == tokenizer("the fox jumps over the dog")["input_ids"][:3]


def test_limits_take_the_first_rows(chats_file):
    arguments = DataArguments(
        train_data=chats_file, eval_data=chats_file, max_train_rows=2, max_eval_rows=50
    )
    data = prepare_data(arguments, tiny_tokenizer())

    assert data.train.counts.rows == 2
    assert data.evaluation.counts.rows == 3


@pytest.mark.parametrize(
    ("sizes", "limit", "taken"),
    [
        ([6, 3, 3], 4, [2, 1, 1]),
        ([2, 40, 3], 9, [0, 8, 1]),
        ([3, 3, 3, 3], 2, [1, 0, 1, 0]),
        ([5, 2], 6, [4, 2]),
        ([5, 2], 7, [5, 2]),
        ([5], 3, [3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_limit_keeps_the_mixture(part, sizes, limit, taken, tmp_path, chats_file, caplog):
    """It took the first rows of all files together, so later files were left out silently."""
    paths = [
        write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n}{row}"} for row in range(size)])
        for n, size in enumerate(sizes)
    ]
    rows = {"train_data": paths, f"{part}_data": paths, f"max_{part}_rows": limit}
    tokenizer = tiny_tokenizer()
    data = prepare_data(DataArguments(**rows, task="text"), tokenizer)

    examples = (data.train if part == "train" else data.evaluation).dataset
    texts = [tokenizer.decode(ids)[:2] for ids in examples["input_ids"]]
    assert texts == [f"{n}{row}" for n, size in enumerate(taken) for row in range(size)]
    assert ("leaves none of" in caplog.text) == (0 in taken)
    if 0 in taken:
        more = " and 1 more" if taken.count(0) == 2 else ""
        assert f"leaves none of {paths[taken.index(0)]}{more}: rows" in caplog.text


def test_weights_apply_to_the_rows_of_a_limit(tmp_path):
    paths = [
        write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n}"}] * size)
        for n, size in enumerate([8, 4])
    ]
    arguments = DataArguments(
        train_data=paths, train_weights=[0.5, 3], max_train_rows=6, task="text"
    )
    tokenizer = tiny_tokenizer()
    data = prepare_data(arguments, tokenizer)
    texts = [tokenizer.decode(ids)[:1] for ids in data.train.dataset["input_ids"]]
    assert texts == ["0"] * 2 + ["1"] * 6
    assert data.train.counts.rows == 6

    with pytest.raises(
        ValueError, match=r"leaves none of 1 example\. .* max_train_rows if it is set"
    ):
        prepare_data(replace(arguments, max_train_rows=1), tokenizer)


def test_held_out_fraction_is_not_trained_on(chats_file):
    arguments = DataArguments(train_data=chats_file, eval_fraction=0.34)
    data = prepare_data(arguments, tiny_tokenizer())

    train, held_out = (
        {tuple(ids) for ids in part.dataset["input_ids"]} for part in (data.train, data.evaluation)
    )
    assert len(train) == 2
    assert len(held_out) == 1
    assert not train & held_out

    held_out_by_seed = {
        tuple(prepare_data(arguments, tiny_tokenizer(), seed=s).evaluation.dataset[0]["input_ids"])
        for s in range(5)
    }
    assert len(held_out_by_seed) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 4}, "3 nothing to learn in the first 4 tokens. Raise max_length"),
        (
            {"messages_field": "chat"},
            r"chats\.jsonl, row 1: no field 'chat': the fields are 'messa",
        ),
        ({"task": "text"}, r"chats\.jsonl, row 1: no field 'text': the fields are 'messages'"),
    ],
    ids=str,
)
def test_data_that_teaches_nothing_is_refused(arguments, message, chats_file):
    with pytest.raises(ValueError, match=message):
        prepare_data(DataArguments(train_data=chats_file, **arguments), tiny_tokenizer())


def test_data_of_empty_texts_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": ""}, {"text": ""}])
    with pytest.raises(ValueError, match=r"from the 2 rows of the training data.* 2 empty"):
        prepare_data(DataArguments(train_data=path, task="text"), tiny_tokenizer())


def test_an_example_of_which_only_the_first_token_is_learned_teaches_nothing(chats_file):
    """No token comes before the first, so nothing predicts it."""
    task = prepare_data(DataArguments(train_data=chats_file), tiny_tokenizer()).task

    assert task.example([5, 6, 7], [5, IGNORED, IGNORED]) == {DROPPED: "nothing to learn"}
    assert task.example([5, 6, 7], [IGNORED, 6, IGNORED])["labels"] == [IGNORED, 6, IGNORED]


def test_text_that_is_none_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": 1}])
    with pytest.raises(ValueError, match=r"strings in field 'text', got 1\. Is text_field right"):
        prepare_data(DataArguments(train_data=path, task="text"), tiny_tokenizer())


def test_text_without_an_end_token_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"Set eos_token in its tokenizer_config\.json"):
        prepare_data(DataArguments(train_data=path, task="text"), tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_data": "b.jsonl", "eval_fraction": 0.1}, "both say what is held out. Set one"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"task": "classification", "packing": True}, "Set packing to false"),
        ({"train_weights": [1.0, 2.0]}, "each of the 1 entries of train_data, got"),
        ({"train_weights": [0.0]}, "must be a positive number"),
        ({"prompt_field": "q"}, "go together: a question has an answer"),
    ],
    ids=str,
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(train_data="a.jsonl", **arguments)


NARRATED = [{"role": "narrator", "content": "Night."}, *chat("hi", "hello")]


def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path):
    tokenizer = tiny_tokenizer()
    good = [{"messages": m} for m in CONVERSATIONS]
    bad = [{"messages": NARRATED}, {"messages": NARRATED[:1]}, {"text": "no chat"}]
    path = write_jsonl(tmp_path / "c.jsonl", [*good, *bad])

    with pytest.raises(ValueError, match=r"c\.jsonl, row 4: unknown role 'narrator'.* on_bad_row"):
        prepare_data(DataArguments(train_data=path), tokenizer)

    data = prepare_data(DataArguments(train_data=path, on_bad_row="skip"), tokenizer)
    assert data.train.counts.rows == 6
    assert data.train.counts.examples == 3
    assert data.train.counts.dropped == {"unknown role 'narrator'": 2, "no field 'messages'": 1}
    assert "3 dropped (2 unknown role 'narrator', 1 no field 'messages')" in str(data.train.counts)

    only_bad = write_jsonl(tmp_path / "bad.jsonl", bad)
    with pytest.raises(ValueError, match=r"nothing can be learned .* 2 unknown role 'narrator'"):
        prepare_data(DataArguments(train_data=only_bad, on_bad_row="skip"), tokenizer)


@pytest.mark.parametrize("task", ["classification", "regression", "multi_label"])
def test_labels_of_another_field_are_asked_for(task, tmp_path):
    """The error was once that `label` holds only [], which is fewer than two classes."""
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "a", "stars": n} for n in range(2)])
    arguments = DataArguments(train_data=path, task=task, on_bad_row="skip")
    message = "no row has a field 'label': the fields are 'text', 'stars'. Set label_field"
    with pytest.raises(ValueError, match=message):
        prepare_data(arguments, tiny_tokenizer())


def test_data_sets_are_mixed_by_their_weights(tmp_path):
    """The files have different fields, which Arrow would not put into one table."""
    rows = {
        "a": [{"messages": chat(f"a{n}", "x")} for n in range(4)],
        "b": [{"prompt": f"b{n}", "completion": "x"} for n in range(4)],
        "c": [{"question": f"c{n}", "answer": "x"} for n in range(4)],
    }
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in rows.items()]
    tokenizer = tiny_tokenizer()

    def asked(seed, **arguments):
        data = prepare_data(DataArguments(train_data=paths, **arguments), tokenizer, seed=seed)
        texts = [tokenizer.decode(ids) for ids in data.train.dataset["input_ids"]]
        return [re.search("user\n(..)", text)[1] for text in texts], data

    every = [f"{name}{n}" for name in "abc" for n in range(4)]
    assert asked(0)[0] == every
    weighted, data = asked(0, train_weights=[2, 1, 0.5])
    assert sorted(weighted[:8]) == sorted([*every[:4], *every[:4]])
    assert weighted[8:12] == every[4:8]
    assert len(set(weighted[12:])) == 2
    assert data.train.counts.rows == 12
    assert data.train.counts.examples == 14
    assert len({tuple(asked(seed, train_weights=[1, 1, 0.5])[0]) for seed in range(5)}) > 1

    with pytest.raises(ValueError, match=r"a weight of 0\.1 leaves none of 4 examples"):
        asked(0, train_weights=[1, 1, 0.1])

    held_out = asked(0, train_weights=[3, 3, 3], eval_fraction=0.5)[1]
    assert held_out.evaluation.counts.examples == 6  # each example once
    assert held_out.train.counts.examples == 18


def test_text_begins_and_ends_once(tmp_path):
    """The tokenizer adds these tokens, and some texts have them already."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{TURN} $A {END}", special_tokens=[(TURN, 0), (END, 1)]
    )
    texts = ["the fox", f"{TURN}the fox", f"the fox{END}", f"{TURN}the fox{END}"]
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])

    data = prepare_data(DataArguments(train_data=path, task="text"), tokenizer)

    for input_ids in data.train.dataset["input_ids"]:
        assert tokenizer.decode(input_ids) == f"{TURN}the fox{END}"
