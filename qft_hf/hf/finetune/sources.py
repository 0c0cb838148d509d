"""Loads rows of files, folders and hub data sets, each with its position in the source.

Rows of text files (json, jsonl, csv, tsv, txt) are kept as JSON text and parsed when they are used:
Arrow would give each row the fields of all others, and guess types. Parquet and hub data sets are
Arrow already; the empty entries that Arrow has filled in inside a field are removed again.
"""

import glob
import hashlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import yaml
from datasets import ClassLabel, Dataset, Features, List, ReadInstruction, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..wording import counted
from .paths import GLOB
from .task import Row, RowError
from .text_rows import NUMBER, TEXT, TEXT_FORMATS, parsed, read_text

FORMATS = (*TEXT_FORMATS, ".parquet")
COMPRESSIONS = (".gz", ".zst")

_SPLIT_IN_NAME = re.compile(
    r"(?<![a-z])(?:(train)(?:ing)?|(test)(?:ing)?|(val)(?:id(?:ation)?)?|(dev)|(eval))(?![a-z])"
)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one file, or of one data set on the hub."""

    table: Dataset
    source: str
    weight: float = 1.0  # how often each row occurs in an epoch
    split: str = ""  # of a hub data set, whose rows are numbered within each split

    def read(self, record: Row) -> Row:
        """Return a row of the table as in its source; a class number becomes the class name.

        NaN, which pandas writes for a missing value, becomes None.

        Raises:
            RowError: The row is not an object with named fields, or has invalid Unicode text.
        """
        if TEXT not in record:
            kinds = self.table.features
            row = {name: _from_arrow(value, kinds[name]) for name, value in record.items()}
            del row[NUMBER]
            return row
        value = parsed(record[TEXT])
        if isinstance(value, dict):
            return value
        advice = ""
        if isinstance(value, list):
            advice = (
                " A row of csv or tsv needs a cell for each column of the header, and a text with "
                "separators, quotes or line breaks must be in quotes. A list of all rows is a file "
                ".json, and not .jsonl."
            )
        text = record[TEXT].strip()[:60]
        raise RowError("no fields", f"expected an object, got {text!r}.{advice}")

    def class_names(self, name: str) -> list[str]:
        """Return the classes that the data declare for a field, in order; may be empty."""
        kind = self.table.features.get(name)
        kind = kind.feature if isinstance(kind, List) else kind
        return list(kind.names) if isinstance(kind, ClassLabel) else []

    def place(self, record: Row) -> str:
        """Return the source and the number of a row, for an error message."""
        return f"{self.source}, row {record[NUMBER]}"


def load_rows(source: str, split: str = "train", *, configuration: str | None = None) -> list[Rows]:
    """Load one split of a data set.

    Args:
        source: A file of one of `FORMATS`, also with a suffix of `COMPRESSIONS`; a folder of these
            files; `GLOB` and a pattern of files; or a data set's hub name.
        split: Split, or slice of one (`train[:1000]`). The rows of a file are `train`; files of a
            folder belong to the split in their names.
        configuration: Which configuration, if a data set on the hub has several.

    Returns:
        One entry per file, with at least one row in all.

    Raises:
        FileNotFoundError: `source` does not exist.
        OSError: The cache of `datasets` cannot be written.
        ValueError: There are no rows, or a file cannot be read.
    """
    path = Path(source)
    if source.startswith(GLOB):
        files = [Path(name) for name in sorted(glob.glob(source[len(GLOB) :], recursive=True))]
        if not files:
            raise FileNotFoundError(f"no file matches {source} (looked from {Path.cwd()}).")
        rows = [_load_file(file) for file in files]
    elif path.is_dir() and configuration is None and not _declares_its_files(path):
        rows = [_load_file(file) for file in _files_of_split(path, split)]
    elif path.is_file():
        rows = [_load_file(path)]
    elif path.is_dir() or not _looks_like_a_path(source):
        return [_load_data_set(source, split, configuration)]
    else:
        raise FileNotFoundError(
            f"no data file {source!r} (looked from {Path.cwd()}). Correct the path in train_data "
            f"or eval_data. A pattern of files is given as {GLOB}PATTERN, several files as a list; "
            "a data set on the hub by its name, without a suffix."
        )
    return _slice(rows, split, source)


def select_rows(parts: Sequence[Rows], indices: Sequence[int]) -> list[Rows]:
    """Return some of the rows, by their indices in all parts together."""
    chosen, first, wanted = [], 0, np.asarray(indices)
    for part in parts:
        last = first + len(part.table)
        inside = wanted[(wanted >= first) & (wanted < last)] - first
        chosen.append(replace(part, table=part.table.select(inside)))
        first = last
    return [part for part in chosen if len(part.table)]


def count_shared(parts: Sequence[Rows], others: Sequence[Rows]) -> dict[str, int]:
    """Return the number of rows that are in both, by source; sources without any are left out."""
    counts = Counter[str]()
    for rows in others:
        for part in parts:
            is_same = os.path.realpath(part.source) == os.path.realpath(rows.source)
            if is_same and part.split == rows.split:
                counts[rows.source] += len(np.intersect1d(part.table[NUMBER], rows.table[NUMBER]))
    return {source: n for source, n in counts.items() if n}


@cache
def code_hash() -> str:
    """Return a hash of this package, whose code reads rows and makes examples of them."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def fingerprint(parts: Sequence[Rows]) -> str:
    """Return a checksum of the contents of rows in their order; their places have no effect."""
    digest = hashlib.sha256()
    for part in parts:
        for batch in part.table.with_format("arrow").iter(1000):  # images are not decoded
            for record in batch.to_pylist():
                row = {name: value for name, value in record.items() if name != NUMBER}
                digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:16]


def split_rows(
    parts: Sequence[Rows], eval_fraction: float, seed: int
) -> tuple[list[Rows], list[Rows]]:
    """Split rows into training and evaluation: each row in exactly one, the same rows for a seed.

    Raises:
        ValueError: A part would be empty.
    """
    n_rows = sum(len(part.table) for part in parts)
    n_eval = round(n_rows * eval_fraction)
    if not 0 < n_eval < n_rows:
        raise ValueError(
            f"eval_fraction {eval_fraction} of {counted(n_rows, 'row')} leaves {n_rows - n_eval} "
            f"to train on and {n_eval} to evaluate on; both need at least one. "
            "Change eval_fraction."
        )
    indices = Dataset.from_dict({"index": range(n_rows)})
    drawn = indices.train_test_split(test_size=n_eval, seed=seed)
    return select_rows(parts, drawn["train"]["index"]), select_rows(parts, drawn["test"]["index"])


def _load_file(path: Path) -> Rows:
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if plain.suffix not in FORMATS or (plain != path and plain.suffix == ".parquet"):
        raise ValueError(
            f"a data file must be one of {', '.join(FORMATS)}, the first {len(TEXT_FORMATS)} also "
            f"with {' or '.join(COMPRESSIONS)} after it, got {path}. Convert it to jsonl: one "
            "JSON object per line."
        )
    if plain.suffix == ".parquet":
        return _load_data_set("parquet", "train", None, file=path)
    status = path.stat()
    _refuse_unwritable_cache()
    try:
        table = Dataset.from_generator(
            read_text,
            features=Features({NUMBER: Value("int64"), TEXT: Value("string")}),
            gen_kwargs={
                "path": str(path.resolve()),
                "suffix": plain.suffix,
                # Part of the cache key: a changed file is read again, and any by changed code.
                "version": (status.st_mtime_ns, status.st_size, code_hash()),
            },
        )
    except DatasetGenerationError as error:
        raise ValueError(_unreadable(path, error)) from error
    except ValueError as error:  # `datasets` raises it for a table without rows
        raise ValueError(f"{path} has no rows: it is empty. Remove it or fill it.") from error
    return Rows(table, str(path))


def _load_data_set(
    name: str, split: str, configuration: str | None, *, file: Path | None = None
) -> Rows:
    # `load_dataset` reads a path as a pattern.
    files = {} if file is None else {"data_files": glob.escape(str(file))}
    source = str(file or name)
    _refuse_unwritable_cache()
    try:
        if file is not None and pq.read_metadata(file).num_rows == 0:
            raise ValueError("it has no rows. Remove it or fill it.")
        table = load_dataset(name, configuration, split=split, **files)
    except OSError as error:
        if file is not None or error.errno is not None:  # as of a full disk
            raise
        raise FileNotFoundError(
            f"no file or folder {source!r} (looked from {Path.cwd()}), and no data set of this "
            f"name was found on the hub: {error}. Correct it in train_data or eval_data."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"cannot read {source}: its README.md is not valid YAML between `---` and `---`: "
            f"{error}. Correct it, or list the files themselves: train_data: [A, B]."
        ) from error
    except ValueError as error:  # the split is unknown, or has no rows at all
        raise ValueError(f"cannot read {source}, split {split!r}: {error}") from error
    except DatasetGenerationError as error:
        raise ValueError(_unreadable(source, error)) from error
    return Rows(table.add_column(NUMBER, np.arange(1, len(table) + 1)), source, split=split)


def _refuse_unwritable_cache() -> None:
    """Raise OSError if `datasets` cannot write the rows that it has read."""
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"data are prepared in the folder {folder}, in which no file can be written: "
            f"{error.strerror}. Set HF_DATASETS_CACHE in the environment to another folder."
        ) from error


def _slice(parts: list[Rows], split: str, source: str) -> list[Rows]:
    n_rows = sum(len(part.table) for part in parts)
    name = re.split(r"\W", split)[0] if Path(source).is_dir() else "train"
    try:
        ranges = ReadInstruction.from_spec(split).to_absolute({name: n_rows})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"cannot take split {split!r} from {source}: {error} The rows of a file are the split "
            "'train'."
        ) from error
    rows = select_rows(parts, [row for part in ranges for row in range(part.from_, part.to)])
    if not rows:
        raise ValueError(f"split {split!r} of {source} has no rows. Expected one row per example.")
    return rows


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Return the files of a split: those with its name; if no file names a split, all are train."""
    has_splits = (folder / "dataset_dict.json").is_file()
    if has_splits or any(folder.glob("data-*-of-*.arrow")):
        one = "['train']" if has_splits else ""
        raise ValueError(
            f"{folder} was written by save_to_disk, so its JSON files are not data. Write parquet, "
            f"in Python: datasets.load_from_disk({str(folder)!r}){one}.to_parquet('train.parquet')"
            f"{', and so for each split' if has_splits else ''}."
        )
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.with_suffix("" if path.suffix in COMPRESSIONS else path.suffix).suffix in FORMATS
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    named = {path: _split_in_name(path.relative_to(folder)) for path in files}
    without = [path.name for path, name in named.items() if name is None]
    if 0 < len(without) < len(files):
        raise ValueError(
            f"some files of the folder {folder} have a split in their names, and some do not "
            f"({', '.join(without)}). List the files themselves: train_data: [A, B]."
        )
    wanted = _split_in_name(Path(re.split(r"\W", split)[0])) or split
    chosen = [path for path, name in named.items() if (name or "train") == wanted]
    if not chosen:
        raise ValueError(
            f"the folder {folder} has no data file of split {split!r}: it holds "
            f"{[path.name for path in files]}, and formats are {', '.join(FORMATS)}."
        )
    return chosen


def _split_in_name(path: Path) -> str | None:
    """Return the split in a name, None if there is none; raise ValueError if there are several."""
    found = _SPLIT_IN_NAME.finditer(path.as_posix().lower())
    splits = {match[match.lastindex or 0] for match in found}
    splits = {split if split in ("train", "test") else "validation" for split in splits}
    if len(splits) > 1:
        raise ValueError(
            f"{path} has more than one split in its name ({', '.join(sorted(splits))}), so it is "
            "not clear which one is meant. List the files themselves: train_data: [A, B]."
        )
    return splits.pop() if splits else None


def _declares_its_files(folder: Path) -> bool:
    """Whether a data set card says which files belong to which split."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    front = re.match(r"\s*---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    return front is not None and re.search(r"^configs:", front[1], re.MULTILINE) is not None


def _looks_like_a_path(source: str) -> bool:
    suffixes = (*FORMATS, *COMPRESSIONS)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(suffixes)


def _from_arrow(value: Any, kind: Any) -> Any:
    """Return a value of a column; the number of a class becomes its name."""
    if isinstance(kind, List) and isinstance(kind.feature, ClassLabel) and value is not None:
        return [_from_arrow(entry, kind.feature) for entry in value]
    if isinstance(kind, ClassLabel) and value is not None:
        return kind.names[value] if value >= 0 else None
    return _without_absent(value)


def _without_absent(value: Any) -> Any:
    """Return a value without the fields that only other rows have, and without NaN."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {name: _without_absent(v) for name, v in value.items() if v is not None}
    return [_without_absent(entry) for entry in value] if isinstance(value, list) else value


def _unreadable(source: Path | str, error: Exception) -> str:
    if isinstance(error.__cause__, UnicodeDecodeError):
        return f"cannot read {source}: it is not in UTF-8. Save it as UTF-8."
    return (
        f"cannot read {source}: {error.__cause__}. Expected one row per example, all with the same "
        "fields; jsonl has one JSON object per line."
    )
