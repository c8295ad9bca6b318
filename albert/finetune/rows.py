"""Rows of TSV, CSV and JSON (lines or one array) files, each with its number in the file. Imports no torch.

Tolerates a byte order mark, Windows line ends, blank lines, and literal quotes in TSV files (GLUE and
LCQMC quote nothing). A row that cannot be read is yielded as `BadRow`: the caller reports all of them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert.errors import DataError, MissingInputError


@dataclass(frozen=True)
class Row:
    """One row: cells of a delimited file, or the object of a JSON file."""

    number: int
    """Counted from 1: the line, or the element of a JSON array."""
    cells: list[str] | None = None
    fields: dict[str, Any] | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    number: int
    reason: str


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a file by its suffix: .csv has commas and quotes, .json and .jsonl JSON, anything else tabs.

    Raises:
        MissingInputError: no such file, or it is empty.
        DataError: a .json file is neither lines of objects nor an array of objects.
    """
    data = _read(path)
    if path.suffix in {".json", ".jsonl"}:
        return _json_rows(path, data)
    return _csv_rows(path, data) if path.suffix == ".csv" else _tab_rows(data)


def read_lines(path: Path) -> Iterator[tuple[int, str | BadRow]]:
    """Numbered lines of a file, blank ones included.

    Raises:
        MissingInputError: no such file, or it is empty.
    """
    return _lines(_read(path))


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise MissingInputError(f"{path}: the file is empty")
    return data


def _lines(data: bytes) -> Iterator[tuple[int, str | BadRow]]:
    """Lines; only LF and CR LF end one, since texts may hold other Unicode separators."""
    for number, raw in enumerate(data.split(b"\n"), start=1):
        try:
            yield number, raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, BadRow(number, f"byte {error.start} is not UTF-8")


def _tab_rows(data: bytes) -> Iterator[Row | BadRow]:
    for number, line in _lines(data):
        if isinstance(line, BadRow):
            yield line
        elif line.strip():
            yield Row(number, cells=line.split("\t"))


def _csv_rows(path: Path, data: bytes) -> Iterator[Row | BadRow]:
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)
        for cells in reader:
            if cells:
                yield Row(reader.line_num, cells=cells)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8; convert the file to UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}; a .csv file needs CSV quoting") from error


def _json_rows(path: Path, data: bytes) -> Iterator[Row | BadRow]:
    if data.lstrip().startswith(b"["):
        yield from _json_array(path, data)
        return
    for number, line in _lines(data):
        if isinstance(line, BadRow):
            yield line
            continue
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            yield BadRow(number, f"not JSON ({error.msg})")
            continue
        yield Row(number, fields=fields) if isinstance(fields, dict) else BadRow(number, "not a JSON object")


def _json_array(path: Path, data: bytes) -> Iterator[Row | BadRow]:
    try:
        elements = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); one object per line or one array of objects") from error
    for number, fields in enumerate(elements, start=1):
        yield Row(number, fields=fields) if isinstance(fields, dict) else BadRow(number, "not a JSON object")
