"""The model of a task: the encoder's weights from a pretrained directory, the head new or from a fine-tuned one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from albert.finetune.choice_data import option_table
from albert.finetune.features import LabelledBatch
from albert.finetune.task_definition import Task
from albert.heads import (
    AlbertForMultipleChoice,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertHead,
)
from albert.model_config import ModelConfig
from albert.weights import load_weights

_ENCODER = "albert."
_POOLER = "albert.pooler."


def build_model(task: Task, labels: Sequence[str], config: ModelConfig, seed: int) -> AlbertHead:
    """The head of the task on a freshly initialised encoder."""
    if task.kind == "classification":
        return AlbertForSequenceClassification(config, len(labels), seed=seed)
    if task.kind == "regression":
        return AlbertForSequenceClassification(config, 1, "regression", seed=seed)
    if task.kind == "choice":
        # One score per sequence: questions may have different numbers of options (C3).
        return AlbertForMultipleChoice(config, num_choices=1, seed=seed)
    if task.kind == "span":
        return AlbertForQuestionAnswering(config, seed=seed)
    return AlbertForTokenClassification(config, len(labels), seed=seed)


def loss_sum(model: nn.Module, outputs: Any, batch: LabelledBatch) -> Tensor:
    """Sum of the losses of a batch, 0-d; for spans the mean of both ends."""
    if isinstance(model, AlbertForQuestionAnswering):
        lengths = batch.sequences.lengths
        ends = [model.loss_sum(outputs[end], batch.labels[:, end], lengths) for end in (0, 1)]
        return (ends[0] + ends[1]) / 2
    if isinstance(model, AlbertForMultipleChoice):
        return model.loss_sum(option_table(outputs, batch.group_sizes), batch.labels)
    if isinstance(model, AlbertForSequenceClassification | AlbertForTokenClassification):
        return model.loss_sum(outputs, batch.labels)
    raise TypeError(f"{type(model).__name__} has no fine-tuning loss")


def initialise(
    model: AlbertHead, state: Mapping[str, Tensor], source: str, *, keeps_head: bool, reinit_pooler: bool
) -> list[str]:
    """Copy the weights of a pretrained or fine-tuned directory into the model.

    Args:
        model: gets the weights.
        state: name -> tensor of the directory.
        source: the directory, for messages.
        keeps_head: take the directory's head, which was fine-tuned on the same task, too.
        reinit_pooler: keep the freshly initialised pooler.

    Returns:
        Names that stay freshly initialised: the head and perhaps the pooler.

    Raises:
        DataError: encoder weights are missing or have another shape.
    """
    kept = {
        name: tensor
        for name, tensor in state.items()
        if (keeps_head or name.startswith(_ENCODER)) and not (reinit_pooler and name.startswith(_POOLER))
    }
    return load_weights(model, kept, source)
