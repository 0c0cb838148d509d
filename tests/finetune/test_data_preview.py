"""The text that is shown before the first step is the text that is learned."""

import pytest

from qft_hf.hf.finetune.arguments import DataArguments
from qft_hf.hf.finetune.data import prepare_data
from qft_hf.hf.finetune.data_preview import SHOWN_CHARACTERS, data_preview, show
from tests.finetune.chats import END, TURN, chat, tiny_tokenizer
from tests.finetune.flags import write_jsonl
from tests.finetune.test_classification import config_of


def shown(folder, *rows, **arguments):
    path = write_jsonl(folder / "rows.jsonl", rows)
    data = prepare_data(
        DataArguments(train_data=path, **arguments), tiny_tokenizer(), config_of(), seed=0
    )
    return data_preview(data)


@pytest.mark.parametrize("packing", [True, False])
def test_learned_words_stand_in_brackets(packing, tmp_path):
    rows = [
        {"messages": chat("hi", "yes", "and 👋🏽", "日本語")},
        {"messages": chat("x", "hidden")},
    ]
    text = shown(tmp_path, *rows, {"messages": chat("no answer")}, packing=packing)
    assert text.startswith("training data           3 rows, ")
    assert "1 dropped (1 nothing to learn)" in text
    assert text.endswith(
        f":\n\n{TURN}user\nhi{END}\n{TURN}assistant\n\u27e6yes{END}\u27e7\n"
        f"{TURN}user\nand 👋🏽{END}\n{TURN}assistant\n\u27e6日本語{END}\u27e7\n"
    )


def test_the_first_token_of_a_text_is_not_learned(tmp_path):
    text = shown(tmp_path, {"text": "q quick"}, {"text": "z"}, task="text", eval_fraction=0.5)
    first = next(line for line in text.splitlines() if "\u27e6" in line and "brackets" not in line)
    assert first in (f"q\u27e6 quick{END}\u27e7", f"z\u27e6{END}\u27e7")
    assert "evaluation data         1 row, 1 example, " in text
    text = shown(tmp_path, {"text": ""}, *[{"text": "a dog"}] * 2, task="text", max_length=2)
    assert text.startswith("training data           3 rows, 2 examples, 4 tokens; ")


@pytest.mark.parametrize(
    ("task", "labels", "said"),
    [
        ("classification", ["good", "bad"], "good"),
        ("regression", [0.5, 2.0], "0.5"),
        ("multi_label", [["a", "c"], ["b"]], "a, c"),
    ],
)
def test_labels_are_shown_by_name(task, labels, said, tmp_path):
    rows = [{"text": "the fox", "label": label} for label in labels]
    text = shown(tmp_path, *rows, task=task)
    assert text.endswith(f"the fox\n\u27e6{said}\u27e7")
    assert ("classes" in text) == (task != "regression")


@pytest.mark.parametrize("change", ["more rows", "other rows", "none", "older version"])
def test_other_data_than_before_are_reported(change, tmp_path, caplog):
    """A resumed run drew other rows by eval_fraction, some of which it had learned."""
    rows = [{"text": f"the fox {n}\r\nruns"} for n in range(6)]  # once read back as other text
    path, preview = tmp_path / "rows.jsonl", tmp_path / "data.txt"
    for index in range(2):
        if index:
            rows += rows[:2] if change == "more rows" else []
            rows = rows[::-1] if change == "other rows" else rows
        arguments = DataArguments(
            train_data=write_jsonl(path, rows), task="text", eval_fraction=0.5
        )
        data = prepare_data(arguments, tiny_tokenizer(), config_of(), seed=0)
        show(data, preview)
        if change == "older version":
            lines = preview.read_bytes().splitlines(keepends=True)
            preview.write_bytes(b"".join(x for x in lines if not x.startswith(b"held-out rows")))

    is_other = change in ("more rows", "other rows")
    assert ("continues with other data than before" in caplog.text) == is_other
    assert ("training data 4 rows" in caplog.text) == (change == "more rows")
    assert ("held-out rows fingerprint " in caplog.text) == is_other


def test_a_long_example_is_cut_in_the_middle(tmp_path):
    text = shown(tmp_path, {"text": "the fox " * 2000 + "ends"}, task="text", max_length=10_000)
    assert " [...] " in text
    assert text.endswith(f"ends{END}\u27e7")
    assert len(text) < SHOWN_CHARACTERS + 300
