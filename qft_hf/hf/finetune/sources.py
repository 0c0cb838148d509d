"""Rows of a dataset, from a local file, a folder or the hub, cut into training and evaluation."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(source: str, split: str, *, configuration: str | None = None) -> Dataset:
    """Load one split of a dataset.

    Args:
        source: A json, jsonl, csv or parquet file, a folder of such files, or a dataset's hub name.
        split: Split, or slice of one (`train[:1000]`). The rows of a single file are `train`.
        configuration: Which of its parts, if a dataset on the hub has several.

    Returns:
        The rows, at least one.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: There are no rows, or the file cannot be read.
    """
    path = Path(source)
    file_format = FILE_FORMATS.get(path.suffix)
    if path.is_file():
        _check_file(path)
        request = {"path": file_format, "data_files": source}
    elif file_format is not None:
        raise FileNotFoundError(
            f"no data file {source} (looked from {Path.cwd()}). Correct the path in train_data or "
            "eval_data; a dataset on the hub is given by its name, without a suffix."
        )
    else:
        request = {"path": source, "name": configuration}
    try:
        return load_dataset(**request, split=split)
    except ValueError as error:  # of the split: unknown, or it has no rows at all
        raise ValueError(
            f"cannot take split {split!r} from {source}: {error} Expected one row an example; the "
            "rows of a single file are the split 'train'."
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(
            f"cannot read {source}: {error.__cause__}. Expected one row an example, all with the "
            "same fields; jsonl has one JSON object a line."
        ) from error


def _check_file(path: Path) -> None:
    if path.suffix not in FILE_FORMATS:
        raise ValueError(
            f"a data file must be one of {', '.join(FILE_FORMATS)}, got {path}. Convert it to "
            "jsonl: one JSON object a line."
        )
    with path.open("rb") as file:
        if not file.read(4096).strip():
            raise ValueError(f"{path} is empty. Expected one row an example.")


def require_fields(rows: Dataset, fields: Sequence[str], source: str) -> None:
    """Check that every row has the fields a task reads.

    Raises:
        ValueError: One is missing; lists the fields that are there.
    """
    missing = [field for field in fields if field not in rows.column_names]
    if missing:
        raise ValueError(
            f"{source} has no field {', '.join(map(repr, missing))}. Its fields are "
            f"{', '.join(map(repr, rows.column_names))}: name the right one in the config "
            "(messages_field, text_field, text_pair_field or label_field)."
        )


def split_rows(rows: Dataset, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Cut rows into training and evaluation: each row in exactly one, the same rows for a seed.

    Raises:
        ValueError: A part would be empty.
    """
    n_eval = round(len(rows) * eval_fraction)
    if not 0 < n_eval < len(rows):
        raise ValueError(
            f"eval_fraction {eval_fraction} of {len(rows)} rows leaves {len(rows) - n_eval} to "
            f"train on and {n_eval} to evaluate on; both need at least one. Change eval_fraction."
        )
    parts = rows.train_test_split(test_size=n_eval, seed=seed)
    return parts["train"], parts["test"]
