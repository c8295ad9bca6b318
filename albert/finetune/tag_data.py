"""Tagging of words (named entities): every word's first token is classified, the others are ignored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from albert.finetune.examples import TagExample
from albert.finetune.features import (
    SPECIAL_TOKENS_OF_SINGLE,
    EncodedTexts,
    LabelledBatch,
    Sequences,
    TextEncoder,
    encode_texts,
)
from albert.finetune.metrics import entity_scores
from albert.finetune.reading import Split

IGNORED = -100
_OUTSIDE = "O"


class TagData:
    """One unit per sentence; a row holds the tag of every word, -1 behind the last and where cut off."""

    def __init__(
        self, split: Split, labels: Sequence[str], tokenizer: TextEncoder, max_seq_length: int
    ) -> None:
        self.split = split
        self.labels = tuple(labels)
        self.examples = [example for example in split.examples if isinstance(example, TagExample)]
        self.is_labelled = self.examples[0].is_labelled
        words = encode_texts(tokenizer, [word for example in self.examples for word in example.words])
        self._words = np.array([len(example.words) for example in self.examples], dtype=np.int64)
        sentences, self._word_starts = self._join_words(words, tokenizer.unk_id)
        keep = np.minimum(sentences.lengths, max_seq_length - SPECIAL_TOKENS_OF_SINGLE)
        self._word_starts = [
            starts[starts < limit] for starts, limit in zip(self._word_starts, keep, strict=True)
        ]
        none = np.zeros_like(keep)
        self._sequences = Sequences(sentences, None, keep, none, tokenizer.cls_id, tokenizer.sep_id)
        self.lengths = self._sequences.lengths
        self.loss_counts = np.array([len(starts) * self.is_labelled for starts in self._word_starts])
        self.row_width = int(self._words.max())
        self.notes = {"cut sentences": int((sentences.lengths > keep).sum())}

    def _join_words(self, words: EncodedTexts, unk_id: int) -> tuple[EncodedTexts, list[NDArray[np.int64]]]:
        """Tokens of whole sentences, and where in them each word starts; a word without tokens is unknown."""
        lengths = np.maximum(words.lengths, 1)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        ids = np.full(offsets[-1], unk_id, dtype=words.ids.dtype)
        ids[np.repeat(words.lengths > 0, lengths)] = words.ids
        bounds = np.concatenate(([0], np.cumsum(self._words)))
        starts = [offsets[a:b] - offsets[a] for a, b in pairwise(bounds)]
        return EncodedTexts(ids, offsets[bounds]), starts

    def batch(self, units: NDArray[np.int64]) -> LabelledBatch:
        """Sentences as one packed batch; labels [tokens], `IGNORED` but at words' first tokens."""
        sequences = self._sequences.pack(units)
        labels = np.full(int(self.lengths[units].sum()), IGNORED, dtype=np.int64)
        index = {label: position for position, label in enumerate(self.labels)}
        for offset, unit in zip(sequences.cu_seqlens[:-1].tolist(), units, strict=True):
            tags, starts = self.examples[int(unit)].tags, self._word_starts[int(unit)]
            if tags is not None:
                labels[offset + 1 + starts] = [index[tag] for tag in tags[: len(starts)]]
        return LabelledBatch(sequences, torch.from_numpy(labels))

    def rows(self, logits: Tensor, batch: LabelledBatch, units: NDArray[np.int64]) -> NDArray[np.float32]:
        """Tag of every word, [batch, most words]."""
        best = logits.argmax(dim=-1).cpu().numpy()
        rows = np.full((len(units), self.row_width), -1, dtype=np.float32)
        for row, offset, unit in zip(rows, batch.sequences.cu_seqlens[:-1].tolist(), units, strict=True):
            starts = self._word_starts[int(unit)]
            row[: len(starts)] = best[offset + 1 + starts]
        return rows

    def _tags(self, rows: NDArray[np.float32]) -> list[list[str]]:
        """Tags of every sentence; words that were cut off are outside."""
        return [
            [self.labels[int(tag)] if tag >= 0 else _OUTSIDE for tag in row[: len(example.words)]]
            for example, row in zip(self.examples, rows, strict=True)
        ]

    def predictions(self, rows: NDArray[np.float32]) -> list[dict[str, Any]]:
        """Words with their tags."""
        return [
            {"id": example.guid, "prediction": tags, "label": example.tags, "words": example.words}
            for example, tags in zip(self.examples, self._tags(rows), strict=True)
        ]

    def scores(self, rows: NDArray[np.float32]) -> dict[str, float]:
        """Entity precision, recall, F1, and accuracy of the tags."""
        predicted = self._tags(rows)
        gold = [list(example.tags or ()) for example in self.examples]
        pairs = [(p, g) for ps, gs in zip(predicted, gold, strict=True) for p, g in zip(ps, gs, strict=True)]
        outside = sum(g == _OUTSIDE for _, g in pairs)
        return {
            **entity_scores(predicted, gold),
            "accuracy": sum(p == g for p, g in pairs) / len(pairs),
            "majority_accuracy": outside / len(pairs),
        }
