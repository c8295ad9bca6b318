"""Data files of a task -> examples; bad rows are rejected by number and reason. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albert.errors import DataError, MissingInputError
from albert.finetune.examples import Example, TagExample, TextExample
from albert.finetune.rows import BadRow, Row, read_rows
from albert.finetune.task_definition import Column, Columns, Task
from albert.finetune.transforms import TRANSFORMS

_SHOWN_BAD_ROWS = 5
_UNLABELLED = {"", "-1"}
"""What benchmarks write into the label column of a test file."""


@dataclass(frozen=True)
class Split:
    """The examples of one file."""

    name: str
    path: Path
    examples: tuple[Example, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows left out: without an agreed label, or bad and `--skip-bad-rows` was given."""


def find_file(task: Task, data_dir: Path, split: str) -> Path:
    """The file of a split.

    Raises:
        MissingInputError: none of the accepted names is there; lists them and what is there.
    """
    if not data_dir.is_dir():
        raise MissingInputError(f"--data-dir {data_dir}: no such directory")
    for name in task.files.get(split, ()):
        if (data_dir / name).exists():
            return data_dir / name
    present = ", ".join(sorted(path.name for path in data_dir.iterdir())[:10]) or "nothing"
    wanted = ", ".join(task.files.get(split, ())) or "(the task has no such split)"
    raise MissingInputError(
        f"{data_dir}: no {split} file of {task.name}; wanted one of {wanted}; found {present}"
    )


def read_split(
    task: Task,
    data_dir: Path,
    split: str,
    *,
    labels: Sequence[str] | None = None,
    skip_bad_rows: bool = False,
) -> Split:
    """Read and check one split of a task.

    Args:
        task: what the files look like.
        data_dir: where they are.
        split: train, dev or test; only a test file may be without labels.
        labels: the allowed labels; None takes the task's, and where it has none accepts any.
        skip_bad_rows: leave bad rows out, with a count, instead of refusing the file.

    Raises:
        MissingInputError: the file is not there or empty.
        DataError: bad rows, each by number and reason, or a wrong set of labels.
    """
    path = find_file(task, data_dir, split)
    allowed = tuple(labels) if labels is not None else task.labels
    examples: Sequence[Example]
    if task.form == "rows":
        examples, bad, unagreed = _read_text_rows(task, path, split, allowed)
    else:
        from albert.finetune.structured import READERS

        examples, bad = READERS[task.form](path, split)
        unagreed = 0
    skipped = {"without an agreed label": unagreed} if unagreed else {}
    if bad and not skip_bad_rows:
        raise DataError(_describe_bad_rows(path, bad, len(examples)))
    if bad:
        skipped["bad"] = len(bad)
    if not examples:
        raise DataError(
            f"{path}: no usable row; {_describe_bad_rows(path, bad, 0) if bad else 'header only'}"
        )
    _check_all_or_none_labelled(path, examples)
    return Split(split, path, tuple(examples), skipped)


def _check_all_or_none_labelled(path: Path, examples: Sequence[Example]) -> None:
    labelled = Counter(example.is_labelled for example in examples)
    if labelled[True] and labelled[False]:
        first = next(number for number, example in enumerate(examples, start=1) if not example.is_labelled)
        raise DataError(
            f"{path}: {labelled[True]} examples have a label and {labelled[False]} have none "
            f"(the first is example {first}); label all of them or none"
        )


def collect_labels(examples: Iterable[Example]) -> tuple[str, ...]:
    """The labels of a training file: `O` first, numbers in numeric order, then names in alphabetical order."""
    found: set[str] = set()
    for example in examples:
        if isinstance(example, TagExample):
            found.update(example.tags or ())
        elif isinstance(example, TextExample) and example.label is not None:
            found.add(example.label)
    return tuple(sorted(found, key=_label_order))


def _label_order(label: str) -> tuple[int, int, str]:
    if label == "O":
        return (0, 0, "")
    return (1, int(label), "") if label.isdigit() else (2, 0, label)


def _describe_bad_rows(path: Path, bad: list[BadRow], good: int) -> str:
    shown = "; ".join(f"row {row.number}: {row.reason}" for row in bad[:_SHOWN_BAD_ROWS])
    more = f"; and {len(bad) - _SHOWN_BAD_ROWS} more" if len(bad) > _SHOWN_BAD_ROWS else ""
    return (
        f"{path}: {len(bad)} bad of {len(bad) + good} rows: {shown}{more}; "
        "correct them, or leave them out with --skip-bad-rows"
    )


def _read_text_rows(
    task: Task, path: Path, split: str, allowed: tuple[str, ...] | None
) -> tuple[list[TextExample], list[BadRow], int]:
    """Examples, bad rows, and the number of rows whose label says that people did not agree."""
    columns = task.test_columns if split == "test" and task.test_columns else task.columns
    if columns is None:
        raise ValueError(f"task {task.name} has no columns")
    reader = _RowReader(task, columns, split, allowed)
    for row in read_rows(path):
        reader.add(row, path)
    return reader.examples, reader.bad, reader.unagreed


class _RowReader:
    """Turns rows into examples; the first row of a delimited file may be a header."""

    def __init__(self, task: Task, columns: Columns, split: str, allowed: tuple[str, ...] | None) -> None:
        self.task = task
        self.columns = columns
        self.split = split
        self.allowed = allowed
        self.examples: list[TextExample] = []
        self.bad: list[BadRow] = []
        self.unagreed = 0
        self._pick: Callable[[Row, Column], str | None] | None = None

    def add(self, row: Row | BadRow, path: Path) -> None:
        """Take the next row."""
        if isinstance(row, BadRow):
            self.bad.append(row)
            return
        if self._pick is None and row.cells is not None:
            header = _header(row.cells, self.columns)
            self._pick = _by_header(header) if header else _by_position(self.columns, path)
            if header:
                return
        try:
            self._append(row, self._pick or _by_key(self.task.transform))
        except _BadCellError as error:
            self.bad.append(BadRow(row.number, str(error)))

    def _append(self, row: Row, pick: Callable[[Row, Column], str | None]) -> None:
        text_a = _text(pick(row, self.columns.text_a), self.columns.text_a, row)
        second = self.columns.text_b
        text_b = _text(pick(row, second), second, row) if second else None
        label = self._label(pick(row, self.columns.label) if self.columns.label else None, row)
        if label in self.task.skipped_labels:
            self.unagreed += 1
            return
        guid = pick(row, self.columns.guid) if self.columns.guid else None
        self.examples.append(TextExample(guid or str(len(self.examples)), text_a, text_b, label))

    def _label(self, raw: str | None, row: Row) -> str | None:
        label = raw.strip() if raw is not None else None
        if label is not None:
            label = self.task.label_aliases.get(label, label)
        if self.split == "test" and (
            label is None or (label in _UNLABELLED and label not in (self.allowed or ()))
        ):
            return None
        if label is None:
            raise _BadCellError(_missing(self.columns.label or Column(("label",)), row))
        if label in self.task.skipped_labels:
            return label
        if self.task.kind == "regression":
            return _number(label)
        if not label or (self.allowed is not None and label not in self.allowed):
            raise _BadCellError(f"label '{label}' is not one of {_listed(self.allowed or ('any word',))}")
        return label


class _BadCellError(Exception):
    """A cell that makes its row unusable; the message is the reason."""


def _header(cells: list[str], columns: Columns) -> dict[str, int] | None:
    """Name -> position if the cells are a header: they hold a name of every text column."""
    positions = {cell.strip().strip('"'): index for index, cell in reversed(list(enumerate(cells)))}
    texts = [columns.text_a, *([columns.text_b] if columns.text_b else [])]
    return positions if all(any(name in positions for name in column.names) for column in texts) else None


def _by_header(positions: dict[str, int]) -> Callable[[Row, Column], str | None]:
    def pick(row: Row, column: Column) -> str | None:
        index = next((positions[name] for name in column.names if name in positions), None)
        cells = row.cells or []
        return cells[index] if index is not None and index < len(cells) else None

    return pick


def _by_position(columns: Columns, path: Path) -> Callable[[Row, Column], str | None]:
    texts = [columns.text_a, *([columns.text_b] if columns.text_b else [])]
    unplaced = [column.names[0] for column in texts if column.index is None]
    if unplaced:
        raise DataError(
            f"{path}: the first row is no header with the columns {_listed(unplaced)}; add the header"
        )

    def pick(row: Row, column: Column) -> str | None:
        cells = row.cells or []
        return cells[column.index] if column.index is not None and column.index < len(cells) else None

    return pick


def _by_key(transform: str | None) -> Callable[[Row, Column], str | None]:
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = TRANSFORMS[transform] if transform else None

    def pick(row: Row, column: Column) -> str | None:
        try:
            fields = change(row.fields or {}) if change else (row.fields or {})
        except (KeyError, TypeError, ValueError) as error:
            raise _BadCellError(f"key {error} is missing or of another form") from error
        value = next((fields[name] for name in column.names if name in fields), None)
        return None if value is None else str(value)

    return pick


def _text(value: str | None, column: Column, row: Row) -> str:
    if value is None:
        raise _BadCellError(_missing(column, row))
    text = value.strip()
    if not text:
        raise _BadCellError(f"{column.names[0]} is empty")
    return text


def _missing(column: Column, row: Row) -> str:
    if row.cells is not None:
        place = f"column {column.index + 1}" if column.index is not None else f"column '{column.names[0]}'"
        return f"{len(row.cells)} columns, no {column.names[0]} in {place}"
    return f"key {' or '.join(column.names)} is missing"


def _number(label: str) -> str:
    try:
        value = float(label)
    except ValueError:
        raise _BadCellError(f"label '{label}' is not a number") from None
    if not math.isfinite(value):
        raise _BadCellError(f"label '{label}' is not finite")
    return label


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")
