"""Texts -> token ids -> packed batches. Nothing is padded: a batch costs its real tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from albert.batches import Movable, PackedBatch, pack

SPECIAL_TOKENS_OF_PAIR = 3
"""`[CLS] A [SEP] B [SEP]`"""
SPECIAL_TOKENS_OF_SINGLE = 2
"""`[CLS] A [SEP]`"""


class TextEncoder(Protocol):
    """What this module needs of `albert.tokenization.Tokenizer`."""

    cls_id: int
    sep_id: int
    unk_id: int

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ids [tokens] of all texts and lengths [texts], without special tokens."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id stands for."""


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of many texts, concatenated."""

    ids: NDArray[Any]
    """[tokens]"""
    offsets: NDArray[np.int64]
    """[texts + 1]"""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every text, [texts]."""
        return np.diff(self.offsets)

    def row(self, index: int, length: int | None = None) -> NDArray[Any]:
        """Ids of one text, the first `length` of them."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.ids[start : end if length is None else min(end, start + length)]


def encode_texts(tokenizer: TextEncoder, texts: Sequence[str]) -> EncodedTexts:
    """Encode all texts at once."""
    ids, lengths = tokenizer.encode_flat(list(texts))
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return EncodedTexts(ids, offsets)


def truncated_lengths(
    first: NDArray[np.int64], second: NDArray[np.int64], budget: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut pairs to `budget` tokens in closed form of Google's rule: take from the longer one, from B when equal.

    Args:
        first: [pairs] tokens of A.
        second: [pairs] tokens of B.
        budget: tokens that both may have together.

    Returns:
        Tokens that are kept of A and of B, both [pairs].
    """
    large, small = (budget + 1) // 2, budget // 2
    keep_first = np.where(second <= small, np.minimum(first, budget - second), np.minimum(first, large))
    keep_second = np.minimum(second, budget - keep_first)
    return keep_first, keep_second


@dataclass(frozen=True)
class Sequences:
    """Inputs `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]` of all examples of a split, before packing."""

    first: EncodedTexts
    second: EncodedTexts | None
    keep_first: NDArray[np.int64]
    keep_second: NDArray[np.int64]
    cls_id: int
    sep_id: int

    def __len__(self) -> int:
        return len(self.first)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every sequence with special tokens, [sequences]."""
        special = SPECIAL_TOKENS_OF_SINGLE if self.second is None else SPECIAL_TOKENS_OF_PAIR
        return self.keep_first + self.keep_second + special

    @property
    def num_truncated(self) -> int:
        """Sequences that lost tokens."""
        whole = self.first.lengths + (0 if self.second is None else self.second.lengths)
        return int((whole > self.keep_first + self.keep_second).sum())

    def pack(self, indices: NDArray[np.int64]) -> PackedBatch:
        """The sequences of `indices` as one packed batch, in that order."""
        cls, sep = np.array([self.cls_id]), np.array([self.sep_id])
        parts: list[NDArray[Any]] = []
        types: list[int] = []
        for index in indices:
            keep_a, keep_b = int(self.keep_first[index]), int(self.keep_second[index])
            parts += [cls, self.first.row(index, keep_a), sep]
            types += [keep_a + 2, 0]
            if self.second is not None:
                parts += [self.second.row(index, keep_b), sep]
                types[-1] = keep_b + 1
        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        token_types = torch.from_numpy(np.repeat(np.tile(np.array([0, 1]), len(indices)), types))
        return pack(ids, token_types, tuple(int(length) for length in self.lengths[indices]))


def make_sequences(
    tokenizer: TextEncoder, first: Sequence[str], second: Sequence[str] | None, max_seq_length: int
) -> Sequences:
    """Encode and cut texts or pairs of texts to `max_seq_length` tokens, special tokens included."""
    encoded_first = encode_texts(tokenizer, first)
    if second is None:
        keep = np.minimum(encoded_first.lengths, max_seq_length - SPECIAL_TOKENS_OF_SINGLE)
        none = np.zeros_like(keep)
        return Sequences(encoded_first, None, keep, none, tokenizer.cls_id, tokenizer.sep_id)
    encoded_second = encode_texts(tokenizer, second)
    keep_first, keep_second = truncated_lengths(
        encoded_first.lengths, encoded_second.lengths, max_seq_length - SPECIAL_TOKENS_OF_PAIR
    )
    return Sequences(
        encoded_first, encoded_second, keep_first, keep_second, tokenizer.cls_id, tokenizer.sep_id
    )


@dataclass(frozen=True)
class LabelledBatch(Movable):
    """Packed sequences with what is to be predicted of them."""

    sequences: PackedBatch
    labels: Tensor
    """Of the kind of task: [batch] classes, [batch] numbers, [batch, 2] span ends, or [tokens] tags."""
    group_sizes: tuple[int, ...] = ()
    """Options per question of multiple choice: so many consecutive sequences belong together."""
