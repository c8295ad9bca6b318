"""Classification and regression of texts and pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from albert.finetune.examples import TextExample
from albert.finetune.features import LabelledBatch, TextEncoder, make_sequences
from albert.finetune.metrics import classification_scores, regression_scores
from albert.finetune.reading import Split
from albert.finetune.task_definition import Task


class TextData:
    """One unit per example; a row holds the logits."""

    def __init__(
        self, task: Task, split: Split, labels: Sequence[str], tokenizer: TextEncoder, max_seq_length: int
    ) -> None:
        self.split = split
        self.labels = tuple(labels)
        self.is_regression = task.kind == "regression"
        self.examples = [example for example in split.examples if isinstance(example, TextExample)]
        seconds = [example.text_b for example in self.examples]
        pairs = [text for text in seconds if text is not None]
        self._sequences = make_sequences(
            tokenizer, [example.text_a for example in self.examples], pairs or None, max_seq_length
        )
        self.lengths = self._sequences.lengths
        self.is_labelled = self.examples[0].is_labelled
        self.loss_counts = np.full(len(self.examples), int(self.is_labelled), dtype=np.int64)
        self.row_width = 1 if self.is_regression else len(self.labels)
        self.notes = {"truncated": self._sequences.num_truncated}
        self.targets = self._make_targets()

    def _make_targets(self) -> NDArray[Any]:
        """[examples] class indices, or numbers; zeros where the split has no labels."""
        if not self.is_labelled:
            return np.zeros(len(self.examples), dtype=np.float32 if self.is_regression else np.int64)
        if self.is_regression:
            return np.array([float(example.label or 0) for example in self.examples], dtype=np.float32)
        index = {label: position for position, label in enumerate(self.labels)}
        return np.array([index[example.label or ""] for example in self.examples], dtype=np.int64)

    def batch(self, units: NDArray[np.int64]) -> LabelledBatch:
        """Units as one packed batch."""
        return LabelledBatch(self._sequences.pack(units), torch.from_numpy(self.targets[units]))

    def rows(self, logits: Tensor, batch: LabelledBatch, units: NDArray[np.int64]) -> NDArray[np.float32]:  # noqa: ARG002
        """The logits, [batch, labels]."""
        return logits.float().cpu().numpy()

    def predictions(self, rows: NDArray[np.float32]) -> list[dict[str, Any]]:
        """Prediction and probabilities of every example."""
        if self.is_regression:
            return [
                {"id": example.guid, "prediction": round(float(row[0]), 6), "label": example.label}
                for example, row in zip(self.examples, rows, strict=True)
            ]
        shifted = np.exp(rows - rows.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        return [
            {
                "id": example.guid,
                "prediction": self.labels[int(row.argmax())],
                "label": example.label,
                "probabilities": {name: round(float(p), 6) for name, p in zip(self.labels, row, strict=True)},
            }
            for example, row in zip(self.examples, probabilities, strict=True)
        ]

    def scores(self, rows: NDArray[np.float32]) -> dict[str, float]:
        """Accuracy, F1, Matthews; or Pearson, Spearman for numbers."""
        if self.is_regression:
            return regression_scores(rows[:, 0], self.targets)
        predicted = rows.argmax(axis=1)
        return classification_scores(predicted, self.targets, len(self.labels))
