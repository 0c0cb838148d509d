"""Labels have the meaning that the model's head gives them."""

import ast

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, EvalPrediction

from qft_hf.hf.finetune.arguments import DataArguments
from qft_hf.hf.finetune.classification import Classification, Regression
from qft_hf.hf.finetune.data import prepare_data
from qft_hf.hf.finetune.multi_label import MultiLabel
from qft_hf.hf.finetune.task import RowError
from tests.finetune.chats import tiny_tokenizer
from tests.finetune.flags import write_jsonl


def config_of(*names):
    """Return the config of a checkpoint with a trained head; without names, of one with no head."""
    if not names:
        return BertConfig(architectures=["BertModel"])
    return BertConfig(
        architectures=["BertForSequenceClassification"], id2label=dict(enumerate(names))
    )


def task_of(labels, *head, kind=Classification, declared=None):
    arguments = DataArguments(train_data="rows.jsonl", task="classification")
    return kind(arguments, tiny_tokenizer(), config_of(*head), labels, declared or ())


@pytest.mark.parametrize(
    ("labels", "head", "declared", "names", "indices"),
    [
        # A new head: classes in declared order, otherwise sorted; numbers by value.
        (["good", "bad"], [], None, ["bad", "good"], [1, 0]),
        ([10, 9, 2], [], None, ["2", "9", "10"], [2, 1, 0]),
        (["10", "9", "2"], [], None, ["2", "9", "10"], [2, 1, 0]),  # csv knows only text
        ([1.0, 0.0], [], None, ["0", "1"], [1, 0]),  # pandas, where a label is missing
        ([True, False], [], None, ["False", "True"], [1, 0]),
        ([0, 1], [], ["pos", "neg"], ["pos", "neg"], [0, 1]),
        # A trained head has its own order and spelling.
        (["good", "bad"], ["good", "bad"], None, ["good", "bad"], [0, 1]),
        (["bad"], ["good", "bad", "so so"], None, ["good", "bad", "so so"], [1]),
        ([" Pos", "neg", "pos"], ["NEG", "POS"], None, ["NEG", "POS"], [1, 0, 1]),
        ([0, 1], ["good", "bad"], None, ["good", "bad"], [0, 1]),
        (["pos", "neg"], ["neg", "pos"], ["pos", "neg"], ["neg", "pos"], [1, 0]),
        ([1, 2], ["1", "2", "3"], None, ["1", "2", "3"], [0, 1]),
        ([2, 0], ["LABEL_0", "LABEL_1", "LABEL_2"], None, None, [2, 0]),
        (["neg", "pos"], ["LABEL_0", "LABEL_1"], ["pos", "neg"], ["pos", "neg"], [1, 0]),
    ],
    ids=str,
)
def test_order_of_the_classes(labels, head, declared, names, indices):
    task = task_of(labels, *head, declared=declared)

    assert task.names == (names or head)
    assert [task.label(label) for label in labels] == indices
    config = config_of(*head)
    task.configure(config)
    assert config.id2label == dict(enumerate(task.names))
    assert config.num_labels == len(task.names)


@pytest.mark.parametrize(
    ("labels", "head", "message"),
    [
        (["a", "a"], [], r"at least two classes.*\['a'\]"),
        (["pos", " pos", "Pos"], [], r"differ only in case, .* accents: \[' pos', 'Pos', 'pos'"),
        (["caf\u00e9", "cafe\u0301", "tea"], [], r"the Unicode form of accents.* one spelling"),
        ([-1, 1], [], r"only \['1'\], and -1, which means no label: give that class a name\. Is"),
        ([0.5, 1.0], [], "holds 0.5, which is not a class. Set task to regression"),
        ([["a"], ["b"]], [], r"holds \['a'\], which is not a class.* multi_label for lists"),
        (["good", "fine"], ["good", "bad"], r"\['good', 'bad'\], and it is not .* \['fine'\]"),
        (["bad", "good"], ["LABEL_0", "LABEL_1"], "write their names into id2label"),
        ([0, 1, 2], ["good", "bad"], "start from a model without a classification head"),
        ([0, 1], ["1", "2", "3"], r"which of them the labels \['0'\] mean"),
    ],
    ids=str,
)
def test_labels_that_mean_nothing_to_the_model_are_refused(labels, head, message):
    with pytest.raises(ValueError, match=message):
        task_of(labels, *head)


def test_accents_of_a_class_may_have_either_unicode_form():
    """A label in the other form used to be a class of its own, or none that the head has."""
    task = task_of(["cafe\u0301", "tea"], "tea", "caf\u00e9")
    assert [task.label(label) for label in ("cafe\u0301", "caf\u00e9", "tea")] == [1, 1, 0]


@pytest.mark.parametrize("label", [-1, "-1", None, float("nan"), "", " "])
def test_a_row_without_a_label_is_no_class(label):
    task = task_of([0, 1, label])
    assert task.names == ["0", "1"]
    with pytest.raises(RowError, match=r"no label .* give a class that is stored as -1 a name"):
        task.label(label)


def test_regression_takes_numbers():
    task = task_of([0.5, "2", 3], kind=Regression)
    assert [task.label(label) for label in (0.5, "2", 3, "1e-3")] == [0.5, 2.0, 3.0, 0.001]
    for label in ("good", None, float("nan"), [1.0], 1e39, 10**400):  # the last two: too large
        with pytest.raises(RowError, match="task 'regression' got the label"):
            task.label(label)
    with pytest.raises(ValueError, match="'regression' needs one output"):
        task_of([0.5], "good", "bad", kind=Regression)


@pytest.mark.parametrize(
    ("labels", "head", "rows"),
    [
        ([["b"], ["a", "c"], []], [], [[0, 1, 0], [1, 0, 1], [0, 0, 0]]),
        ([["b"], ["a", "c"]], ["c", "b", "a"], [[0, 1, 0], [1, 0, 1]]),
        ([[0, 1, 1], [0, 0, 1]], ["x", "y", "z"], [[0, 1, 1], [0, 0, 1]]),  # one entry a class
        ([[2], [0, 1]], ["x", "y", "z"], [[0, 0, 1], [1, 1, 0]]),
        # Labels in CSV are text.
        (["b", "a, c", ""], [], [[0, 1, 0], [1, 0, 1], [0, 0, 0]]),
        (["b", "so so;a"], [], [[0, 1, 0], [1, 0, 1]]),
        (["c |b", "a|c"], ["c", "b", "a"], [[1, 1, 0], [1, 0, 1]]),
        (['["b"]', "['a', 'c, d']"], [], [[0, 1, 0], [1, 0, 1]]),
        (["0,1,1", "0,0,1"], ["x", "y", "z"], [[0, 1, 1], [0, 0, 1]]),
        (["[0, 1, 1]", "[0, 0, 1]"], ["x", "y", "z"], [[0, 1, 1], [0, 0, 1]]),
        (["2", "0, 1"], ["x", "y", "z"], [[0, 0, 1], [1, 1, 0]]),
        # A number may be written as text in a list, too; otherwise every row would have 0 and 1.
        ([["0", "1"], ["1", "0"]], ["x", "y"], [[0, 1], [1, 0]]),
        (["('a', 'b')", "('b',)", "c"], [], [[1, 1, 0], [0, 1, 0], [0, 0, 1]]),  # a tuple in CSV
        (["(a), b", "{c"], [], [[1, 1, 0], [0, 0, 1]]),
    ],
    ids=str,
)
def test_several_classes(labels, head, rows):
    task = task_of(labels, *head, kind=MultiLabel)
    assert [task.label(label) for label in labels] == rows
    for label in (None, 0.5, "['a'"):
        with pytest.raises(RowError, match=r"not a list of classes: .* got the label"):
            task.label(label)


@pytest.mark.parametrize("cell", ["['x' 'y']", "['x'\n 'y', 'z']", "[0 1]"])
def test_an_array_as_numpy_prints_it_is_no_list(cell):
    """Python joins texts without a comma between them, so `['x' 'y']` was once the class `xy`."""
    with pytest.raises(RowError, match=r"not a list of classes: .* entries of a list by com"):
        task_of(["x, y", cell], kind=MultiLabel).label(cell)
    with pytest.raises(ValueError, match=r"needs lists of classes .* call tolist\(\) before"):
        task_of([cell, cell], kind=MultiLabel)


@pytest.mark.parametrize("cell", ["{'x', 'y'}", "{x,y}", "('x')", "{'x': 1, 'y': 0}"])
def test_what_looks_like_a_list_and_is_none_is_no_class(cell):
    """A set as pandas writes it, or an array of Postgres, used to have the class `{'x'`."""
    task = task_of(["x, y", cell], kind=MultiLabel)
    assert task.names == ["x", "y"]
    with pytest.raises(RowError, match=r'not a list of classes: .* commas, as in \["a", "b"\]'):
        task.label(cell)


@pytest.mark.parametrize("cell", ["['x']", '["it\'s", "a \' b"]', "['x',\n 'y']", "[]"])
def test_a_list_with_commas_is_one_whatever_is_in_its_texts(cell):
    task = task_of(['["x", "y"]', cell], kind=MultiLabel)
    assert sum(task.label(cell)) == len(ast.literal_eval(cell))


@pytest.mark.parametrize("labels", [[1, 2], [None, True], [0.5]])
def test_several_classes_are_lists(labels):
    with pytest.raises(ValueError, match=r"needs lists of classes .* For one class per row"):
        task_of(labels, kind=MultiLabel)


def test_a_list_that_lacks_an_entry_does_not_turn_all_others_into_classes():
    """With one list of another length, `[0, 1, 1]` was once read as the classes 0 and 1."""
    task = task_of([[0, 1, 1], [1, 0]], kind=MultiLabel)
    with pytest.raises(RowError, match=r"0 or 1 twice in a list of classes: got \[0, 1, 1\]"):
        task.label([0, 1, 1])


def test_a_list_has_an_entry_for_each_class_of_a_trained_head_or_none():
    """With a head of three classes, lists of two numbers are classes and not an entry per class."""
    task = task_of([[0, 1], [1, 0]], "x", "y", "z", kind=MultiLabel)
    assert task.label([0, 1]) == [1, 1, 0]
    assert task_of([[0, 1], [1, 0]], "x", "y", kind=MultiLabel).label([0, 1]) == [0, 1]


def test_several_classes_have_one_separator():
    with pytest.raises(ValueError, match=r"has ',' and ';' .* Separate classes by one of them"):
        task_of(["a, b", "b;c"], kind=MultiLabel)


@pytest.mark.parametrize(
    ("template", "pair_template"),
    [
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),  # BERT
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]"),  # RoBERTa
        ("[CLS] $A", "[CLS] $A $B"),  # Llama
        ("$A [SEP]", "$A [SEP] $B [SEP]"),  # T5
    ],
)
def test_special_tokens_around_a_text_stand_there_once(template, pair_template):
    """Rows that contain the special tokens are encoded like rows without them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    ids = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, pair=pair_template, special_tokens=ids
    )
    before, after = ("[CLS]" in template) * "[CLS] ", ("[SEP]" in template) * " [SEP]"
    row = {"text": "the dog", "other": "lazy [SEP] fox", "label": "yes"}
    marked = row | {
        "text": before + before + row["text"] + after,
        "other": before + row["other"] + (after and f"{after}\n"),
    }
    for pair in (None, "other"):
        arguments = DataArguments("rows.jsonl", task="classification", text_pair_field=pair)
        task = Classification(arguments, tokenizer, config_of(), ["yes", "no"])

        (expected,) = task.encode(row)
        assert task.encode(marked) == [expected]
        assert expected["input_ids"].count(tokenizer.cls_token_id) == bool(before)
        # The token in the middle belongs to the user's text.
        text = tokenizer(*[row["text"], row["other"]][: 1 + (pair is not None)])
        assert expected["input_ids"] == text["input_ids"]


def test_scores_of_numbers_and_of_several_classes():
    logits, labels = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([1.0, 3.0, 5.0])
    scores = Regression.scoring.compute_metrics(EvalPrediction(logits.numpy(), labels.numpy()))
    # Errors 0, -1, 1; covariance 10/3, variances 14/3 and 8/3.
    assert scores == {
        "rmse": pytest.approx((2 / 3) ** 0.5, rel=1e-6),
        "pearson": pytest.approx(10 / (14 * 8) ** 0.5, rel=1e-6),
    }
    logits, labels = (
        torch.tensor([[2.0, -1, 3], [-1, 1, -1]]),
        torch.tensor([[1.0, 0, 0], [0, 1, 0]]),
    )
    scores = MultiLabel.scoring.compute_metrics(EvalPrediction(logits.numpy(), labels.numpy()))
    assert scores == {"accuracy": pytest.approx(5 / 6), "exact_match": 0.5}


def test_pairs_are_cut_to_length_and_batched(tmp_path):
    rows = {
        "question": ["is it?", "is it?"],
        "passage": ["it is", "it is not " * 30],
        "answer": [["yes"], ["no", "never"]],
    }
    features = Features(
        dict.fromkeys(["question", "passage"], Value("string")) | {"answer": List(Value("string"))}
    )
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    tokenizer = tiny_tokenizer()

    data = prepare_data(
        DataArguments(
            train_data=str(tmp_path / "rows.parquet"),
            task="multi_label",
            text_field="question",
            text_pair_field="passage",
            label_field="answer",
            max_length=40,
        ),
        tokenizer,
        config_of(),
        seed=0,
    )

    batch = data.task.collator(list(data.train.dataset))
    assert batch["input_ids"].shape == (2, 40)
    assert batch["labels"].tolist() == [[0, 0, 1], [1, 1, 0]]  # never, no, yes
    whole = tokenizer(rows["question"][1], rows["passage"][1])["input_ids"]
    assert data.train.counts.cut_tokens == len(whole) - 40


@pytest.mark.parametrize("kind", ["classification", "multi_label"])
def test_a_class_has_its_name_whatever_its_number_is_in_another_table(kind, tmp_path):
    """Numbers of one table were once read by the names of another, all of them wrongly."""
    task, wrap = ("classification", lambda x: x) if kind == "classification" else (kind, List)

    def table(name, names):
        features = Features({"text": Value("string"), "label": wrap(ClassLabel(names=names))})
        rows = [
            {"text": n, "label": i if kind == "classification" else [i]}
            for i, n in enumerate(names)
        ]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    paths = [table("a.parquet", ["neg", "pos"]), table("b.parquet", ["pos", "neg", "so so"])]
    tokenizer = tiny_tokenizer()
    for arguments in ({"train_data": paths}, {"train_data": paths[:1], "eval_data": paths[1:]}):
        data = prepare_data(DataArguments(task=task, **arguments), tokenizer, config_of(), seed=0)
        assert data.task.names == ["neg", "pos", "so so"]
        for part in filter(None, (data.train, data.evaluation)):
            for example in part.dataset:
                said = data.task.describe(example["labels"])
                assert said == tokenizer.decode(example["input_ids"])


def test_a_text_of_no_token_is_left_out(tmp_path):
    """Without special tokens an empty text has no tokens, and a batch of such texts once failed."""
    rows = [{"text": text, "label": label} for text, label in [("", 0), ("x", 0), ("y", 1)]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    arguments = DataArguments(task="classification", train_data=path)
    data = prepare_data(arguments, tiny_tokenizer(), config_of(), seed=0)
    assert data.train.counts.dropped == {"empty": 1}
    assert data.train.dataset["labels"][:] == [0, 1]


@pytest.mark.parametrize(
    ("task", "learned", "scored", "unlearned"),
    [
        ("classification", ["a", "b"], ["b", "c", "c"], ["c"]),
        ("classification", ["a", "b"], ["b"], []),
        ("multi_label", [["a"], ["b"]], [["d", "a"], ["c"]], ["c", "d"]),
        ("multi_label", [["a", "b"], []], [["b"], []], []),
        ("regression", [1, 2], [3], []),
    ],
)
def test_classes_that_no_training_example_has_are_named(task, learned, scored, unlearned, tmp_path):
    """Another spelling of a class in the evaluation data used to lower the scores unnoticed."""
    paths = [
        write_jsonl(tmp_path / f"{n}.jsonl", [{"text": "x", "label": label} for label in labels])
        for n, labels in enumerate((learned, scored))
    ]
    arguments = DataArguments(paths[:1], task=task, eval_data=paths[1:])
    assert prepare_data(arguments, tiny_tokenizer(), config_of(), seed=0).unlearned == unlearned
    alone = DataArguments(paths[:1], task=task)
    assert prepare_data(alone, tiny_tokenizer(), config_of(), seed=0).unlearned == []
