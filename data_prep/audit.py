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

from albert.masking import MaskingPolicy
from albert.shards import Block, Manifest, dataset_tokenizer, read_manifest
from albert.tokenization import Tokenizer, load_tokenizer
from data_prep.show import describe_example, read_blocks

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
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[vocab] predictions by label"""
    unknown: int = 0
    special_masked: int = 0
    over_budget: int = 0
    copied_pairs: int = 0
    repeated_examples: int = 0
    samples: list[str] = field(default_factory=list)

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
    def swapped_z(self) -> float:
        """Distance of the share of swapped pairs from one half, in standard deviations."""
        pairs = self.orders[0] + self.orders[1]
        return (self.orders[1] - self.orders[0]) / math.sqrt(pairs) if pairs else 0.0


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
    audit.labels = np.zeros(audit.tokenizer.vocab_size, np.int64)
    seen: set[bytes] = set()
    for where, block in read_blocks(directory, manifest, "train", max_blocks):
        _add_block(audit, block)
        _add_texts(audit, block, seen)
        if len(audit.samples) < _SAMPLES:
            audit.samples.append(describe_example(block, 0, f"{where}, example 0", audit.tokenizer))
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
    audit.position_tokens += np.bincount(positions[~special], minlength=audit.max_seq_length)
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


def report_lines(audit: Audit) -> list[str]:
    """The report for a terminal."""
    law, wanted, deviation = ngram_law(audit)
    pairs = audit.orders[0] + audit.orders[1]
    top = np.argsort(-audit.labels, kind="stable")[:12].tolist()
    names = audit.tokenizer.pieces(top)
    most = ", ".join(
        f"{p} {100 * audit.labels[i] / max(audit.masked, 1):.1f} %" for p, i in zip(names, top, strict=True)
    )
    shares = {
        kind: 100 * audit.replaced[kind] / max(audit.masked, 1) for kind in ("mask", "random", "original")
    }
    lines = [
        f"{audit.directory}: looked at {audit.examples:,} examples, {audit.tokens:,} tokens",
        f"  documents           {_documents(audit.manifest.totals)}",
        f"  length              mean {audit.tokens / audit.examples:.0f}, median {audit.median_length}, "
        f"full {100 * audit.lengths[-1] / audit.examples:.0f} %, padding if padded {100 * audit.padding_share:.0f} %",
        f"  predicted           {100 * audit.masked / audit.tokens:.2f} % of tokens; [MASK] {shares['mask']:.1f} %, "
        f"random {shares['random']:.1f} %, unchanged {shares['original']:.1f} %",
        f"  n-grams drawn       {_percent(law)}, law {_percent(wanted)}, off by {deviation:.1f} sigma; "
        f"{audit.manifest.totals.get('cut_ngrams', 0):,} cut at the end of a budget",
        f"  runs of words       {_percent(audit.runs[1:] / max(audit.runs.sum(), 1))}",
        f"  sentence order      {pairs:,} pairs, {100 * audit.orders[1] / max(pairs, 1):.2f} % swapped "
        f"({audit.swapped_z:+.1f} sigma), {audit.orders[-100]:,} with one segment",
        f"  unknown tokens      {100 * audit.unknown / audit.tokens:.3f} %",
        f"  masked special tokens {audit.special_masked}, over budget {audit.over_budget}, "
        f"copied pairs {audit.copied_pairs}",
        f"  most predicted      {most}",
    ]
    found = warnings(audit)
    return lines + [f"warning: {text}" for text in found] + ([] if found else ["no warnings"])


def _documents(totals: dict[str, Any]) -> str:
    rejected = sum(count for key, count in totals.items() if key.startswith("rejected."))
    return (
        f"{totals['documents_in']:,} in = {totals.get('train.documents', 0):,} train + "
        f"{totals.get('eval.documents', 0):,} eval + {rejected:,} rejected"
    )


def _percent(shares: NDArray[np.float64]) -> str:
    return " ".join(f"{100 * share:.1f}" for share in shares) + " %"


def warnings(audit: Audit) -> list[str]:
    """What should be mended before a long training, each with what to do."""
    return _defects(audit) + _weaknesses(audit)


def _defects(audit: Audit) -> list[str]:
    """What a correct dataset never has."""
    found = []
    for count, what in (
        (audit.special_masked, "special tokens are predicted"),
        (audit.over_budget, "examples have more predictions than allowed"),
        (audit.copied_pairs, "pairs have the same text twice"),
    ):
        if count:
            found.append(f"{count} {what}; this dataset is defective, build it again")
    _, _, deviation = ngram_law(audit)
    if deviation > 5:
        found.append(f"n-gram lengths are {deviation:.1f} sigma off their law; this dataset is defective")
    if abs(audit.swapped_z) > 5:
        found.append(
            f"swapped pairs are {audit.swapped_z:+.1f} sigma off one half; this dataset is defective"
        )
    return found


def _weaknesses(audit: Audit) -> list[str]:
    """What a user can change in the text or the command."""
    settings, totals = audit.manifest.settings, audit.manifest.totals
    rejected = sum(count for key, count in totals.items() if key.startswith("rejected."))
    repeated = audit.repeated_examples if settings["dupe_factor"] == 1 else 0
    rate = audit.masked / audit.tokens
    is_capped = settings["max_predictions_per_seq"] < 0.8 * settings["masked_lm_prob"] * audit.median_length
    checks = [
        (
            audit.unknown > 0.01 * audit.tokens,
            f"{100 * audit.unknown / audit.tokens:.1f} % of the tokens are unknown; "
            "the tokenizer does not fit this text",
        ),
        (
            audit.median_length < audit.max_seq_length / 2,
            f"half of the examples have at most {audit.median_length} of {audit.max_seq_length} tokens; "
            "short documents: try --pack-short-documents or a smaller --max-seq-length",
        ),
        (
            audit.orders[-100] > 0.2 * audit.examples and settings["pairs"] != "none",
            f"{100 * audit.orders[-100] / audit.examples:.0f} % of the examples have one segment and teach no "
            "sentence order; does every line hold one sentence, with blank lines between documents only?",
        ),
        (
            rate < 0.8 * settings["masked_lm_prob"] and is_capped,
            f"only {100 * rate:.1f} % of the tokens are predicted; --max-predictions-per-seq "
            f"{settings['max_predictions_per_seq']} holds them below {100 * settings['masked_lm_prob']:.0f} %",
        ),
        (
            rate < 0.8 * settings["masked_lm_prob"] and not is_capped,
            f"only {100 * rate:.1f} % of the tokens are predicted; many words are longer than the budget of their "
            "example (no spaces?): try --whole-words none",
        ),
        (
            repeated > 0.01 * audit.examples,
            f"{100 * repeated / max(audit.examples, 1):.1f} % of the examples repeat another one; try --dedup exact",
        ),
        (
            rejected > 0.05 * totals["documents_in"],
            f"{100 * rejected / totals['documents_in']:.0f} % of the documents were rejected; the manifest says why",
        ),
        (
            not totals.get("eval.examples"),
            "the eval split is empty; training cannot measure held-out loss, see --eval-fraction",
        ),
    ]
    return [text for applies, text in checks if applies]
