"""What the loop needs of a split, whatever the kind of its task; one implementation per kind.

A *unit* is what is drawn and batched: a text or pair, a question with its options, a window of a context, a
sentence to tag. Outputs become rows of fixed width per unit, so that ranks can gather them as arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from albert.errors import ConfigError
from albert.finetune.choice_data import ChoiceData
from albert.finetune.features import LabelledBatch, TextEncoder
from albert.finetune.reading import Split
from albert.finetune.span_data import SpanData
from albert.finetune.tag_data import TagData
from albert.finetune.task_definition import Task
from albert.finetune.text_data import TextData


class TaskData(Protocol):
    """Encoded units of one split."""

    split: Split
    lengths: NDArray[np.int64]
    """[units] tokens, to put units of similar length together"""
    loss_counts: NDArray[np.int64]
    """[units] predictions of each unit in the loss; their sum over the global batch divides it"""
    row_width: int
    is_labelled: bool
    notes: dict[str, int]
    """Counts worth telling: truncated sequences, misaligned answers, windows."""

    def batch(self, units: NDArray[np.int64]) -> LabelledBatch:
        """Units as one packed batch."""

    def rows(self, outputs: Any, batch: LabelledBatch, units: NDArray[np.int64]) -> NDArray[np.float32]:
        """What is kept of the outputs of a batch: [batch, row_width]."""

    def predictions(self, rows: NDArray[np.float32]) -> list[dict[str, Any]]:
        """One JSON object per example, from the rows [units, row_width] of all units in order."""

    def scores(self, rows: NDArray[np.float32]) -> dict[str, float]:
        """All metrics of the task; the split must be labelled."""


def make_task_data(
    task: Task, split: Split, labels: Sequence[str], tokenizer: TextEncoder, max_seq_length: int
) -> TaskData:
    """Encode a split for its task."""
    if task.kind in {"classification", "regression"}:
        return TextData(task, split, labels, tokenizer, max_seq_length)
    if task.kind == "choice":
        return ChoiceData(task, split, tokenizer, max_seq_length)
    if task.kind == "span":
        return SpanData(task, split, tokenizer, max_seq_length)
    if task.kind == "tagging":
        return TagData(split, labels, tokenizer, max_seq_length)
    raise ConfigError(f"task {task.name}: kind '{task.kind}' is not known")
