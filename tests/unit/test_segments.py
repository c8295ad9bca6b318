"""Sentence pairs stay inside their document, are never copies, and follow BERT's walk."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from albert.blocks import NO_SENTENCE_ORDER
from data_prep.segments import (
    PairPolicy,
    TokenizedDocuments,
    _chunk,
    _truncate_pairs,
    make_pairs,
    pack_documents,
    split_long_sentences,
)

COMMA = 1
CLAUSES = np.zeros(1 << 19, bool)
CLAUSES[COMMA] = True


def documents_of(sizes: list[list[int]], seed: int = 0) -> TokenizedDocuments:
    """Documents of sentences with these lengths; every token is another number, but for some commas."""
    flat = [n for document in sizes for n in document]
    rng = np.random.default_rng(seed)
    ids = np.arange(10, 10 + sum(flat)).astype(np.uint32)
    ids[rng.random(len(ids)) < 0.05] = COMMA
    return TokenizedDocuments(
        ids,
        np.concatenate(([0], np.cumsum(flat))),
        np.concatenate(([0], np.cumsum([len(document) for document in sizes]))),
    )


def random_documents(count: int, seed: int = 0) -> TokenizedDocuments:
    rng = np.random.default_rng(seed)
    return documents_of([rng.integers(1, 60, rng.integers(1, 40)).tolist() for _ in range(count)], seed)


@pytest.fixture(scope="module")
def documents() -> TokenizedDocuments:
    return random_documents(600)


ALGORITHMS = ("strict", "google", "albert_pytorch")


@pytest.fixture(scope="module", params=ALGORITHMS)
def pairs(request, documents):
    return make_pairs(documents, CLAUSES, PairPolicy(128, algorithm=request.param), np.random.default_rng(1))


def document_of(documents: TokenizedDocuments, offsets: np.ndarray) -> np.ndarray:
    ends = documents.sentence_ends[documents.document_ends]
    return np.searchsorted(ends, offsets, side="right") - 1


def test_pairs_stay_inside_one_document_and_fit(documents, pairs):
    assert (pairs.first_end > pairs.first_start).all()
    total = pairs.first_end - pairs.first_start + pairs.second_end - pairs.second_start
    assert total.max() == 125
    owner = document_of(documents, pairs.first_start)
    two = pairs.second_end > pairs.second_start
    for offsets in (pairs.first_end - 1, np.where(two, pairs.second_start, pairs.first_start)):
        np.testing.assert_array_equal(document_of(documents, offsets), owner)
    np.testing.assert_array_equal(
        document_of(documents, np.maximum(pairs.second_end - 1, 0))[two], owner[two]
    )


def test_labels_say_the_order(pairs):
    """0: the first segment ends before the second begins. Half are swapped, within 4 standard deviations."""
    two = pairs.second_end > pairs.second_start
    in_order = pairs.first_end <= pairs.second_start
    np.testing.assert_array_equal(pairs.labels[two] == 0, in_order[two])
    assert (pairs.labels[~two] == NO_SENTENCE_ORDER).all()
    swapped = (pairs.labels[two] == 1).mean()
    assert abs(swapped - 0.5) < 4 * 0.5 / np.sqrt(two.sum())
    overlap = np.minimum(pairs.first_end, pairs.second_end) > np.maximum(
        pairs.first_start, pairs.second_start
    )
    assert not overlap[two].any()


def predecessors_chunks(sizes: list[int], target: int, algorithm: str) -> list[tuple[int, int]]:
    """The walk of Google's and brightmart's (and so albert_pytorch's) code over one document, step by step."""
    chunks, chunk, i = [], [], 0
    while i < len(sizes):
        chunk.append(i)
        if i == len(sizes) - 1 or sum(sizes[j] for j in chunk) >= target:
            if len(chunk) == 1 and algorithm == "albert_pytorch":
                i += 1  # the line that albert_pytorch lacks: there, the same sentence comes again as its own partner
                continue
            chunks.append((chunk[0], chunk[-1] + 1))
            chunk = []
        i += 1
    return chunks


@pytest.mark.parametrize("algorithm", ["google", "albert_pytorch"])
def test_chunks_are_those_of_the_predecessors(documents, algorithm):
    """With targets from 2 tokens on, so that many chunks have one sentence."""
    targets = np.random.default_rng(3).integers(2, 126, len(documents.document_ends) - 1)
    policy = PairPolicy(128, algorithm=algorithm)
    starts, stops = _chunk(documents.sentence_ends, documents.document_ends, targets, policy)
    wanted = []
    for i, (begin, end) in enumerate(pairwise(documents.document_ends.tolist())):
        sizes = np.diff(documents.sentence_ends[begin : end + 1]).tolist()
        chunks = predecessors_chunks(sizes, int(targets[i]), algorithm)
        wanted += [(begin + start, begin + stop) for start, stop in chunks]
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == wanted
    alone = sum(stop - start == 1 for start, stop in wanted)
    assert alone > 500 if algorithm == "google" else alone == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_boundaries_inside_a_chunk_are_equally_likely(algorithm):
    """Documents of four sentences, one chunk each: three boundaries, each a third within 4 standard deviations."""
    documents = documents_of([[10] * 4] * 3000)
    policy = PairPolicy(128, short_seq_prob=0, algorithm=algorithm)
    pairs = make_pairs(documents, CLAUSES, policy, np.random.default_rng(0))
    split = np.where(pairs.labels == 0, pairs.second_start, pairs.first_start) % 40
    assert sorted(set(split.tolist())) == [10, 20, 30]
    shares = np.bincount(split)[[10, 20, 30]] / len(split)
    assert np.abs(shares - 1 / 3).max() < 4 * np.sqrt(2 / 9 / len(split))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lengths_do_not_tell_the_order(algorithm):
    """Pairs that are cut to 63 and 62 tokens: either segment may be the longer one, whatever the label is."""
    documents = documents_of([[100, 90]] * 2000)
    policy = PairPolicy(128, short_seq_prob=0, algorithm=algorithm)
    pairs = make_pairs(documents, np.zeros_like(CLAUSES), policy, np.random.default_rng(0))
    first, second = pairs.first_end - pairs.first_start, pairs.second_end - pairs.second_start
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == {(63, 62)}
    assert abs((pairs.labels == 1).mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)


def test_every_sentence_is_in_exactly_one_example_but_for_truncation(documents):
    pairs = make_pairs(documents, CLAUSES, PairPolicy(30_000, short_seq_prob=0), np.random.default_rng(2))
    seen = np.zeros(len(documents.ids), int)
    for start, end in ((pairs.first_start, pairs.first_end), (pairs.second_start, pairs.second_end)):
        for a, b in zip(start, end, strict=True):
            seen[a:b] += 1
    assert (seen == 1).all()


def test_truncation_equals_berts_loop_in_closed_form():
    rng = np.random.default_rng(0)
    a, b, limit = rng.integers(1, 200, 500), rng.integers(1, 200, 500), 120
    begin = np.zeros(500, np.int64)
    swap = rng.random(500) < 0.5
    a_start, a_end, b_start, b_end = _truncate_pairs(begin, a, a + b, swap, limit, rng)
    for i in range(500):
        left, right = int(a[i]), int(b[i])
        while left + right > limit:
            if left > right or (left == right and swap[i]):
                left -= 1
            else:
                right -= 1
        assert (a_end[i] - a_start[i], b_end[i] - b_start[i]) == (left, right)
    # Half of what goes is taken from the front, within 4 standard deviations.
    cut = int((a - (a_end - a_start)).sum())
    assert cut > 5000
    assert abs(int(a_start.sum()) / cut - 0.5) < 4 * 0.5 / np.sqrt(cut)


def test_a_sentence_that_is_left_over_joins_the_chunk_before_it():
    documents = documents_of([[60, 60, 10]])
    pairs = make_pairs(documents, CLAUSES, PairPolicy(128 + 16, short_seq_prob=0), np.random.default_rng(0))
    assert pairs.num_examples == 1
    documents = documents_of([[70, 70, 60]])
    documents.ids[:] = 9
    pairs = make_pairs(documents, CLAUSES, PairPolicy(128, short_seq_prob=0), np.random.default_rng(0))
    assert pairs.labels.tolist()[1:] == [NO_SENTENCE_ORDER]
    assert (pairs.first_start[1], pairs.first_end[1]) == (140, 200)


def test_one_sentence_documents_are_split_at_a_clause_or_kept_as_one_segment():
    documents = documents_of([[30]] * 50)
    documents.ids[:] = np.arange(10, 10 + 1500)
    documents.ids[np.arange(0, 750, 30) + 12] = COMMA
    pairs = make_pairs(documents, CLAUSES, PairPolicy(128), np.random.default_rng(0))
    two = pairs.second_end > pairs.second_start
    assert two.tolist() == [True] * 25 + [False] * 25
    split = np.where(pairs.labels == 0, pairs.second_start, pairs.first_start)[:25]
    assert (split % 30 == 13).all()
    assert (pairs.labels[25:] == NO_SENTENCE_ORDER).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_refrain_never_becomes_a_pair_with_itself(algorithm):
    documents = documents_of([[6, 6]] * 40)
    documents.ids[:] = np.tile([11, 12, 13, 14, 15, 16], 80)
    policy = PairPolicy(128, short_seq_prob=0, algorithm=algorithm)
    pairs = make_pairs(documents, CLAUSES, policy, np.random.default_rng(0))
    assert pairs.num_examples == (0 if algorithm == "albert_pytorch" else 40)
    assert (pairs.labels == NO_SENTENCE_ORDER).all()
    assert (pairs.second_end == pairs.second_start).all()


def test_long_sentences_are_cut_at_clauses_without_losing_a_token():
    documents = documents_of([[20, 1000, 5], [400]], seed=4)
    split = split_long_sentences(documents, CLAUSES, 125)
    sizes = np.diff(split.sentence_ends)
    assert sizes.max() <= 125
    assert split.sentence_ends[-1] == documents.sentence_ends[-1] == 1425
    np.testing.assert_array_equal(split.sentence_ends[split.document_ends], [0, 1025, 1425])
    cuts = np.setdiff1d(split.sentence_ends, documents.sentence_ends)
    assert (documents.ids[cuts - 1] == COMMA).mean() > 0.9


@pytest.mark.parametrize(
    ("algorithm", "labelled"),
    [
        ("strict", [False, True, False, False, False, True, True]),  # 300 = 125 + 125 + 50
        ("google", [False, True, False, False, False, True]),
        ("albert_pytorch", [True, True, True]),
    ],
)
def test_what_becomes_of_a_sentence_that_is_alone(algorithm, labelled):
    documents = documents_of([[30], [70, 70, 60], [300, 10], [30, 30]])
    policy = PairPolicy(128, short_seq_prob=0, algorithm=algorithm)
    pairs = make_pairs(documents, np.zeros_like(CLAUSES), policy, np.random.default_rng(0))
    assert (pairs.labels >= 0).tolist() == labelled


def test_single_segment_has_no_pairs(documents):
    policy = PairPolicy(128, algorithm="none")
    pairs = make_pairs(documents, CLAUSES, policy, np.random.default_rng(0))
    assert (pairs.labels == NO_SENTENCE_ORDER).all()
    assert (pairs.first_end - pairs.first_start).max() == 126
    assert (pairs.second_end == pairs.second_start).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_short_sequences_are_as_frequent_as_asked(algorithm):
    """One document, one target: short ones have a share of 0.3 within 4 standard deviations."""
    documents = documents_of([[5] * 60] * 1500)
    policy = PairPolicy(103, short_seq_prob=0.3, algorithm=algorithm)
    pairs = make_pairs(documents, CLAUSES, policy, np.random.default_rng(0))
    first = np.unique(document_of(documents, pairs.first_start), return_index=True)[1]
    total = pairs.first_end - pairs.first_start + pairs.second_end - pairs.second_start
    short = (total[first] < 96).mean()
    assert abs(short - 0.3 * 94 / 99) < 4 * np.sqrt(0.3 * 0.7 / 1500)


def test_packing_joins_documents_and_splits_inside_one_of_them():
    documents = documents_of([[10, 10]] * 200)
    documents.ids[:] = np.arange(10, 10 + 4000)
    packed = pack_documents(documents, 125)
    assert np.diff(packed.document_ends).tolist() == [14] * 28 + [8]
    pairs = make_pairs(packed, CLAUSES, PairPolicy(144, short_seq_prob=0), np.random.default_rng(0))
    assert (pairs.labels >= 0).all()
    later = np.where(pairs.labels == 0, pairs.second_start, pairs.first_start)
    earlier = np.where(pairs.labels == 0, pairs.first_end, pairs.second_end)
    np.testing.assert_array_equal(later, earlier)
    assert (later % 20 == 10).all()


def test_the_same_generator_gives_the_same_pairs(documents):
    first, second = (
        make_pairs(documents, CLAUSES, PairPolicy(128), np.random.default_rng(5)) for _ in range(2)
    )
    np.testing.assert_array_equal(first.first_start, second.first_start)
    np.testing.assert_array_equal(first.labels, second.labels)
