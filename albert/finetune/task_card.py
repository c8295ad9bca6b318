"""task.json of a fine-tuned model directory: which task its head answers, and what its outputs mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from albert.errors import DataError
from albert.finetune.task_definition import Kind, Recipe, Task

TASK_CARD_NAME = "task.json"


class TaskCard(BaseModel):
    """What prediction needs to know of the training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    kind: Kind
    labels: tuple[str, ...]
    """In the order of the head's outputs; empty where the task has none."""
    max_seq_length: int
    metric: str
    score: float | None
    """Best value of the metric on the dev split."""
    seed: int
    options: dict[str, int | float | str | bool] = {}
    """Of the task: how long an answer may be, whether there may be none, and the like."""
    is_pair: bool | None = None
    """Whether examples have a second text; None where there are no text columns, and in older files."""

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The card of a model directory, or None where it was not fine-tuned.

        Raises:
            DataError: the file is damaged.
        """
        path = directory / TASK_CARD_NAME
        if not path.is_file():
            return None
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except (ValueError, ValidationError) as error:
            raise DataError(f"{path}: damaged ({str(error).splitlines()[0]}); fine-tune again") from error

    def as_task(self) -> Task:
        """What prediction needs of the task, whether or not it is one of the table."""
        return Task(
            self.task, self.kind, "", self.metric, Recipe(1e-5, 1, epochs=1), {}, options=self.options
        )

    def encode(self) -> bytes:
        """Content of the file."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    def fits(self, task: Task, labels: tuple[str, ...] | None) -> bool:
        """Whether the head can go on with a task: the same kind and, where they are known, the same labels."""
        return self.kind == task.kind and (labels is None or labels == self.labels)
