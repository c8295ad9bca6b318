"""A task of the user's own from a small YAML file: `--task custom --task-file mine.yaml`. Imports no torch.

    name: reviews                 # names the results
    kind: classification          # or regression, span, choice, tagging
    columns: {text_a: title, text_b: body, label: stars}     # header names, JSON keys, or numbers from 1
    labels: ["1", "2", "3"]       # optional: collected from the training file
    metric: macro_f1              # optional: the kind's first
    learning_rate: 2.0e-5         # optional, like batch_size, epochs, max_seq_length

Span, choice and tagging tasks take the forms squad, race or c3, and conll (`form:`) instead of columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from albert.config_files import read_yaml
from albert.errors import ConfigError, MissingInputError
from albert.finetune.task_definition import METRICS_OF_KIND, Column, Columns, Kind, Recipe, Task

_ROW_KINDS = ("classification", "regression")
_FORMS_OF_KIND = {"span": ("squad",), "choice": ("race", "c3"), "tagging": ("conll",)}
_SUFFIXES = {
    "rows": ("tsv", "txt", "csv", "json", "jsonl"),
    "squad": ("json",),
    "race": ("jsonl",),
    "c3": ("json",),
    "conll": ("txt", "conll", "bio"),
}


class _ColumnNames(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    text_a: str | int
    text_b: str | int | None = None
    label: str | int
    id: str | int | None = None


class _Options(BaseModel):
    """Of span tasks, `max_query_length` of multiple choice too; see `Task.options`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    doc_stride: int | None = Field(default=None, ge=1)
    max_query_length: int | None = Field(default=None, ge=1)
    max_answer_length: int | None = Field(default=None, ge=1)
    language: Literal["en", "zh"] | None = None
    null_answers: bool | None = None


class _TaskFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$")
    kind: Kind
    form: Literal["rows", "squad", "race", "c3", "conll"] = "rows"
    columns: _ColumnNames | None = None
    labels: tuple[str, ...] | None = None
    metric: str | None = None
    learning_rate: float = Field(default=2e-5, gt=0)
    batch_size: int = Field(default=32, ge=1)
    epochs: float = Field(default=3.0, gt=0)
    max_seq_length: int = Field(default=128, ge=8)
    options: _Options = _Options()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind in _ROW_KINDS and (self.form != "rows" or self.columns is None):
            raise ValueError(f"a {self.kind} task needs columns (and no form)")
        if self.kind not in _ROW_KINDS and self.form not in _FORMS_OF_KIND[self.kind]:
            raise ValueError(f"a {self.kind} task needs form: {' or '.join(_FORMS_OF_KIND[self.kind])}")
        if self.labels is not None and (self.kind != "classification" or len(set(self.labels)) < 2):
            raise ValueError("labels are at least two different words, of a classification task")
        allowed = METRICS_OF_KIND[self.kind]
        if self.metric is not None and self.metric not in allowed:
            raise ValueError(f"metric '{self.metric}': a {self.kind} task has {', '.join(allowed)}")
        return self


def read_task(path: Path) -> Task:
    """Read a task file.

    Raises:
        MissingInputError: no such file.
        ConfigError: lists every problem with its key.
    """
    if not path.is_file():
        raise MissingInputError(f"--task-file {path}: no such file")
    try:
        file = _TaskFile.model_validate(_with_text_labels(read_yaml(path)))
    except ValidationError as error:
        problems = [_describe(item) for item in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(problems)) from error
    suffixes = _SUFFIXES[file.form]
    return Task(
        name=file.name,
        kind=file.kind,
        summary=f"defined in {path}",
        metric=file.metric or METRICS_OF_KIND[file.kind][0],
        recipe=Recipe(
            file.learning_rate,
            file.batch_size,
            epochs=file.epochs,
            max_seq_length=file.max_seq_length,
            source=str(path),
        ),
        files={s: tuple(f"{s}.{suffix}" for suffix in suffixes) for s in ("train", "dev", "test")},
        columns=_columns(file.columns) if file.columns else None,
        labels=file.labels,
        form=file.form,
        options=file.options.model_dump(exclude_none=True),
    )


def _with_text_labels(raw: Any) -> Any:
    """YAML reads 0 and 1 as numbers and yes as true; labels are what stands in the data files."""
    if isinstance(raw, dict) and isinstance(raw.get("labels"), list):
        return {
            **raw,
            "labels": [label if isinstance(label, bool) else str(label) for label in raw["labels"]],
        }
    return raw


def _columns(names: _ColumnNames) -> Columns:
    def column(name: str | int | None) -> Column | None:
        if name is None:
            return None
        return Column((name,)) if isinstance(name, str) else Column((f"column {name}",), name - 1)

    text_a = column(names.text_a)
    if text_a is None:
        raise ValueError("text_a is required by the model")
    return Columns(text_a, column(names.text_b), column(names.label), column(names.id))


def _describe(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"] if part not in ("int", "str"))
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{key}: missing"
    if item["type"] == "extra_forbidden":
        known = _Options if item["loc"][0] == "options" else _TaskFile
        return f"{key}: unknown key; known are {', '.join(known.model_fields)}"
    return f"{key}: {message}, got {item['input']!r}" if key else message
