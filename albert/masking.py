"""n-gram whole-word masking of many examples at once (Lan et al. 2020, section 3.1). Imports no torch.

The masks of an example are a pure function of its tokens and its 64-bit key, whatever other examples are in the
call: data preparation and re-masking at load time give the same masks for the same key, in any grouping.

Departures from Google's code, on purpose: lengths n are drawn from a seeded generator; an n-gram that meets a
taken word looks for another place instead of being dropped, so that accepted n-grams keep p(n) ~ 1/n; no n-gram
runs over [SEP]; random replacements are ordinary pieces, never special ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from albert.blocks import Block
from albert.tokenization import Tokenizer

Keys = NDArray[np.uint64]

_MAX_FAILURES = 24
"""Places that an n-gram tries in a row before its example is left below the budget."""
_LOW_32_BITS = np.uint64(0xFFFFFFFF)
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = 32
"""Attempts whose draws are made at once."""
_REPLACEMENT_STREAM = 1 << 32
"""First counter of the draws that decide 80/10/10; the draws of n-grams stay below."""


@dataclass(frozen=True)
class MaskingPolicy:
    """How much is masked and how."""

    mask_id: int
    random_ids: NDArray[np.int64]
    """[ordinary] what a random replacement is drawn from"""
    masked_lm_prob: float = 0.15
    max_predictions_per_seq: int = 1 << 15
    max_ngram: int = 3
    favor: Literal["shorter", "longer"] = "shorter"
    """shorter: p(n) ~ 1/n; longer: the same law reversed, p(n) ~ 1/(max_ngram + 1 - n)"""

    @staticmethod
    def of_tokenizer(tokenizer: Tokenizer, **options: Any) -> MaskingPolicy:
        """The policy that fits a vocabulary."""
        return MaskingPolicy(tokenizer.mask_id, tokenizer.ordinary_ids(), **options)

    def ngram_probabilities(self) -> NDArray[np.float64]:
        """[max_ngram] probability of n = 1, 2, ..."""
        weights = 1.0 / np.arange(1, self.max_ngram + 1)
        return (weights if self.favor == "shorter" else weights[::-1]) / weights.sum()

    def budgets(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """[examples] predictions allowed: as Google, min(max, max(1, round(0.15 n))), specials counted in n."""
        wanted = np.maximum(1, np.rint(self.masked_lm_prob * lengths))
        return np.minimum(wanted, self.max_predictions_per_seq).astype(np.int64)


@dataclass(frozen=True)
class MaskedExamples:
    """What masking made of examples that lie end to end."""

    input_ids: NDArray[Any]
    """[tokens] ids after masking"""
    positions: NDArray[np.uint16]
    """[preds] positions inside their example, ascending"""
    labels: NDArray[Any]
    """[preds] original ids"""
    num_masked: NDArray[np.uint16]
    """[examples]"""
    drawn_ngrams: NDArray[np.int64]
    """[max_ngram] how often n = 1, 2, ... was drawn"""
    cut_ngrams: int
    """Of those, how many were shortened to the rest of a budget or for want of a place."""


@dataclass
class _Words:
    """Words of all examples in one row: where they begin, and which are taken (special tokens always are)."""

    bounds: NDArray[np.int64]
    """[words + max_ngram] token at which each word or special token begins, padded with the token count"""
    taken: NDArray[np.bool_]
    """[words + max_ngram]"""
    first: NDArray[np.int64]
    """[examples] index of the first word of each example, its [CLS]"""
    count: NDArray[np.int64]
    """[examples]"""
    chosen: list[NDArray[np.int64]] = field(default_factory=list)
    """Indices of words to predict"""


def mask_examples(
    ids: NDArray[Any],
    lengths: NDArray[Any],
    segment_a_lengths: NDArray[Any],
    word_starts: NDArray[Any],
    keys: Keys,
    policy: MaskingPolicy,
) -> MaskedExamples:
    """Choose n-grams of whole words to predict, and corrupt them: 80 % [MASK], 10 % random, 10 % unchanged.

    Args:
        ids: [tokens] original ids, `[CLS] A [SEP] B [SEP]` or `[CLS] A [SEP]`, examples end to end.
        lengths: [examples] tokens.
        segment_a_lengths: [examples] tokens of `[CLS] A [SEP]`.
        word_starts: [tokens] 1 where a word begins, 0 for special tokens.
        keys: [examples] the only source of randomness, see `example_keys`.
        policy: how much and how.

    Returns:
        Never more predictions than the budget, never a special token, and at least one prediction in every
        example that has an ordinary token.
    """
    lengths = lengths.astype(np.int64)
    offsets = np.cumsum(lengths) - lengths
    special = _special_flags(len(ids), lengths, offsets, segment_a_lengths)
    words = _find_words(word_starts, special, offsets, policy.max_ngram)
    budgets = policy.budgets(lengths)
    left, drawn, cut = _choose_ngrams(words, budgets, keys, policy)
    masked = np.zeros(len(ids), np.bool_)
    _mark(masked, words)
    empty = np.flatnonzero(left == budgets)
    num_masked = budgets - left
    num_masked[empty] = _mask_one_token(masked, special, empty, offsets, lengths, keys)
    flat = np.flatnonzero(masked)
    example = np.repeat(np.arange(len(lengths)), num_masked)
    return MaskedExamples(
        input_ids=_corrupt(ids, flat, keys[example], offsets[example], policy),
        positions=(flat - offsets[example]).astype(np.uint16),
        labels=ids[flat],
        num_masked=num_masked.astype(np.uint16),
        drawn_ngrams=drawn,
        cut_ngrams=cut,
    )


def remask_block(block: Block, keys: Keys, policy: MaskingPolicy) -> Block:
    """The same examples with fresh masks: restore the text, mask again under new keys [examples]."""
    masked = mask_examples(
        block.original_ids(),
        block.lengths,
        block.segment_a_lengths,
        block.word_start_bits(),
        keys,
        policy,
    )
    return Block(
        input_ids=masked.input_ids,
        lengths=block.lengths,
        segment_a_lengths=block.segment_a_lengths,
        masked_lm_positions=masked.positions,
        masked_lm_labels=masked.labels,
        num_masked=masked.num_masked,
        sentence_order_labels=block.sentence_order_labels,
        word_starts=block.word_starts,
    )


def example_keys(*coordinates: int | Iterable[int] | NDArray[Any]) -> Keys:
    """64-bit keys that are a pure function of coordinates, for example (seed, epoch, positions [examples])."""
    key: Keys = np.zeros(1, np.uint64)
    for coordinate in coordinates:
        value = np.atleast_1d(np.asarray(coordinate)).astype(np.uint64)
        key = _mix(key ^ _mix(value))
    return key


def _mix(x: Keys) -> Keys:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014); [n] to [n]."""
    x = x + np.uint64(_GAMMA)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _draw(keys: Keys, counters: int | NDArray[Any]) -> Keys:
    """64 random bits for each key at a counter."""
    return _mix(keys + np.atleast_1d(np.asarray(counters, np.uint64)) * np.uint64(_GAMMA))


def _special_flags(
    num_tokens: int, lengths: NDArray[np.int64], offsets: NDArray[np.int64], a_lengths: NDArray[Any]
) -> NDArray[np.bool_]:
    """[tokens] True at [CLS] and both [SEP]."""
    special = np.zeros(num_tokens, np.bool_)
    special[offsets] = True
    special[offsets + a_lengths - 1] = True
    special[offsets + lengths - 1] = True
    return special


def _find_words(
    word_starts: NDArray[Any], special: NDArray[np.bool_], offsets: NDArray[np.int64], max_ngram: int
) -> _Words:
    """Words and special tokens of all examples; a special token is a word that is taken from the start."""
    bounds = np.flatnonzero(word_starts.view(np.bool_) | special)
    first = np.searchsorted(bounds, offsets)
    count = np.diff(first, append=len(bounds))
    padded = np.concatenate((bounds, np.full(max_ngram, len(special))))
    taken = np.ones(len(padded), np.bool_)
    np.take(special, bounds, out=taken[: len(bounds)])
    return _Words(padded, taken, first, count)


def _choose_ngrams(
    words: _Words, budgets: NDArray[np.int64], keys: Keys, policy: MaskingPolicy
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Place n-grams in all examples at once, one attempt per round and example, until the budgets are used.

    Returns:
        [examples] rest of each budget, [max_ngram] how often each n was drawn, and how many were cut.
    """
    left = budgets.copy()
    new: list[NDArray[np.int64]] = []
    cut = 0
    active = np.flatnonzero(words.count > 2)
    rest = budgets[active]
    size = np.zeros(len(active), np.int64)  # n of the n-gram that looks for a place, 0 for none
    wanted = np.zeros(len(active), np.int64)  # n as it was drawn
    failures = np.zeros(len(active), np.int64)
    for first_attempt in range(0, _REPLACEMENT_STREAM, _ROUNDS):
        if not len(active):
            break
        drawn_sizes, drawn_words = _draw_places(words, active, keys, first_attempt, policy)
        column = np.arange(len(active))
        for drawn_size, drawn_word in zip(drawn_sizes, drawn_words, strict=True):
            fresh = np.flatnonzero(size == 0)
            new.append(drawn_size[column[fresh]])
            size[fresh] = wanted[fresh] = new[-1]
            placed, too_long = _place(words, drawn_word[column], size, rest)
            failures = np.where(placed, 0, failures + 1)
            stuck = failures > _MAX_FAILURES
            cut += int(np.count_nonzero(placed & (size < wanted)))
            done = (rest == 0) | (stuck & (size == 1))
            size = np.where(placed, 0, np.maximum(size - (too_long | stuck), 1))
            if done.any():
                left[active] = rest
                going_on = np.flatnonzero(~done)
                state = (active, column, rest, size, wanted, failures)
                active, column, rest, size, wanted, failures = (part[going_on] for part in state)
                if not len(active):
                    break
    drawn = np.bincount(np.concatenate(new), minlength=policy.max_ngram + 1) if new else np.zeros(1, np.int64)
    return left, drawn[1:], cut


def _draw_places(
    words: _Words, active: NDArray[np.int64], keys: Keys, first_attempt: int, policy: MaskingPolicy
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws of the next attempts: [rounds, active] n of an n-gram that may be new, and the word it would begin at."""
    law = policy.ngram_probabilities()
    # Thresholds on 32 bits: n is one more than the number of thresholds at or below the draw.
    thresholds = np.floor(np.cumsum(law)[:-1] * 2.0**32).astype(np.uint64)
    attempts = np.arange(first_attempt, first_attempt + _ROUNDS)
    bits = _draw(keys[active], attempts[:, None])
    sizes = np.searchsorted(thresholds, bits & _LOW_32_BITS, side="right") + 1
    spread = (bits >> np.uint64(32)) * words.count[active].astype(np.uint64)
    return sizes, words.first[active] + (spread >> np.uint64(32)).astype(np.int64)


def _place(
    words: _Words, word: NDArray[np.int64], n: NDArray[np.int64], rest: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Try to take `n` words from `word` on, out of the `rest` of the budget, which shrinks; all are [active].

    Returns:
        [active] placed, and free but over the budget.
    """
    step = np.arange(int(n.max()))[:, None]
    wanted = word + step
    inside = step < n
    free = ~(words.taken[wanted] & inside).any(axis=0)
    # Past a taken word the end may lie outside; then `free` is False.
    tokens = words.bounds[np.minimum(word + n, len(words.bounds) - 1)] - words.bounds[word]
    placed = free & (tokens <= rest)
    chosen = wanted[inside & placed]
    words.taken[chosen] = True
    words.chosen.append(chosen)
    rest -= tokens * placed
    return placed, free & ~placed


def _mark(masked: NDArray[np.bool_], words: _Words) -> None:
    """Set the tokens of the chosen words."""
    if not words.chosen:
        return
    chosen = np.concatenate(words.chosen)
    starts, ends = words.bounds[chosen], words.bounds[chosen + 1]
    masked[starts] = True
    longer = np.flatnonzero(ends - starts > 1)
    step = 1
    while len(longer):
        masked[starts[longer] + step] = True
        step += 1
        longer = longer[ends[longer] - starts[longer] > step]


def _mask_one_token(
    masked: NDArray[np.bool_],
    special: NDArray[np.bool_],
    examples: NDArray[np.int64],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    keys: Keys,
) -> NDArray[np.int64]:
    """Where no whole word fits the budget, predict one token all the same; returns [examples] 1 or 0."""
    counts = np.zeros(len(examples), np.int64)
    for i, example in enumerate(examples.tolist()):
        begin = int(offsets[example])
        ordinary = np.flatnonzero(~special[begin : begin + int(lengths[example])])
        if len(ordinary):
            pick = int(_draw(keys[example : example + 1], _REPLACEMENT_STREAM - 1)[0]) % len(ordinary)
            masked[begin + int(ordinary[pick])] = True
            counts[i] = 1
    return counts


def _corrupt(
    ids: NDArray[Any],
    flat: NDArray[np.int64],
    keys: Keys,
    offsets: NDArray[np.int64],
    policy: MaskingPolicy,
) -> NDArray[Any]:
    """Ids with [MASK] at 80 % of `flat` [preds], an ordinary piece at 10 %, the original at 10 %."""
    bits = _draw(keys, flat - offsets + _REPLACEMENT_STREAM)
    choice = (bits & _LOW_32_BITS).astype(np.float64) / 2.0**32
    index = (bits >> np.uint64(32)) * np.uint64(len(policy.random_ids)) >> np.uint64(32)
    random_ids = policy.random_ids.astype(ids.dtype)[index.astype(np.int64)]
    replaced = np.where(choice < 0.8, ids.dtype.type(policy.mask_id), random_ids)
    out = ids.copy()
    out[flat] = np.where(choice < 0.9, replaced, ids[flat])
    return out
