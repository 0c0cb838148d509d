"""From rows to batches: what is learned, what is masked, what is counted, what is refused."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from qft_hf.hf.finetune.arguments import DataArguments
from qft_hf.hf.finetune.chat import IGNORED
from qft_hf.hf.finetune.data import DataCounts, prepare_data
from qft_hf.hf.finetune.examples import classification_examples, label_names_of
from tests.finetune.chats import chat, tiny_tokenizer

CONVERSATIONS = [
    chat("hi", "hello"),
    chat("how are you today?", "I am fine, thank you.", "what is the answer?", "twice"),
    chat("the dog", "the fox\njumps", "the end"),
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chats_file(tmp_path):
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": m} for m in CONVERSATIONS])


def test_padding_is_never_learned_and_the_end_of_a_turn_always_is(chats_file):
    """Padding and the end of a turn are one token: masking by token would unlearn to stop."""
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id

    data = prepare_data(DataArguments(train_data=chats_file), tokenizer, seed=0)
    examples = list(data.train.dataset)
    batch = data.collator(examples)

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
    data = prepare_data(arguments, tokenizer, seed=0)

    kept = [min(length, answer) for length in whole]
    assert data.train.counts == DataCounts(
        rows=3,
        examples=2,
        tokens=kept[0] + kept[2],
        cut_tokens=sum(whole) - sum(kept),
        dropped_examples=1,
    )


def test_packed_blocks_hold_every_token_but_the_remainder(chats_file):
    tokenizer = tiny_tokenizer()
    total = sum(
        len(tokenizer.apply_chat_template(messages, return_dict=False))
        for messages in CONVERSATIONS
    )

    arguments = DataArguments(train_data=chats_file, max_length=16, packing=True)
    counts = prepare_data(arguments, tokenizer, seed=0).train.counts

    assert counts.cut_tokens == total % 16
    assert counts.tokens + 16 * counts.dropped_examples == total - total % 16


def test_block_whose_only_learned_token_comes_first_is_dropped(tmp_path):
    """Nothing comes before it to predict it from: such a batch would have no loss at all."""
    tokenizer = tiny_tokenizer()
    conversations = [chat("hi", "hello"), chat("the lazy dog " * 20, "yes")]
    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": m} for m in conversations])
    first = tokenizer.apply_chat_template(conversations[0], return_dict=False)
    end = len(first) - 2  # the end of the first answer; a line break follows
    assert first[end] == tokenizer.eos_token_id

    arguments = DataArguments(train_data=path, max_length=end, packing=True)
    data = prepare_data(arguments, tokenizer, seed=0)

    assert first[end] not in [block[0] for block in data.train.dataset["input_ids"]]
    assert data.train.counts.dropped_examples >= 1


def test_text_is_ended_and_learned_from_its_second_token(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write_jsonl(tmp_path / "t.jsonl", [{"body": "the fox"}, {"body": ""}, {"body": None}])

    arguments = DataArguments(train_data=path, task="text", text_field="body")
    data = prepare_data(arguments, tokenizer, seed=0)

    (example,) = data.train.dataset
    assert example["input_ids"] == [*tokenizer("the fox")["input_ids"], tokenizer.eos_token_id]
    assert example["labels"] == example["input_ids"]
    assert data.train.counts.dropped_examples == 2


def test_text_that_is_cut_does_not_end(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "the fox jumps over the dog"}])

    arguments = DataArguments(train_data=path, task="text", max_length=3)
    (example,) = prepare_data(arguments, tokenizer, seed=0).train.dataset

    assert example["input_ids"] == tokenizer("the fox jumps over the dog")["input_ids"][:3]


def test_classification_of_a_pair(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [
        {"question": "is it?", "passage": "it is", "answer": "yes"},
        {"question": "is it?", "passage": "it is not " * 30, "answer": "no"},
    ]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    held_out = write_jsonl(tmp_path / "eval.jsonl", [rows[0] | {"answer": "maybe"}])

    data = prepare_data(
        DataArguments(
            train_data=train,
            eval_data=held_out,
            task="classification",
            text_field="question",
            text_pair_field="passage",
            label_field="answer",
            max_length=40,
        ),
        tokenizer,
        seed=0,
    )

    assert data.label_names == ["maybe", "no", "yes"]
    assert data.train.dataset["labels"][:] == [2, 1]
    assert data.evaluation.dataset["labels"][:] == [0]
    batch = data.collator(list(data.train.dataset))
    assert batch["input_ids"].shape == (2, 40)
    assert batch["labels"].tolist() == [2, 1]
    whole = tokenizer(rows[1]["question"], rows[1]["passage"])["input_ids"]
    assert data.train.counts.cut_tokens == len(whole) - 40


def test_declared_classes_keep_their_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg", "?"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)

    names = label_names_of([rows], "label")
    examples = classification_examples(
        rows,
        tiny_tokenizer(),
        text_fields=["text"],
        label_field="label",
        label_names=names,
        max_length=8,
    )

    assert names == ["pos", "neg", "?"]
    assert examples["labels"][:] == [1, 0]


def test_integer_labels_are_ordered_as_numbers():
    assert label_names_of([Dataset.from_dict({"y": [10, 9, 10, 2]})], "y") == ["2", "9", "10"]


def test_limits_take_the_first_rows(chats_file):
    arguments = DataArguments(
        train_data=chats_file, eval_data=chats_file, max_train_rows=2, max_eval_rows=50
    )
    data = prepare_data(arguments, tiny_tokenizer(), seed=0)

    assert data.train.counts.rows == 2
    assert data.evaluation.counts.rows == 3


def test_held_out_fraction_is_not_trained_on(chats_file):
    arguments = DataArguments(train_data=chats_file, eval_fraction=0.34)
    data = prepare_data(arguments, tiny_tokenizer(), seed=0)

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
        ({"max_length": 4}, "no assistant turn lies in the first 4 tokens .* Raise max_length"),
        ({"max_length": 10_000, "packing": True}, "do not fill one block .* Lower max_length"),
        ({"messages_field": "chat"}, r"training data has no field 'chat'\. Its fields are 'messa"),
        ({"task": "text"}, "training data has no field 'text'"),
    ],
    ids=str,
)
def test_data_that_teaches_nothing_is_refused(arguments, message, chats_file):
    with pytest.raises(ValueError, match=message):
        prepare_data(DataArguments(train_data=chats_file, **arguments), tiny_tokenizer(), seed=0)


def test_data_of_empty_texts_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": ""}, {"text": ""}])
    with pytest.raises(ValueError, match=r"from the 2 rows of the training data: all .* empty"):
        prepare_data(DataArguments(train_data=path, task="text"), tiny_tokenizer(), seed=0)


def test_text_that_is_none_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": 1}])
    with pytest.raises(ValueError, match=r"strings in field 'text', got 1\. Is text_field right"):
        prepare_data(DataArguments(train_data=path, task="text"), tiny_tokenizer(), seed=0)


def test_text_without_an_end_token_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"Set eos_token in its tokenizer_config\.json"):
        prepare_data(DataArguments(train_data=path, task="text"), tokenizer, seed=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a", "a"], r"at least two classes.*\['a'\]"), (["a", None], "have no label .* Remove them")],
)
def test_labels_that_cannot_be_learned_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        label_names_of([Dataset.from_dict({"label": labels})], "label")


def test_missing_class_of_declared_ones_is_refused():
    features = Features({"label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"label": [0, -1]}, features=features)
    with pytest.raises(ValueError, match="have no label"):
        label_names_of([rows], "label")


def test_classification_of_no_text_is_refused(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": None, "label": 1}]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    arguments = DataArguments(train_data=path, task="classification")
    with pytest.raises(ValueError, match=r"a string in each of \['text'\], got \[None\]"):
        prepare_data(arguments, tiny_tokenizer(), seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_data": "b.jsonl", "eval_fraction": 0.1}, "both say what is held out. Set one"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"task": "classification", "packing": True}, "Set packing to false"),
    ],
    ids=str,
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(train_data="a.jsonl", **arguments)
