"""Masks follow the law of the paper, within the sampling error that is stated beside each figure."""

from __future__ import annotations

import numpy as np
import pytest

from albert.blocks import Block
from albert.masking import MaskingPolicy, example_keys, mask_examples, remask_block

CLS, SEP, MASK, FIRST, VOCAB = 2, 3, 4, 5, 3000
ORDINARY = np.arange(FIRST, VOCAB)


def make_examples(
    count: int, seed: int, lengths: tuple[int, int] = (90, 128), word_start: float = 0.7
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random pairs: ids, lengths, segment A lengths, word starts."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(lengths[0], lengths[1] + 1, count)
    a_lengths = np.maximum(3, (sizes * rng.uniform(0.2, 0.8, count)).astype(int))
    offsets = np.cumsum(sizes) - sizes
    ids = rng.integers(FIRST, VOCAB, sizes.sum())
    starts = rng.random(sizes.sum()) < word_start
    for at in (offsets, offsets + a_lengths - 1):
        starts[at + 1] = True
    for at, value in ((offsets, CLS), (offsets + a_lengths - 1, SEP), (offsets + sizes - 1, SEP)):
        ids[at], starts[at] = value, False
    return ids.astype(np.uint16), sizes.astype(np.uint16), a_lengths.astype(np.uint16), starts


@pytest.fixture(scope="module")
def policy() -> MaskingPolicy:
    return MaskingPolicy(MASK, ORDINARY)


@pytest.fixture(scope="module")
def examples():
    return make_examples(4000, 1)


@pytest.fixture(scope="module")
def masked(examples, policy):
    return mask_examples(*examples, example_keys(7, np.arange(4000)), policy)


def flat_positions(examples, masked) -> np.ndarray:
    lengths = examples[1].astype(np.int64)
    return np.repeat(np.cumsum(lengths) - lengths, masked.num_masked) + masked.positions


def test_labels_are_the_originals_and_nothing_else_changes(examples, masked):
    ids = examples[0]
    flat = flat_positions(examples, masked)
    assert (np.diff(flat) > 0).all()
    np.testing.assert_array_equal(masked.labels, ids[flat])
    untouched = np.ones(len(ids), bool)
    untouched[flat] = False
    np.testing.assert_array_equal(masked.input_ids[untouched], ids[untouched])
    assert masked.input_ids.dtype == ids.dtype


def test_no_special_token_is_masked_and_no_budget_exceeded(examples, masked, policy):
    lengths = examples[1]
    assert (masked.labels >= FIRST).all()
    budgets = np.minimum(policy.max_predictions_per_seq, np.maximum(1, np.rint(0.15 * lengths)))
    assert (masked.num_masked <= budgets).all()
    # Words of several tokens do not always fill a budget, but they come close: less than one token is missing.
    assert 0 <= (budgets - masked.num_masked).mean() < 0.05


def test_rate_and_replacements(examples, masked):
    """0.15 +- rounding of the budget; 80/10/10 within 4 standard deviations of a binomial."""
    count = len(masked.labels)
    assert masked.num_masked.sum() / examples[1].sum(dtype=int) == pytest.approx(0.15, abs=0.002)
    now = masked.input_ids[flat_positions(examples, masked)]
    # One random replacement in 2995 is the original.
    same = 0.1 / len(ORDINARY)
    for observed, wanted in (
        ((now == MASK).mean(), 0.8),
        ((now == masked.labels).mean(), 0.1 + same),
        (((now != MASK) & (now != masked.labels)).mean(), 0.1 - same),
    ):
        assert abs(observed - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / count)
    random = now[(now != MASK) & (now != masked.labels)]
    assert random.min() >= FIRST
    assert len(np.unique(random)) > 0.8 * len(ORDINARY)


@pytest.mark.parametrize(
    ("max_ngram", "favor", "law"),
    [
        (1, "shorter", [1.0]),
        (3, "shorter", [6 / 11, 3 / 11, 2 / 11]),
        (3, "longer", [2 / 11, 3 / 11, 6 / 11]),
        (5, "shorter", [60 / 137, 30 / 137, 20 / 137, 15 / 137, 12 / 137]),
    ],
)
def test_ngram_lengths_follow_their_law(examples, max_ngram, favor, law):
    """Drawn lengths within 4 standard deviations of a multinomial; at most one n-gram of an example is cut."""
    policy = MaskingPolicy(MASK, ORDINARY, max_ngram=max_ngram, favor=favor)
    np.testing.assert_allclose(policy.ngram_probabilities(), law)
    masked = mask_examples(*examples, example_keys(3, np.arange(4000)), policy)
    total = masked.drawn_ngrams.sum()
    sigma = np.sqrt(np.array(law) * (1 - np.array(law)) / total)
    assert total > 20_000
    assert (np.abs(masked.drawn_ngrams / total - law) <= 4 * sigma).all()
    assert masked.cut_ngrams <= 1.2 * len(examples[1])


def test_runs_of_words_obey_the_law_where_ngrams_rarely_touch():
    """With 2 % masked, a run is one n-gram but for about 4 % that touch or are cut: absolute error below 0.03."""
    ids, lengths, a_lengths, starts = make_examples(200, 5, (4000, 4500), word_start=1.0)
    policy = MaskingPolicy(MASK, ORDINARY, masked_lm_prob=0.02)
    masked = mask_examples(ids, lengths, a_lengths, starts, example_keys(1, np.arange(200)), policy)
    flat = flat_positions((ids, lengths), masked)
    edges = np.flatnonzero(np.diff(flat, prepend=-9) != 1)
    runs = np.bincount(np.diff(edges, append=len(flat)))[1:4]
    np.testing.assert_allclose(runs / runs.sum(), [6 / 11, 3 / 11, 2 / 11], atol=0.03)


def test_whole_words_are_masked(examples, masked):
    """A masked word is masked to its end: the token after a masked one is masked, a word start or special."""
    ids, _, _, starts = examples
    predicted = np.zeros(len(ids), bool)
    predicted[flat_positions(examples, masked)] = True
    inside = ~starts & (ids >= FIRST)
    np.testing.assert_array_equal(predicted[inside], predicted[np.flatnonzero(inside) - 1])


def test_rate_is_flat_over_positions(policy):
    """Words away from the ends of a segment are all as likely: within 5 standard deviations, by position."""
    count, length = 6000, 64
    ids, lengths, a_lengths, starts = fixed_pairs(count, length, 32)
    masked = mask_examples(ids, lengths, a_lengths, starts, example_keys(5, np.arange(count)), policy)
    rate = np.bincount(masked.positions, minlength=length) / count
    inner = np.r_[3:29, 34:61]
    mean = rate[inner].mean()
    assert (np.abs(rate[inner] - mean) < 5 * np.sqrt(mean * (1 - mean) / count)).all()
    assert (rate[[0, 31, 63]] == 0).all()
    assert (rate[[1, 2, 29, 30, 32, 33, 61, 62]] > 0.5 * mean).all()


def fixed_pairs(count: int, length: int, a_length: int):
    ids = np.full((count, length), 100, np.uint16)
    starts = np.ones((count, length), bool)
    for position, value in ((0, CLS), (a_length - 1, SEP), (length - 1, SEP)):
        ids[:, position], starts[:, position] = value, False
    sizes = np.full(count, length, np.uint16)
    return ids.ravel(), sizes, np.full(count, a_length, np.uint16), starts.ravel()


def test_masks_of_an_example_do_not_depend_on_its_company(examples, masked, policy):
    ids, lengths, a_lengths, starts = examples
    keys = example_keys(7, np.arange(4000))
    ends = np.cumsum(lengths.astype(int))
    preds = np.cumsum(masked.num_masked.astype(int))
    for begin, end in ((0, 1), (17, 18), (100, 356), (3999, 4000)):
        tokens = slice(ends[begin] - int(lengths[begin]), ends[end - 1])
        part = slice(begin, end)
        alone = mask_examples(ids[tokens], lengths[part], a_lengths[part], starts[tokens], keys[part], policy)
        np.testing.assert_array_equal(alone.input_ids, masked.input_ids[tokens])
        first = preds[begin] - int(masked.num_masked[begin])
        np.testing.assert_array_equal(alone.positions, masked.positions[first : preds[end - 1]])


def test_other_keys_give_other_masks(examples, masked, policy):
    other = mask_examples(*examples, example_keys(8, np.arange(4000)), policy)
    ours, theirs = flat_positions(examples, masked), flat_positions(examples, other)
    assert len(np.intersect1d(ours, theirs)) / len(ours) == pytest.approx(0.15, abs=0.01)


def test_maximum_of_predictions_holds(examples):
    policy = MaskingPolicy(MASK, ORDINARY, max_predictions_per_seq=5)
    masked = mask_examples(*examples, example_keys(1, np.arange(4000)), policy)
    assert masked.num_masked.max() == 5


def test_degenerate_examples_get_a_prediction(policy):
    """One token; one word that is longer than its budget; two words of one token and one segment."""
    ids = np.array([CLS, 9, SEP, CLS, *range(10, 40), SEP, CLS, 50, 51, SEP], np.uint16)
    starts = np.zeros(len(ids), bool)
    starts[[1, 4, 36, 37]] = True
    lengths = np.array([3, 32, 4], np.uint16)
    masked = mask_examples(ids, lengths, lengths, starts, example_keys(0, np.arange(3)), policy)
    assert masked.num_masked.tolist() == [1, 1, 1]
    assert (masked.labels >= FIRST).all()


def test_an_example_of_special_tokens_only_has_no_prediction(policy):
    ids, starts = np.array([CLS, SEP, SEP], np.uint16), np.zeros(3, bool)
    lengths, a_lengths = np.array([3], np.uint16), np.array([2], np.uint16)
    masked = mask_examples(ids, lengths, a_lengths, starts, example_keys(0, np.arange(1)), policy)
    assert masked.num_masked.tolist() == [0]
    assert masked.input_ids.tolist() == ids.tolist()


def test_remasking_a_block_restores_the_text_first(examples, masked, policy):
    ids, lengths, a_lengths, starts = (
        column[: 64 if i in (1, 2) else None] for i, column in enumerate(examples)
    )
    tokens, preds = int(lengths.sum(dtype=int)), int(masked.num_masked[:64].sum(dtype=int))
    block = Block(
        masked.input_ids[:tokens],
        lengths,
        a_lengths,
        masked.positions[:preds],
        masked.labels[:preds],
        masked.num_masked[:64],
        np.zeros(64, np.int8),
        np.packbits(starts[:tokens]),
    )
    again = remask_block(block, example_keys(99, np.arange(64)), policy)
    again.check("again", VOCAB)
    np.testing.assert_array_equal(again.original_ids(), ids[:tokens])
    assert not np.array_equal(again.masked_lm_positions, block.masked_lm_positions)
    same = remask_block(block, example_keys(7, np.arange(64)), policy)
    np.testing.assert_array_equal(same.input_ids, block.input_ids)


def test_keys_are_a_fixed_function_of_their_coordinates():
    """Pinned, since datasets and resumed runs depend on it (SplitMix64 of 0 is 0xE220A8397B1DCDAF)."""
    assert example_keys(0).tolist() == [int(x) for x in example_keys([0])]
    keys = example_keys(1, 2, np.arange(100_000))
    assert len(np.unique(keys)) == 100_000
    assert (example_keys(2, 1, np.arange(3)) != example_keys(1, 2, np.arange(3))).all()
    ones = np.unpackbits(keys.view(np.uint8)).mean()
    assert ones == pytest.approx(0.5, abs=0.002)
