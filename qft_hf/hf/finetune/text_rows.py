"""Rows of text files (json, jsonl, csv, tsv, txt), each as JSON text with its number."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa

from .task import Row, RowError

TEXT_FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
TEXT, NUMBER = "json text", "number in its source"  # names of columns


def read_text(path: str, suffix: str, version: Any) -> Iterator[Row]:
    """Yield the rows of a text file as JSON, each with its line (CSV and JSON lists: its row)."""
    newline = "" if suffix in (".csv", ".tsv") else "\n"
    stream = pa.input_stream(path)  # it decompresses
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline) as file:
        for number, text in _rows_of_text(file, suffix):
            yield {NUMBER: number, TEXT: text}


def parsed(text: str, what: str = "") -> Any:
    """Return the value of a JSON text, in which NaN is None.

    Raises:
        RowError: `what` is not valid JSON, or has invalid Unicode text or two equal fields.
    """

    def constant(name: str) -> float | None:
        return None if name == "NaN" else float(name)

    try:
        value = json.loads(text, object_pairs_hook=_fields, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode()
    except RowError:
        raise
    except UnicodeEncodeError as error:
        raise RowError(
            "half a character",
            f"{error}. A text was cut inside a character such as an emoji. Cut it before that.",
        ) from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise RowError(
            f"invalid JSON{what and f' in {what}'}", f"{error}. It begins with {text[:60]!r}."
        ) from error
    return value


def _rows_of_text(file: Any, suffix: str) -> Iterator[tuple[int, str]]:
    match suffix:
        case ".csv" | ".tsv":
            csv.field_size_limit(2**31 - 1)  # its default refuses long texts
            rows = csv.reader(file, delimiter="," if suffix == ".csv" else "\t", strict=True)
            header = next(rows, [])
            if twice := [name for name, n in Counter(header).items() if name and n > 1]:
                raise ValueError(f"more than one column is called {twice[0]!r}")
            if len(header) == 1 and {";", "\t"} & set(header[0]):
                raise ValueError(
                    f"the header is one column, {header[0]!r}. Separate columns by commas in csv, "
                    "and by tabs in tsv"
                )
            for number, values in _numbered(rows):
                cells: Any = [value or None for value in values]
                if len(cells) == len(header):
                    cells = dict(zip(header, cells, strict=True))
                if values:
                    yield number, json.dumps(cells)
        case ".json":
            text = file.read()
            if text.lstrip().startswith("["):
                yield from enumerate(_elements(text), start=1)
            else:  # one object a line
                yield from _rows_of_text(io.StringIO(text), ".jsonl")
        case _:
            for number, line in enumerate(file, start=1):
                if suffix == ".txt":
                    yield number, json.dumps({"text": line.rstrip("\r\n")})
                elif line.strip():
                    yield number, line


def _numbered(rows: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    number = 0
    try:
        for number, values in enumerate(rows, start=1):
            yield number, values
    except csv.Error as error:
        raise ValueError(
            f"row {number + 1}: {error}. A text that has quotes must be in quotes, and its own are "
            'doubled: "a ""b"" c"'
        ) from error


def _elements(text: str) -> Iterator[str]:
    """Yield each element of a JSON list as JSON; one that cannot be used, as it is written."""
    decoder = json.JSONDecoder(parse_int=str)  # of any number of digits
    skip: Any = re.compile(r"\s*,?\s*").match
    end = text.index("[") + 1
    for _ in decoder.decode(text):  # it raises for what is wrong between the elements
        begin = skip(text, end).end()
        _, end = decoder.raw_decode(text, begin)
        element = text[begin:end]
        with suppress(RowError):  # it is raised when the element is used, with its number
            element = json.dumps(parsed(element))
        yield element


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise for two equal fields, of which Python would keep the last one."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise RowError("a field twice", f"{twice!r} occurs more than once in one object.")
    return fields
