"""Extractive question answering (SQuAD, CMRC2018): windows `[CLS] question [SEP] part of the context [SEP]`.

A window slides over the context by `doc_stride` tokens. The answer is the best span of all windows; a token
starts it only in the window that shows most of its surroundings (Devlin et al. 2019, run_squad.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from albert.errors import ConfigError
from albert.finetune.alignment import align
from albert.finetune.answers import answer_scores
from albert.finetune.examples import SpanExample
from albert.finetune.features import (
    SPECIAL_TOKENS_OF_PAIR,
    EncodedTexts,
    LabelledBatch,
    Sequences,
    TextEncoder,
    encode_texts,
)
from albert.finetune.reading import Split
from albert.finetune.task_definition import Task

_MIN_WINDOW = 8
"""Context tokens that a window must at least hold."""
NO_ANSWER_ROW = (0.0, float("-inf"), -1.0, -1.0)


@dataclass(frozen=True)
class Window:
    """A piece of one example's context."""

    example: int
    start: int
    """First context token."""
    end: int
    """Context token after the last."""
    targets: tuple[int, int]
    """First and last token of the answer, as positions in the packed sequence; 0 ([CLS]) for no answer."""


class SpanData:
    """One unit per window; a row holds the score of no answer, and score and ends of the best span."""

    def __init__(self, task: Task, split: Split, tokenizer: TextEncoder, max_seq_length: int) -> None:
        self.split = split
        self._options = task.options
        self._query_limit = int(task.options.get("max_query_length", 64))
        self._max_answer = int(task.options.get("max_answer_length", 30))
        self.notes = {
            "misaligned answers": 0,
            "realigned answers": 0,
            "windows": 0,
            "answers split by a window": 0,
        }
        examples = [example for example in split.examples if isinstance(example, SpanExample)]
        self.is_labelled = any(example.is_labelled for example in examples)
        self.examples, self._answers = self._usable(examples)
        questions = encode_texts(tokenizer, [example.question for example in self.examples])
        contexts = encode_texts(tokenizer, [example.context for example in self.examples])
        self._spans = [
            align(example.context, tokenizer.pieces(contexts.row(index).tolist()))
            for index, example in enumerate(self.examples)
        ]
        self._keep_question = np.minimum(questions.lengths, self._query_limit)
        self.windows = self._make_windows(contexts, max_seq_length, int(task.options.get("doc_stride", 128)))
        self.notes["windows"] = len(self.windows)
        self._sequences = _window_sequences(self.windows, questions, contexts, self._keep_question, tokenizer)
        self.lengths = self._sequences.lengths
        self.loss_counts = np.full(len(self.windows), int(self.is_labelled), dtype=np.int64)
        self.row_width = len(NO_ANSWER_ROW)
        self._has_max_context = self._mark_max_context()

    def _usable(self, examples: list[SpanExample]) -> tuple[list[SpanExample], list[tuple[int, int] | None]]:
        """Examples, and the characters of the answer to learn; training drops those that have none."""
        kept, answers = [], []
        for example in examples:
            answer = first_literal_answer(example)
            stated = [(start, start + len(text)) for text, start in example.answers]
            self.notes["misaligned answers"] += bool(example.answers) and answer is None
            self.notes["realigned answers"] += answer is not None and answer not in stated
            if self.split.name == "train" and answer is None and not example.is_impossible:
                continue
            kept.append(example)
            answers.append(answer)
        return kept, answers

    def _make_windows(self, contexts: EncodedTexts, max_seq_length: int, stride: int) -> list[Window]:
        windows = []
        for index in range(len(self.examples)):
            query = int(self._keep_question[index])
            room = max_seq_length - SPECIAL_TOKENS_OF_PAIR - query
            if room < _MIN_WINDOW:
                raise ConfigError(
                    f"--max-seq-length {max_seq_length} leaves {room} tokens for the context beside a "
                    f"question of {query}; at least {query + SPECIAL_TOKENS_OF_PAIR + _MIN_WINDOW} are needed"
                )
            total, answer = len(contexts.row(index)), self._answer_tokens(index)
            found = False
            for start in _window_starts(total, room, stride):
                end = min(start + room, total)
                inside = answer is not None and start <= answer[0] and answer[1] < end
                found |= inside
                shift = query + 2 - start
                targets = (answer[0] + shift, answer[1] + shift) if inside and answer else (0, 0)
                windows.append(Window(index, start, end, targets))
            self.notes["answers split by a window"] += answer is not None and not found
        return windows

    def _answer_tokens(self, index: int) -> tuple[int, int] | None:
        """First and last context token that overlap the answer's characters."""
        answer, spans = self._answers[index], self._spans[index]
        if answer is None:
            return None
        overlapping = np.flatnonzero((spans[:, 0] < answer[1]) & (spans[:, 1] > answer[0]))
        return (int(overlapping[0]), int(overlapping[-1])) if len(overlapping) else None

    def _mark_max_context(self) -> list[NDArray[np.bool_]]:
        """For every window, whether each of its tokens has its best surroundings there."""
        best: dict[int, NDArray[np.float64]] = {}
        scores = []
        for window in self.windows:
            tokens = np.arange(window.start, window.end)
            score = np.minimum(tokens - window.start, window.end - 1 - tokens) + 0.01 * (
                window.end - window.start
            )
            scores.append(score)
            total = len(self._spans[window.example])
            so_far = best.setdefault(window.example, np.full(total, -1.0))
            so_far[window.start : window.end] = np.maximum(so_far[window.start : window.end], score)
        return [
            score >= best[window.example][window.start : window.end]
            for window, score in zip(self.windows, scores, strict=True)
        ]

    def batch(self, units: NDArray[np.int64]) -> LabelledBatch:
        """Windows as one packed batch; labels [batch, 2]."""
        targets = [self.windows[int(unit)].targets for unit in units]
        return LabelledBatch(self._sequences.pack(units), torch.tensor(targets))

    def rows(
        self, outputs: tuple[Tensor, Tensor], batch: LabelledBatch, units: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Best span of every window, [batch, 4]."""
        parts = torch.stack(outputs, dim=-1).float().cpu().split(list(batch.sequences.lengths))
        return np.stack(
            [self._best_span(part.numpy(), int(unit)) for part, unit in zip(parts, units, strict=True)]
        )

    def _best_span(self, logits: NDArray[np.float32], unit: int) -> NDArray[np.float32]:
        window = self.windows[unit]
        offset = int(self._keep_question[window.example]) + 2
        start, end = logits[offset : offset + window.end - window.start].T
        start = np.where(self._has_max_context[unit], start, -np.inf)
        table = start[:, None] + end[None, :]
        distance = np.arange(len(end))[None, :] - np.arange(len(start))[:, None]
        table[(distance < 0) | (distance >= self._max_answer)] = -np.inf
        first, last = np.unravel_index(int(table.argmax()), table.shape)
        null = float(logits[0].sum())
        return np.array(
            [null, table[first, last], first + window.start, last + window.start], dtype=np.float32
        )

    def predictions(self, rows: NDArray[np.float32]) -> list[dict[str, Any]]:
        """Answer text of every question; empty for no answer where the task has such questions."""
        chosen: list[NDArray[np.float32]] = [np.array(NO_ANSWER_ROW, dtype=np.float32) for _ in self.examples]
        null = np.full(len(self.examples), np.inf)
        for window, row in zip(self.windows, rows, strict=True):
            null[window.example] = min(null[window.example], row[0])
            if row[1] > chosen[window.example][1]:
                chosen[window.example] = row
        return [
            self._prediction(index, chosen[index], float(null[index])) for index in range(len(self.examples))
        ]

    def _prediction(self, index: int, row: NDArray[np.float32], null: float) -> dict[str, Any]:
        example, spans = self.examples[index], self._spans[index]
        text = ""
        if row[2] >= 0:
            text = example.context[spans[int(row[2]), 0] : spans[int(row[3]), 1]].strip()
        margin = null - float(row[1])
        if self._options.get("null_answers") and margin > 0:
            text = ""
        return {"id": example.guid, "prediction": text, "label": [t for t, _ in example.answers],
                "no_answer_margin": round(margin, 6)}  # fmt: skip

    def scores(self, rows: NDArray[np.float32]) -> dict[str, float]:
        """Exact match and F1 of the official scripts."""
        texts = [prediction["prediction"] for prediction in self.predictions(rows)]
        golds = [[text for text, _ in example.answers] for example in self.examples]
        return answer_scores(texts, golds, str(self._options.get("language", "en")))


def first_literal_answer(example: SpanExample) -> tuple[int, int] | None:
    """Characters of the first answer that stands in the context where it says, or anywhere."""
    for text, start in example.answers:
        if text and example.context[start : start + len(text)] == text:
            return start, start + len(text)
    for text, _ in example.answers:
        start = example.context.find(text) if text else -1
        if start >= 0:
            return start, start + len(text)
    return None


def _window_starts(total: int, room: int, stride: int) -> list[int]:
    """First token of every window: the last one reaches the end, and neighbours share at least half of theirs."""
    starts = [0]
    while starts[-1] + room < total:
        starts.append(starts[-1] + min(room // 2, stride))
    return starts


def _window_sequences(
    windows: list[Window],
    questions: EncodedTexts,
    contexts: EncodedTexts,
    keep_question: NDArray[np.int64],
    tokenizer: TextEncoder,
) -> Sequences:
    """Question and piece of context of every window."""
    which = np.array([window.example for window in windows])
    first = _slices(questions, which, np.zeros(len(windows), dtype=np.int64), keep_question[which])
    starts = np.array([window.start for window in windows])
    second = _slices(contexts, which, starts, np.array([window.end for window in windows]) - starts)
    return Sequences(first, second, first.lengths, second.lengths, tokenizer.cls_id, tokenizer.sep_id)


def _slices(
    texts: EncodedTexts, which: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> EncodedTexts:
    """Tokens `starts` to `starts + lengths` of the texts `which`, concatenated."""
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    index = np.repeat(texts.offsets[which] + starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return EncodedTexts(texts.ids[index], offsets)
