"""Multiple choice (RACE, C3): one sequence per option, `[CLS] context [SEP] question option [SEP]`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from albert.finetune.examples import ChoiceExample
from albert.finetune.features import (
    SPECIAL_TOKENS_OF_PAIR,
    EncodedTexts,
    LabelledBatch,
    Sequences,
    TextEncoder,
    encode_texts,
)
from albert.finetune.metrics import accuracy, majority_accuracy
from albert.finetune.reading import Split
from albert.finetune.task_definition import Task


class ChoiceData:
    """One unit per question; a row holds the scores of its options, minus infinity where there is none.

    The question with its option is cut to `max_query_length` tokens from its front, as Google's RACE code
    (`max_qa_length`) does, so that the option survives; the context gets the rest.
    """

    def __init__(self, task: Task, split: Split, tokenizer: TextEncoder, max_seq_length: int) -> None:
        self.split = split
        self.examples = [example for example in split.examples if isinstance(example, ChoiceExample)]
        self._num_options = np.array([len(example.options) for example in self.examples], dtype=np.int64)
        self._first_option = np.concatenate(([0], np.cumsum(self._num_options)))
        limit = min(
            int(task.options.get("max_query_length", 128)), max_seq_length - SPECIAL_TOKENS_OF_PAIR - 1
        )
        contexts = encode_texts(tokenizer, [example.context for example in self.examples])
        questions = _last_tokens(
            encode_texts(
                tokenizer, [f"{e.question} {option}" for e in self.examples for option in e.options]
            ),
            limit,
        )
        repeated = _repeat(contexts, self._num_options)
        room = max_seq_length - SPECIAL_TOKENS_OF_PAIR - questions.lengths
        keep = np.minimum(repeated.lengths, room)
        self._sequences = Sequences(
            repeated, questions, keep, questions.lengths, tokenizer.cls_id, tokenizer.sep_id
        )
        self.lengths = np.add.reduceat(self._sequences.lengths, self._first_option[:-1])
        self.is_labelled = self.examples[0].is_labelled
        self.loss_counts = np.full(len(self.examples), int(self.is_labelled), dtype=np.int64)
        self.row_width = int(self._num_options.max())
        self.notes = {"truncated contexts": int((repeated.lengths > room).sum())}
        self._targets = np.array([example.label or 0 for example in self.examples], dtype=np.int64)

    def batch(self, units: NDArray[np.int64]) -> LabelledBatch:
        """All options of the questions of `units`."""
        options = [
            np.arange(self._first_option[unit], self._first_option[unit + 1], dtype=np.int64)
            for unit in units
        ]
        return LabelledBatch(
            self._sequences.pack(np.concatenate(options)),
            torch.from_numpy(self._targets[units]),
            tuple(int(n) for n in self._num_options[units]),
        )

    def rows(self, logits: Tensor, batch: LabelledBatch, units: NDArray[np.int64]) -> NDArray[np.float32]:  # noqa: ARG002
        """Scores of the options, [batch, most options]."""
        table = option_table(logits, batch.group_sizes)
        return F.pad(table, (0, self.row_width - table.shape[1]), value=float("-inf")).cpu().numpy()

    def predictions(self, rows: NDArray[np.float32]) -> list[dict[str, Any]]:
        """Index of the chosen option of every question."""
        chosen = rows.argmax(axis=1)
        return [
            {
                "id": example.guid,
                "prediction": int(choice),
                "label": example.label,
                "option": example.options[int(choice)],
            }
            for example, choice in zip(self.examples, chosen, strict=True)
        ]

    def scores(self, rows: NDArray[np.float32]) -> dict[str, float]:
        """Accuracy, beside that of always choosing the most frequent position."""
        return {
            "accuracy": accuracy(rows.argmax(axis=1), self._targets),
            "majority_accuracy": majority_accuracy(self._targets),
        }


def option_table(logits: Tensor, group_sizes: tuple[int, ...]) -> Tensor:
    """[options of all questions, 1] to fp32 [questions, most options], minus infinity where there is none."""
    parts = logits.float().squeeze(-1).split(list(group_sizes))
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=float("-inf"))


def _last_tokens(texts: EncodedTexts, limit: int) -> EncodedTexts:
    """The last `limit` tokens of every text."""
    keep = np.minimum(texts.lengths, limit)
    starts = texts.offsets[1:] - keep
    offsets = np.concatenate(([0], np.cumsum(keep)))
    index = np.repeat(starts - offsets[:-1], keep) + np.arange(offsets[-1])
    return EncodedTexts(texts.ids[index], offsets)


def _repeat(texts: EncodedTexts, times: NDArray[np.int64]) -> EncodedTexts:
    """Every text `times` times, one after the other."""
    lengths = np.repeat(texts.lengths, times)
    starts = np.repeat(texts.offsets[:-1], times)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    index = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return EncodedTexts(texts.ids[index], offsets)
