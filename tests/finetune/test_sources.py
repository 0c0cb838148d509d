"""Rows are exactly what the named files contain, each with its place."""

import errno
import gzip
import json
import math
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, disable_progress_bars
from PIL import Image

from qft_hf.hf.finetune import sources
from qft_hf.hf.finetune.task import RowError

disable_progress_bars()
ROWS = [{"text": f"text {index}, with a comma", "label": index % 3} for index in range(10)]


def load_rows(source, split="train", **options):
    """Return the rows of all parts."""
    parts = sources.load_rows(str(source), split, **options)
    return [part.read(record) for part in parts for record in part.table]


def places(source, split="train"):
    parts = sources.load_rows(str(source), split)
    return [part.place(record) for part in parts for record in part.table]


def write(path, rows=ROWS):
    """Write rows in the format of the suffix, and return the path."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.suffixes[-1] if path.suffix not in (".gz", ".zst") else path.suffixes[-2]:
        case ".json":
            lines = json.dumps(rows, indent=2)
        case ".csv" | ".tsv" as suffix:
            lines = (
                Dataset.from_list(rows)
                .to_pandas()
                .to_csv(index=False, sep="," if suffix == ".csv" else "\t")
            )
        case ".txt":
            lines = "".join(row["text"] + "\n" for row in rows)
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
            return path
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".zst":
        with pa.output_stream(path, compression="zstd") as file:
            file.write(lines.encode())
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize(
    "suffix",
    [".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".json.zst", ".csv.gz"],
)
def test_every_format_gives_the_same_rows(suffix, tmp_path):
    path = write(tmp_path / f"rows{suffix}")
    expected = ROWS
    if "sv" in suffix:  # which have only text: what a label means is the task's to say
        expected = [row | {"label": str(row["label"])} for row in ROWS]
    elif suffix == ".txt":
        expected = [{"text": row["text"]} for row in ROWS]

    assert load_rows(path) == expected
    assert load_rows(path, "train[2:4]") == expected[2:4]
    assert places(path, "train[2:4]") == [f"{path}, row 3", f"{path}, row 4"]


def test_a_row_has_its_own_fields_and_no_others(tmp_path):
    """Arrow fills a row's absent fields with null, which cannot be told from its own null."""
    rows = [
        {"call": {"city": "Oslo"}, "content": "x"},
        {"call": {"zone": None, "days": [1, "two"]}, "content": ["y"], "id": "007"},
    ]
    assert load_rows(write(tmp_path / "rows.jsonl", rows)) == rows
    assert load_rows(write(tmp_path / "rows.json", rows)) == rows

    calls = [{"call": {"city": "Oslo"}}, {"call": {"days": [{"n": 1}, {"m": 2}]}}]
    assert load_rows(write(tmp_path / "rows.parquet", calls)) == calls


def test_what_looks_like_nothing_or_a_number_stays_text_in_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\nNA,007\nnull,\n"a\nb",1.0\n')
    assert load_rows(path) == [
        {"text": "NA", "label": "007"},
        {"text": "null", "label": None},
        {"text": "a\nb", "label": "1.0"},
    ]


def test_lines_end_where_the_file_says_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b\x85c"}\r\n\n{"text": "d"}')
    assert load_rows(path) == [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    assert places(path) == [f"{path}, row 1", f"{path}, row 3"]  # as an editor counts lines


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    for rows in (ROWS, ROWS[:3]):
        assert load_rows(write(path, rows)) == rows


@pytest.mark.parametrize("name", ["a[1].jsonl", "a?.parquet", "*.csv", "a[1].jsonl.gz"])
def test_a_path_is_a_path(name, tmp_path):
    folder = tmp_path / "d[ab]"
    folder.mkdir()
    for other in ("a1", "ab", "b"):
        write(folder / (other + name[name.index(".") :]), [{"text": "another"}])
    path = write(folder / name, [{"text": "named"}])
    assert load_rows(path) == [{"text": "named"}]


def test_a_pattern_is_asked_for(tmp_path):
    for name in "ba":
        write(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert load_rows(f"glob:{tmp_path}/*.jsonl") == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(FileNotFoundError, match=r"no data file .*is given as glob:PATTERN"):
        load_rows(tmp_path / "*.jsonl")
    with pytest.raises(FileNotFoundError, match="no file matches glob:"):
        load_rows(f"glob:{tmp_path}/*.csv")


def test_a_folder_is_all_of_its_files(tmp_path):
    (tmp_path / "more").mkdir()
    names = ["a.jsonl", "b.parquet", "more/latest.json"]
    for name in names:
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("# Data\n")
    assert [row["text"] for row in load_rows(tmp_path)] == names
    assert [row["text"] for row in load_rows(tmp_path, "train[1:2]")] == ["b.parquet"]
    with pytest.raises(ValueError, match="no data file of split 'test'"):
        load_rows(tmp_path, "test")


def test_files_with_the_names_of_splits_belong_to_them(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "valid.jsonl", "my_test.jsonl"):
        write(tmp_path / name, [{"text": name}])
    assert [row["text"] for row in load_rows(tmp_path)] == ["train-0.jsonl", "train-1.jsonl"]
    assert [row["text"] for row in load_rows(tmp_path, "validation")] == ["valid.jsonl"]
    assert [row["text"] for row in load_rows(tmp_path, "test[:1]")] == ["my_test.jsonl"]

    write(tmp_path / "train-test_test.jsonl")  # once read as training data
    with pytest.raises(ValueError, match=r"has more than one split in its name \(test, train\)"):
        load_rows(tmp_path)
    (tmp_path / "train-test_test.jsonl").unlink()

    write(tmp_path / "more.jsonl")
    with pytest.raises(ValueError, match=r"some do not \(more\.jsonl\)\. List the files"):
        load_rows(tmp_path)


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ValueError, match="has no data file of split 'train'"):
        load_rows(tmp_path)


def test_configuration_of_a_dataset_with_several(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", [{"name": name}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: first\n  data_files: one.jsonl\n"
        "- config_name: second\n  data_files: two.jsonl\n---\n"
    )

    for configuration, name in (("first", "one"), ("second", "two")):
        assert load_rows(tmp_path, configuration=configuration) == [{"name": name}]


@pytest.mark.parametrize(
    "card",
    [
        "größe\n".encode("latin-1"),
        b"# Chats\n\nconfigs: none\n",
        b"---\nlicense: mit\n---\nconfigs:\n",
    ],
    ids=["another encoding", "no front matter", "text after it"],
)
def test_a_card_that_declares_no_files_changes_nothing(card, tmp_path):
    """A card in Latin-1 ended in a traceback, and its text was taken for a declaration."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{name: 1}])
    (tmp_path / "README.md").write_bytes(card)
    assert load_rows(tmp_path) == [{"a": 1}, {"b": 1}]


def test_a_card_that_cannot_be_read_says_so(tmp_path):
    write(tmp_path / "a.jsonl")
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"(?s)its README\.md is not valid YAML .* list the files"):
        load_rows(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": \n', "invalid JSON: Expecting value"),
        ("rows.jsonl", '{"text": "a"}\n[1]\n', "no fields: .* object, got '.1.'.* file .json, and"),
        ("rows.csv", "text,label\na,1\nb,2,3\n", "no fields: .* must be in quotes"),
        ("rows.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "a field twice: 'text'"),
        ("rows.jsonl", '{"text": "a"}\n{"text": {"b": 1, "b": 2}}\n', "a field twice: 'b'"),
        ("rows.tsv", "text\tlabel\na\t1\nb\n", "no fields"),
        ("rows.json", '[{"text": "a"}, "b"]', "no fields"),
        ("rows.json", '[{"text": "a"},\n{"x": 1, "y": 2, "x": 3}]', "a field twice: 'x'"),
        (
            "rows.json",
            '[{"text": "a"}, {"x": ' + "1" * 5000 + "}]",
            "invalid JSON: Exceeds the lim",
        ),
        ("rows.jsonl", '{"text": "a"}\n{"x": ' + "1" * 5000 + "}", "invalid JSON: Exceeds the lim"),
        ("rows.jsonl", '{"text": "a"}\n' + "[" * 100_000, "invalid JSON: .*(recursion|overflow)"),
        ("rows.jsonl", '{"text": "a"}\n{"text": "b \\ud83d c"}\n', "half a character: .*emoji"),
        ("rows.json", '[{"text": "a"}, {"x": ["\\udc4d"]}]', "half a character: .*emoji"),
    ],
)
def test_a_damaged_row_is_known_by_its_place(name, text, reason, tmp_path):
    (tmp_path / name).write_text(text)
    (part,) = sources.load_rows(str(tmp_path / name))
    first, second = part.table

    assert part.read(first)["text"] == "a"
    assert part.place(second) == f"{tmp_path / name}, row 2"
    with pytest.raises(RowError, match=reason):
        part.read(second)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[1,"),
        ("a.json", b"[1]\n[2]"),
        ("a.json", b"[1 2]"),
        ("a.json", b"[1, 2,]"),
        ("a.json", b"[, 1]"),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl", b"\xff\xff"),
        ("a.parquet", b"x"),
    ],
)
def test_damaged_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read .*{name}"):
        load_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", 'x,text\n1,a\n2,"b\n3,c\n'),  # all that follows would be one text
        ("rows.csv", 'x,text\n1,a\n2,"b" c\n3,d\n'),
        ("rows.tsv", 'x\ttext\n1\ta\n2\t"b" c\n3\td\n'),  # it would lose its quotes
    ],
    ids=["no end", "text behind the end", "tsv"],
)
def test_quotes_that_say_nothing_clear_are_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"rows\..sv: row 2: .* its own are doubled"):
        load_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "header"),
    [("a.csv", "text;label"), ("a.csv", "text\tlabel"), ("a.tsv", "text;label")],
)
def test_another_separator_is_named(name, header, tmp_path):
    """Such a table once had one column, and `label` held fewer than two classes."""
    (tmp_path / name).write_text(f"{header}\nthe fox, 2{header[4]}good\n")
    with pytest.raises(
        ValueError, match=r"is one column, 'text[;\\].*by commas in csv, and by tabs"
    ):
        load_rows(tmp_path / name)


def test_separators_may_stand_in_names_and_texts(tmp_path):
    (tmp_path / "a.csv").write_text("a;b,c\n1;2,3\n")
    (tmp_path / "b.csv").write_text("text\n1;2\n")
    assert load_rows(tmp_path / "a.csv") == [{"a;b": "1;2", "c": "3"}]
    assert load_rows(tmp_path / "b.csv") == [{"text": "1;2"}]


def test_a_number_that_is_none_is_no_value(tmp_path):
    """Pandas writes missing values so; one once became the text "nan" of an instruction."""
    (tmp_path / "a.jsonl").write_text('{"x": NaN, "y": [NaN, -Infinity], "z": "NaN"}\n')
    assert load_rows(tmp_path / "a.jsonl") == [{"x": None, "y": [None, -math.inf], "z": "NaN"}]
    Dataset.from_dict({"x": [float("nan"), 1.0]}).to_parquet(tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet") == [{"x": None}, {"x": 1.0}]


def test_classes_of_a_table_have_the_names_that_it_declares(tmp_path):
    kind = ClassLabel(names=["neg", "pos"])
    features = Features({"one": kind, "several": List(kind)})
    rows = [{"one": 1, "several": [1, 0]}, {"one": -1, "several": []}, {"one": None}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet") == [
        {"one": "pos", "several": ["pos", "neg"]},
        {"one": None, "several": []},
        {"one": None, "several": None},
    ]


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.json.gz", "nowhere/at/all"])
def test_missing_file_is_not_taken_for_a_hub_name(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file .*nowhere.* Correct the path"):
        load_rows(tmp_path / name)


def test_of_two_equal_columns_none_is_chosen(tmp_path):
    """The last one was once used, and the column that was meant was never read."""
    (tmp_path / "a.csv").write_text("x,y,x\n1,2,3\n")
    with pytest.raises(ValueError, match=r"cannot read .*'x'"):
        load_rows(tmp_path / "a.csv")


def test_columns_without_a_name_may_be_many(tmp_path):
    (tmp_path / "a.csv").write_text("text,,\nhi,,\n")  # as a spreadsheet writes them
    assert load_rows(tmp_path / "a.csv")[0]["text"] == "hi"


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_another_encoding_is_refused_with_what_to_do(name, encoding, tmp_path):
    (tmp_path / name).write_text("text\nGrüße\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"not in UTF-8\. Save it as UTF-8"):
        load_rows(tmp_path / name)


def test_a_full_disk_is_not_taken_for_a_missing_data_set(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qft_hf.hf.finetune.sources.load_dataset", full)
    with pytest.raises(OSError, match="No space left") as raised:
        load_rows("someone/chats")
    assert not isinstance(raised.value, FileNotFoundError)


@pytest.mark.parametrize("name", ["chats", "folder/chats", "a.jsonl "])
def test_what_is_neither_here_nor_on_the_hub_is_refused(name, tmp_path, monkeypatch):
    """Such a name once ended in a traceback from `datasets`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no file or folder '{name}' .looked.*Correct it"):
        sources.load_rows(name)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_cache_that_cannot_be_written_is_refused(suffix, tmp_path, monkeypatch):
    """`qft-hf check` and `finetune` ended in a traceback of `datasets`."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    for folder in (tmp_path / "a.jsonl", tmp_path / "a.jsonl" / "inside"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)

        with pytest.raises(OSError, match=r"in which no file can .*\. Set HF_DATASETS_CACHE in"):
            sources.load_rows(str(tmp_path / f"a.{suffix}"))


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.parquet.gz"])
def test_unknown_file_format_is_refused(name, tmp_path):
    (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=r"one of \.json, \.jsonl, \.csv, .* Convert it to jsonl"):
        load_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", ""), ("b.json", " \n"), ("c.csv", ""), ("d.csv", "text,y\n"), ("e.json", "[]")],
)
def test_file_without_rows_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"has no rows: it is empty\. Remove it"):
        load_rows(tmp_path / name)


def test_a_table_without_rows_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, .*: it has no rows\. Remove it"):
        load_rows(path)


@pytest.mark.parametrize(
    ("split", "message"), [("train[:0]", "has no rows"), ("test", "are the split 'train'")]
)
def test_split_that_is_not_there_is_refused(split, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / "rows.jsonl"), split)


def parts_of(*sizes):
    first = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        sources.Rows(Dataset.from_dict({"id": range(start, start + size)}), "file")
        for start, size in zip(first, sizes, strict=True)
    ]


def ids_of(parts):
    return [index for part in parts for index in part.table["id"]]


@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 3, 8], [9, 4, 0], [5], range(10), range(4, 99)])
def test_rows_are_numbered_through_all_files(indices):
    chosen = ids_of(sources.select_rows(parts_of(3, 5, 2), indices))

    assert sorted(chosen) == sorted(index for index in indices if index < 10)


@pytest.mark.parametrize(("fraction", "n_eval"), [(0.1, 1), (0.25, 2), (0.5, 5), (0.94, 9)])
def test_split_is_disjoint_complete_and_the_same_for_a_seed(fraction, n_eval):
    def split(seed):
        return [ids_of(part) for part in sources.split_rows(parts_of(3, 7), fraction, seed)]

    train, evaluation = split(3)
    assert len(evaluation) == n_eval
    assert sorted([*train, *evaluation]) == list(range(10))
    assert split(3) == [train, evaluation]
    assert any(split(seed)[1] != evaluation for seed in range(9))


def test_a_fingerprint_is_of_contents(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "n": 1.5}]
    known = {
        name: sources.fingerprint(sources.load_rows(str(write(tmp_path / name, some))))
        for name, some in {
            "a.jsonl": rows,
            "b.jsonl": rows,
            "c.jsonl": rows[::-1],
            "d.jsonl": rows[:1],
            "e.jsonl": [rows[0], rows[1] | {"n": 1.0}],
            "f.parquet": rows,
        }.items()
    }
    assert known["a.jsonl"] == known["b.jsonl"]
    assert len(set(known.values())) == 5


def test_a_fingerprint_of_rows_with_images_is_always_the_same(tmp_path):
    """It once had the address of each decoded image in memory."""
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    columns = {"text": ["a", "b"], "image": images}
    features = Features({"text": Value("string"), "image": datasets.Image()})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    first, second = (sources.load_rows(str(tmp_path / "rows.parquet")) for _ in range(2))
    assert sources.fingerprint(first) == sources.fingerprint(second)
    assert isinstance(first[0].table[0]["image"], Image.Image)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.99, 1.0, -0.5])
def test_split_with_an_empty_part_is_refused(fraction):
    with pytest.raises(ValueError, match=r"both need at least one\. Change eval_fraction"):
        sources.split_rows(parts_of(10), fraction, seed=0)


@pytest.mark.parametrize("kind", ["data set", "splits"])
def test_what_save_to_disk_wrote_is_named(kind, tmp_path, monkeypatch):
    """The folder's JSON files were once read as data and refused for a missing field."""
    rows = Dataset.from_list([{"text": "a"}])
    saved = rows if kind == "data set" else DatasetDict({"train": rows})
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"save_to_disk.* Write parquet, in Python: ") as refused:
        load_rows(str(tmp_path / "saved"))
    monkeypatch.chdir(tmp_path)
    eval(re.search(r"datasets\.load_from_disk.*to_parquet\(.*?\)", str(refused.value))[0])
    assert load_rows("train.parquet") == [{"text": "a"}]
