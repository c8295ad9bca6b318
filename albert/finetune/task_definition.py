"""What a fine-tuning task is: its kind, files, columns, labels, metric and recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["classification", "regression", "span", "choice", "tagging"]
FileForm = Literal["rows", "squad", "race", "c3", "conll"]

NUMERIC_METRICS = ("pearson", "spearman")
METRICS_OF_KIND: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": NUMERIC_METRICS,
    "span": ("exact_match", "f1"),
    "choice": ("accuracy",),
    "tagging": ("entity_f1", "accuracy"),
}
"""What can be asked for as the metric that chooses the best checkpoint; all are computed anyway."""


@dataclass(frozen=True)
class Column:
    """One column of a row file: its names in a header or as JSON key, and its place without a header."""

    names: tuple[str, ...]
    index: int | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns make an example."""

    text_a: Column
    text_b: Column | None = None
    label: Column | None = None
    guid: Column | None = None


@dataclass(frozen=True)
class Recipe:
    """Published hyper-parameters; exactly one of `epochs` and `steps` is given."""

    learning_rate: float
    batch_size: int
    epochs: float | None = None
    steps: int | None = None
    warmup_steps: int | None = None
    """None: a tenth of all steps."""
    max_seq_length: int = 128
    source: str = "a common default; none is published for ALBERT"


@dataclass(frozen=True)
class Task:
    """One task; `python -m albert.finetune --list-tasks` prints the table."""

    name: str
    kind: Kind
    summary: str
    metric: str
    recipe: Recipe
    files: Mapping[str, tuple[str, ...]]
    """Split -> accepted file names, first found is taken."""
    columns: Columns | None = None
    test_columns: Columns | None = None
    """Where the test file has other columns than the labelled ones."""
    labels: tuple[str, ...] | None = None
    """None: the labels are collected from the training file."""
    label_aliases: Mapping[str, str] = field(default_factory=dict)
    skipped_labels: tuple[str, ...] = ()
    """Labels that the data set gives to rows without an agreed answer; such rows are counted, not errors."""
    form: FileForm = "rows"
    transform: str | None = None
    """Name of a function of `transforms.py` that turns a raw JSON row into named columns."""
    submission: tuple[str, str] | None = None
    """(form, file name) of the benchmark's upload; form `glue` or `clue`; `*` is the test set's version, 10 or 11."""
    options: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    """Settings of one kind: `doc_stride max_query_length max_answer_length null_answers language`."""
