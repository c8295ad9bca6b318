"""review-SPLIT.md: the confusion table of a classification and the mistakes it was surest of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from albert.durable_files import write_file_durably
from albert.finetune.metrics import confusion
from albert.finetune.text_data import TextData

_WORST = 20
_MAX_LABELS = 30
"""A larger table is no longer read."""


def write_review(output: Path, data: TextData, rows: NDArray[np.float32]) -> Path:
    """Write the table and the worst mistakes of a labelled classification split.

    Args:
        output: directory of the run.
        data: the split.
        rows: [examples, labels] logits.
    """
    path = output / f"review-{data.split.name}.md"
    lines = [f"# {data.split.name}: {data.split.path.name}", ""]
    if len(data.labels) <= _MAX_LABELS:
        table = confusion(rows.argmax(axis=1), data.targets, len(data.labels))
        lines += [
            "Rows are the labels of the file, columns the predictions.",
            "",
            *_table(data.labels, table),
            "",
        ]
    lines += ["The mistakes with the least probability on the right label:", "", *_mistakes(data, rows)]
    write_file_durably(path, [("\n".join(lines) + "\n").encode()])
    return path


def _table(labels: Sequence[str], table: NDArray[np.int64]) -> list[str]:
    head = ["| | " + " | ".join(labels) + " |", "|---|" + "---:|" * len(labels)]
    return head + [
        f"| **{label}** | " + " | ".join(str(count) for count in row) + " |"
        for label, row in zip(labels, table.tolist(), strict=True)
    ]


def _mistakes(data: TextData, rows: NDArray[np.float32]) -> list[str]:
    exponents = np.exp(rows - rows.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    right = probabilities[np.arange(len(rows)), data.targets]
    wrong = np.flatnonzero(rows.argmax(axis=1) != data.targets)
    lines = ["| p(label) | label | prediction | id | text |", "|---:|---|---|---|---|"]
    for index in wrong[np.argsort(right[wrong], kind="stable")][:_WORST].tolist():
        example = data.examples[index]
        text = " ‖ ".join(part for part in (example.text_a, example.text_b) if part)
        prediction = data.labels[int(rows[index].argmax())]
        lines.append(
            f"| {right[index]:.4f} | {example.label} | {prediction} | {example.guid} | {_cell(text)} |"
        )
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:400]
