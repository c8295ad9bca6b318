"""Measure a finished dataset: what its examples are like, and what about them should worry somebody."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albert.blocks import Block
from albert.manifest import Manifest, dataset_tokenizer, read_manifest
from albert.masking import MaskingPolicy
from albert.tokenization import Tokenizer, load_tokenizer
from data_prep.show import ShownExample, read_blocks, take_example

_SAMPLES = 5
_MAX_RUN = 12
"""Longest run of masked words that is counted by itself."""


@dataclass
class Audit:
    """Counts over the examples that were looked at; everything else follows from them."""

    directory: str
    manifest: Manifest
    tokenizer: Tokenizer
    examples: int = 0
    tokens: int = 0
    masked: int = 0
    replaced: Counter[str] = field(default_factory=Counter)
    """Predicted positions by what stands there: mask, random, original"""
    orders: Counter[int] = field(default_factory=Counter)
    """Examples by sentence-order label"""
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[max_seq_length + 1] examples by length"""
    position_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[max_seq_length] ordinary tokens by position"""
    position_masked: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[max_seq_length] predictions by position"""
    runs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_MAX_RUN + 1, np.int64))
    """[13] runs of masked words by length; neighbouring n-grams make one run"""
    position_expected: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """[max_seq_length] predictions by position, if those of each example were spread evenly over its tokens"""
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[vocab] predictions by label"""
    frequencies: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[vocab] ordinary tokens of the text"""
    unknown: int = 0
    special_masked: int = 0
    over_budget: int = 0
    copied_pairs: int = 0
    repeated_examples: int = 0
    samples: list[ShownExample] = field(default_factory=list)

    @property
    def max_seq_length(self) -> int:
        """Longest example that is allowed."""
        return self.manifest.max_seq_length

    @property
    def median_length(self) -> int:
        """Half of the examples are at most this long."""
        return int(np.searchsorted(np.cumsum(self.lengths), self.examples / 2))

    @property
    def padding_share(self) -> float:
        """Share of padding, if every example were padded to max_seq_length; the trainer pads nothing."""
        return 1 - self.tokens / (self.examples * self.max_seq_length)

    @property
    def position_deviation(self) -> float:
        """Largest deviation of a tenth of the positions from an even spread, as a share; 0 if it may be chance."""
        masked, expected = (tenths(values) for values in (self.position_masked, self.position_expected))
        off = np.abs(masked - expected)
        return float((off / np.maximum(expected, 1))[off > 6 * np.sqrt(expected)].max(initial=0))

    @property
    def swapped_z(self) -> float:
        """Distance of the share of swapped pairs from one half, in standard deviations."""
        pairs = self.orders[0] + self.orders[1]
        return (self.orders[1] - self.orders[0]) / math.sqrt(pairs) if pairs else 0.0


def tenths(by_position: NDArray[Any]) -> NDArray[Any]:
    """[10] or fewer sums over stretches of positions."""
    edges = np.unique(np.linspace(0, len(by_position), 11).astype(int)[:-1])
    sums: NDArray[Any] = np.add.reduceat(by_position, edges)
    return sums


def audit_dataset(directory: Path | str, max_blocks: int = 200) -> Audit:
    """Measure the train split of a dataset on at most `max_blocks` blocks, spread evenly over it.

    Raises:
        MissingInputError, DataError: see `read_manifest` and `ShardReader.read_block`.
    """
    manifest = read_manifest(directory)
    audit = Audit(str(directory), manifest, load_tokenizer(dataset_tokenizer(directory, manifest)))
    audit.lengths = np.zeros(audit.max_seq_length + 1, np.int64)
    audit.position_tokens = np.zeros(audit.max_seq_length, np.int64)
    audit.position_masked = np.zeros(audit.max_seq_length, np.int64)
    audit.position_expected = np.zeros(audit.max_seq_length)
    audit.labels = np.zeros(audit.tokenizer.vocab_size, np.int64)
    audit.frequencies = np.zeros(audit.tokenizer.vocab_size, np.int64)
    seen: set[bytes] = set()
    for where, block in read_blocks(directory, manifest, "train", max_blocks):
        _add_block(audit, block)
        _add_texts(audit, block, seen)
        if len(audit.samples) < _SAMPLES:
            audit.samples.append(take_example(block, 0, f"{where}, example 0", audit.tokenizer))
    return audit


def _add_block(audit: Audit, block: Block) -> None:
    """Everything that is counted without looking at one example at a time."""
    lengths = block.lengths.astype(np.int64)
    offsets = np.cumsum(lengths) - lengths
    positions = np.arange(int(lengths.sum())) - np.repeat(offsets, lengths)
    original = block.original_ids()
    special = np.zeros(len(original), np.bool_)
    for at in (offsets, offsets + block.segment_a_lengths - 1, offsets + lengths - 1):
        special[at] = True
    flat = np.repeat(offsets, block.num_masked) + block.masked_lm_positions
    audit.examples += block.num_examples
    audit.tokens += len(original)
    audit.masked += len(flat)
    audit.lengths += np.bincount(lengths, minlength=len(audit.lengths))
    ordinary = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[~special], minlength=len(lengths))
    rates = np.repeat(block.num_masked / np.maximum(ordinary, 1), ordinary)
    audit.position_tokens += np.bincount(positions[~special], minlength=audit.max_seq_length)
    audit.position_expected += np.bincount(positions[~special], rates, audit.max_seq_length)
    audit.frequencies += np.bincount(original[~special], minlength=len(audit.frequencies))
    audit.position_masked += np.bincount(block.masked_lm_positions, minlength=audit.max_seq_length)
    audit.labels += np.bincount(block.masked_lm_labels, minlength=len(audit.labels))
    audit.orders.update(block.sentence_order_labels.tolist())
    audit.unknown += int((original == audit.tokenizer.unk_id).sum())
    audit.special_masked += int(special[flat].sum())
    audit.over_budget += int((block.num_masked > _policy(audit).budgets(lengths)).sum())
    now = block.input_ids[flat]
    masks, kept = now == audit.tokenizer.mask_id, now == block.masked_lm_labels
    audit.replaced["mask"] += int(masks.sum())
    audit.replaced["original"] += int((kept & ~masks).sum())
    audit.replaced["random"] += int((~masks & ~kept).sum())
    audit.runs += _count_runs(block, special, flat)


def _count_runs(block: Block, special: NDArray[np.bool_], flat: NDArray[Any]) -> NDArray[np.int64]:
    """[13] how often 1, 2, ... words in a row are predicted; special tokens end a run."""
    predicted = np.zeros(len(special), np.bool_)
    predicted[flat] = True
    words = np.flatnonzero(block.word_start_bits().view(np.bool_) | special)
    state = np.concatenate(([False], predicted[words], [False]))
    edges = np.flatnonzero(state[1:] != state[:-1])
    runs = np.minimum(edges[1::2] - edges[::2], _MAX_RUN)
    return np.bincount(runs, minlength=_MAX_RUN + 1)


def _add_texts(audit: Audit, block: Block, seen: set[bytes]) -> None:
    """What needs a look at each example: pairs of twice the same text, examples that came before."""
    original = block.original_ids()
    begin = 0
    for length, a_length in zip(block.lengths.tolist(), block.segment_a_lengths.tolist(), strict=True):
        text = original[begin : begin + length]
        begin += length
        audit.copied_pairs += bool(np.array_equal(text[1 : a_length - 1], text[a_length:-1]))
        key = hashlib.blake2b(np.sort(text).tobytes(), digest_size=12).digest()
        audit.repeated_examples += key in seen
        seen.add(key)


def _policy(audit: Audit) -> MaskingPolicy:
    """The masking policy that the manifest describes."""
    settings = audit.manifest.settings
    return MaskingPolicy.of_tokenizer(
        audit.tokenizer,
        masked_lm_prob=settings["masked_lm_prob"],
        max_predictions_per_seq=settings["max_predictions_per_seq"],
        max_ngram=settings["max_ngram"],
        favor=settings["favor_ngram"],
    )


def ngram_law(audit: Audit) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Observed and wanted share of drawn n-grams by length, and the largest deviation in standard deviations."""
    wanted = _policy(audit).ngram_probabilities()
    totals: dict[str, Any] = audit.manifest.totals
    drawn = np.array([totals.get(f"drawn_ngrams.{n}", 0) for n in range(1, len(wanted) + 1)], float)
    total = max(drawn.sum(), 1.0)
    deviation = np.abs(drawn / total - wanted) / np.sqrt(np.maximum(wanted * (1 - wanted), 1e-12) / total)
    return drawn / total, wanted, float(deviation.max()) if len(wanted) > 1 else 0.0
