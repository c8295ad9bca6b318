"""Sentence pairs for sentence-order prediction, computed for all documents of a batch at once.

The walk is BERT's and ALBERT's (Devlin et al. 2018, Lan et al. 2020 section 3.1): sentences fill a chunk up to a
target length, a random sentence boundary splits the chunk into A and B, half of the pairs are swapped, and what is
too long is cut from both ends of the longer segment. Everything stays inside one document. The algorithms differ in
what becomes of a chunk of one sentence (`BuildSettings.pairs`); it never becomes a mislabelled pair, as in Google's
code, or a copied one, as in albert_pytorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albert.blocks import NO_SENTENCE_ORDER
from data_prep.settings import PairAlgorithm

_MIN_CLAUSE_TOKENS = 4
"""A clause boundary closer to an end than this does not split a sentence."""

Offsets = NDArray[np.int64]


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents as one row of tokens with sentence boundaries."""

    ids: NDArray[Any]
    """[tokens]"""
    sentence_ends: Offsets
    """[sentences + 1] token offsets, starting with 0"""
    document_ends: Offsets
    """[documents + 1] sentence indices, starting with 0"""
    word_starts: NDArray[np.bool_] | None = None
    """[tokens] where words begin, if that does not follow from the pieces"""
    breaks: NDArray[np.bool_] | None = None
    """[sentences + 1] in packed documents, where one of them ends and the next begins"""


@dataclass(frozen=True)
class Pairs:
    """Examples as token ranges of a `TokenizedDocuments`; all arrays are [examples].

    The first segment of an example is `first`, the second `second`; an empty second segment means that there is
    only one.
    """

    first_start: Offsets
    first_end: Offsets
    second_start: Offsets
    second_end: Offsets
    labels: NDArray[np.int8]
    """0 in order, 1 swapped, -100 for one segment"""

    @property
    def num_examples(self) -> int:
        """Examples in the batch."""
        return len(self.labels)

    @staticmethod
    def concatenate(parts: Sequence[Pairs]) -> Pairs:
        """The examples of several passes, one after the other."""
        names = [column.name for column in fields(Pairs)]
        return Pairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def reorder(self, order: NDArray[np.int64]) -> Pairs:
        """The same examples in another order."""
        return Pairs(*(getattr(self, column.name)[order] for column in fields(self)))


@dataclass(frozen=True)
class PairPolicy:
    """How chunks are made."""

    max_seq_length: int
    short_seq_prob: float = 0.1
    algorithm: PairAlgorithm = "strict"

    @property
    def max_num_tokens(self) -> int:
        """Tokens that fit beside [CLS], [SEP] and, for pairs, the second [SEP]."""
        return self.max_seq_length - (2 if self.algorithm == "none" else 3)


def make_pairs(
    documents: TokenizedDocuments,
    clause_table: NDArray[np.bool_],
    policy: PairPolicy,
    rng: np.random.Generator,
) -> Pairs:
    """One pass of examples over documents.

    Args:
        documents: tokens with sentence and document boundaries.
        clause_table: [vocab] True for pieces after which a long sentence may be split.
        policy: how chunks are made.
        rng: the only source of randomness.
    """
    if policy.algorithm in ("strict", "none"):
        documents = split_long_sentences(documents, clause_table, policy.max_num_tokens)
    ends, docs = documents.sentence_ends, documents.document_ends
    targets = _draw_targets(len(docs) - 1, policy, rng)
    starts, stops = _chunk(ends, docs, targets, policy)
    begin, end = ends[starts], ends[stops]
    if policy.algorithm == "none":
        begin, end = _truncate_one(begin, end, policy.max_num_tokens, rng)
        return Pairs(begin, end, end, end, np.full(len(begin), NO_SENTENCE_ORDER, np.int8))
    clauses = clause_table if policy.algorithm == "strict" else np.zeros_like(clause_table)
    split = _split_points(documents, starts, stops, clauses, rng)
    swap = rng.random(len(begin)) < 0.5
    a_start, a_end, b_start, b_end = _truncate_pairs(begin, split, end, swap, policy.max_num_tokens, rng)
    b_end = _drop_copies(documents.ids, a_start, a_end, b_start, b_end)
    is_pair = b_end > b_start
    swap &= is_pair
    pairs = Pairs(
        np.where(swap, b_start, a_start),
        np.where(swap, b_end, a_end),
        np.where(swap, a_start, b_start),
        np.where(swap, a_end, b_end),
        np.where(is_pair, swap, NO_SENTENCE_ORDER).astype(np.int8),
    )
    return pairs.reorder(np.flatnonzero(is_pair)) if policy.algorithm == "albert_pytorch" else pairs


def split_long_sentences(
    documents: TokenizedDocuments, clause_table: NDArray[np.bool_], max_tokens: int
) -> TokenizedDocuments:
    """Cut sentences of more than `max_tokens` tokens, at the last clause boundary that fits where there is one."""
    ends, docs = documents.sentence_ends, documents.document_ends
    long = np.flatnonzero(np.diff(ends) > max_tokens)
    if not len(long):
        return documents
    cuts, owners = [], []
    for sentence in long.tolist():
        start, stop = int(ends[sentence]), int(ends[sentence + 1])
        while stop - start > max_tokens:
            clauses = np.flatnonzero(
                clause_table[documents.ids[start + max_tokens // 2 : start + max_tokens]]
            )
            start += max_tokens // 2 + int(clauses[-1]) + 1 if len(clauses) else max_tokens
            cuts.append(start)
            owners.append(sentence)
    position = np.array(owners) + 1
    grown = np.cumsum(np.bincount(owners, minlength=len(ends)))
    shifted = docs + np.concatenate(([0], grown))[docs]
    breaks = None if documents.breaks is None else np.insert(documents.breaks, position, False)
    return replace(
        documents, sentence_ends=np.insert(ends, position, cuts), document_ends=shifted, breaks=breaks
    )


def _draw_targets(num_documents: int, policy: PairPolicy, rng: np.random.Generator) -> NDArray[np.int64]:
    """[documents] target length: the maximum, or with short_seq_prob a random shorter one."""
    longest = policy.max_num_tokens
    short = rng.integers(2, longest + 1, num_documents)
    return np.where(rng.random(num_documents) < policy.short_seq_prob, short, longest)


def _chunk(
    ends: Offsets, docs: Offsets, targets: NDArray[np.int64], policy: PairPolicy
) -> tuple[Offsets, Offsets]:
    """Walk the sentences of every document; returns the first sentence of each chunk and the one after its last."""
    sentences = np.diff(docs)
    wanted = ends[:-1] + np.repeat(targets, sentences)
    # next_chunk[i]: where the chunk that begins with sentence i ends
    reach = np.searchsorted(ends, wanted)
    if policy.algorithm == "albert_pytorch":  # a chunk of one sentence grows, however long that is
        reach = np.maximum(reach, np.arange(2, len(ends) + 1))
    next_chunk = np.minimum(reach, np.repeat(docs[1:], sentences)).tolist()
    starts: list[int] = []
    stops: list[int] = []
    limit = policy.max_num_tokens
    for begin, end in zip(docs[:-1].tolist(), docs[1:].tolist(), strict=True):
        i = begin
        while i < end:
            stop = next_chunk[i]
            starts.append(i)
            stops.append(stop)
            i = stop
        if starts[-1] != end - 1 or policy.algorithm == "google":
            continue
        if policy.algorithm == "albert_pytorch":
            starts.pop()
            stops.pop()
        elif end - begin > 1 and ends[end] - ends[starts[-2]] <= limit:
            starts.pop()  # one sentence is left over and fits into the chunk before it
            stops.pop(-2)
    return np.array(starts, np.int64), np.array(stops, np.int64)


def _split_points(
    documents: TokenizedDocuments,
    starts: Offsets,
    stops: Offsets,
    clause_table: NDArray[np.bool_],
    rng: np.random.Generator,
) -> Offsets:
    """[chunks] token offset where B begins; the end of the chunk where there can be no B."""
    ends = documents.sentence_ends
    count = stops - starts
    draw = rng.random(len(starts))
    boundary = starts + 1 + (draw * np.maximum(count - 1, 1)).astype(np.int64)
    for i in _split_on_break(documents, boundary, stops).tolist():
        # Between two packed documents there is no order to learn: split inside one of them.
        inside = np.flatnonzero(~documents.breaks[starts[i] + 1 : stops[i]])  # type: ignore[index]
        boundary[i] = starts[i] + 1 + inside[int(draw[i] * len(inside))] if len(inside) else stops[i]
    split = ends[np.minimum(boundary, stops)]
    for i in np.flatnonzero((count == 1) | (boundary >= stops)).tolist():
        split[i] = _clause_split(documents, int(starts[i]), int(stops[i]), clause_table, float(draw[i]))
    return split


def _split_on_break(documents: TokenizedDocuments, boundary: Offsets, stops: Offsets) -> NDArray[np.int64]:
    """Indices of chunks whose split would fall between two packed documents."""
    if documents.breaks is None:
        return np.zeros(0, np.int64)
    return np.flatnonzero(documents.breaks[np.minimum(boundary, stops)] & (boundary < stops))


def _clause_split(
    documents: TokenizedDocuments, start: int, stop: int, clause_table: NDArray[np.bool_], draw: float
) -> int:
    """Token offset of a random clause boundary in sentences `start` to `stop`, or their end if there is none."""
    ends = documents.sentence_ends
    begin, end = int(ends[start]), int(ends[stop])
    inner = documents.ids[begin + _MIN_CLAUSE_TOKENS - 1 : max(end - _MIN_CLAUSE_TOKENS, begin)]
    clauses = begin + _MIN_CLAUSE_TOKENS + np.flatnonzero(clause_table[inner])
    if stop - start > 1:  # packed documents: where they meet is no place to split
        clauses = clauses[~np.isin(clauses, ends[start : stop + 1])]
    return int(clauses[int(draw * len(clauses))]) if len(clauses) else end


def pack_documents(documents: TokenizedDocuments, tokens_wanted: int) -> TokenizedDocuments:
    """Join neighbouring documents until each has `tokens_wanted` tokens, remembering where they meet."""
    ends = documents.sentence_ends[documents.document_ends]
    kept = [0]
    begin = 0
    for i, end in enumerate(ends[1:].tolist(), 1):
        if end - begin >= tokens_wanted or i == len(ends) - 1:
            kept.append(i)
            begin = end
    breaks = np.zeros(len(documents.sentence_ends), np.bool_)
    breaks[documents.document_ends] = True
    return replace(documents, document_ends=documents.document_ends[kept], breaks=breaks)


def _truncate_pairs(
    begin: Offsets,
    split: Offsets,
    end: Offsets,
    swap: NDArray[np.bool_],
    limit: int,
    rng: np.random.Generator,
) -> tuple[Offsets, Offsets, Offsets, Offsets]:
    """Cut the longer segment, token by token at a random end, until the pair has `limit` tokens.

    This is BERT's loop in closed form: the longer one shrinks to the length of the other, then both alternate; how
    many tokens go at the front is binomial. Of two equal ones that which stands second yields first, so that the
    lengths of the segments do not tell whether they were swapped.
    """
    a, b = split - begin, end - split
    excess = np.maximum(a + b - limit, 0)
    level = np.minimum(excess, np.abs(a - b))
    rest = excess - level
    cut_a = np.where(a > b, level, 0) + (rest + swap) // 2
    cut_b = np.where(a > b, 0, level) + (rest + ~swap) // 2
    front_a, front_b = rng.binomial(cut_a, 0.5), rng.binomial(cut_b, 0.5)
    return begin + front_a, split - (cut_a - front_a), split + front_b, end - (cut_b - front_b)


def _drop_copies(
    ids: NDArray[Any], a_start: Offsets, a_end: Offsets, b_start: Offsets, b_end: Offsets
) -> Offsets:
    """Ends of B, where a B with the very tokens of A (a refrain) becomes empty: its order means nothing."""
    b_end = b_end.copy()
    for i in np.flatnonzero(a_end - a_start == b_end - b_start).tolist():
        if np.array_equal(ids[a_start[i] : a_end[i]], ids[b_start[i] : b_end[i]]):
            b_end[i] = b_start[i]
    return b_end


def _truncate_one(
    begin: Offsets, end: Offsets, limit: int, rng: np.random.Generator
) -> tuple[Offsets, Offsets]:
    cut = np.maximum(end - begin - limit, 0)
    front = rng.binomial(cut, 0.5)
    return begin + front, end - (cut - front)
