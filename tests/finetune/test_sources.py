"""Rows from files, and the cut into training and evaluation."""

import json

import pytest
from datasets import Dataset

from qft_hf.hf.finetune.sources import load_rows, require_fields, split_rows

ROWS = [{"text": f"text {index}, with a comma", "label": index % 3} for index in range(10)]


def write(folder, suffix):
    path = folder / f"rows{suffix}"
    rows = Dataset.from_list(ROWS)
    match suffix:
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".jsonl":
            rows.to_json(path)
        case ".csv":
            rows.to_csv(path)
        case ".parquet":
            rows.to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(suffix, tmp_path):
    assert load_rows(write(tmp_path, suffix), "train").to_list() == ROWS
    assert load_rows(write(tmp_path, suffix), "train[2:4]").to_list() == ROWS[2:4]


def test_folder_of_files(tmp_path):
    write(tmp_path, ".jsonl")
    assert load_rows(str(tmp_path), "train").to_list() == ROWS


def test_configuration_of_a_dataset_with_several(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}) + "\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: first\n  data_files: one.jsonl\n"
        "- config_name: second\n  data_files: two.jsonl\n---\n"
    )

    for configuration, name in (("first", "one"), ("second", "two")):
        rows = load_rows(str(tmp_path), "train", configuration=configuration)
        assert rows.to_list() == [{"name": name}]


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"cannot read .*rows\.jsonl: .*one JSON object a line"):
        load_rows(str(tmp_path / "rows.jsonl"), "train")


def test_missing_file_is_not_taken_for_a_hub_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file .*nowhere\.jsonl .*Correct the pa"):
        load_rows(str(tmp_path / "nowhere.jsonl"), "train")


def test_unknown_file_format_is_refused(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("text")
    with pytest.raises(ValueError, match=r"one of \.json, \.jsonl, \.csv, .* Convert it to jsonl"):
        load_rows(str(path), "train")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("b.json", " \n"), ("c.csv", "")])
def test_empty_file_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"is empty\. Expected one row an example"):
        load_rows(str(tmp_path / name), "train")


@pytest.mark.parametrize(("name", "text"), [("a.csv", "text,label\n"), ("b.json", "[]")])
def test_file_without_rows_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"cannot take split 'train' .* Expected one row an exam"):
        load_rows(str(tmp_path / name), "train")


@pytest.mark.parametrize("split", ["train[:0]", "test"])
def test_split_that_is_not_there_is_refused(split, tmp_path):
    with pytest.raises(ValueError, match=r"cannot take split .* are the split 'train'"):
        load_rows(write(tmp_path, ".jsonl"), split)


def test_missing_field_names_those_that_are_there():
    with pytest.raises(ValueError, match=r"the data has no field 'messages'.* are 'text', 'label'"):
        require_fields(Dataset.from_list(ROWS), ["text", "messages"], "the data")


@pytest.mark.parametrize(("fraction", "n_eval"), [(0.1, 1), (0.25, 2), (0.5, 5), (0.94, 9)])
def test_split_is_disjoint_complete_and_the_same_for_a_seed(fraction, n_eval):
    rows = Dataset.from_dict({"id": range(10)})

    train, evaluation = split_rows(rows, fraction, seed=3)

    assert len(evaluation) == n_eval
    assert sorted([*train["id"], *evaluation["id"]]) == list(range(10))
    again_train, again = split_rows(rows, fraction, seed=3)
    assert (again_train["id"][:], again["id"][:]) == (train["id"][:], evaluation["id"][:])
    assert any(split_rows(rows, fraction, seed=s)[1]["id"][:] != again["id"][:] for s in range(9))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.99, 1.0, -0.5])
def test_split_with_an_empty_part_is_refused(fraction):
    with pytest.raises(ValueError, match=r"both need at least one\. Change eval_fraction"):
        split_rows(Dataset.from_dict({"id": range(10)}), fraction, seed=0)
