"""The audit for a terminal, and what in it should worry somebody."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.audit import Audit, ngram_law, tenths

_MAX_POSITION_DEVIATION = 0.15


def report_lines(audit: Audit) -> list[str]:
    """The report for a terminal."""
    law, wanted, deviation = ngram_law(audit)
    pairs = audit.orders[0] + audit.orders[1]
    most = ", ".join(
        f"{piece} {100 * label:.1f} ({100 * text:.1f})" for piece, label, text in most_predicted(audit)
    )
    shares = {
        kind: 100 * audit.replaced[kind] / max(audit.masked, 1) for kind in ("mask", "random", "original")
    }
    rates = tenths(audit.position_masked) / np.maximum(tenths(audit.position_tokens), 1)
    lines = [
        f"{audit.directory}: looked at {audit.examples:,} examples, {audit.tokens:,} tokens",
        f"  documents           {_documents(audit.manifest.totals)}",
        f"  length              mean {audit.tokens / audit.examples:.0f}, median {audit.median_length}, "
        f"full {100 * audit.lengths[-1] / audit.examples:.0f} %, padding if padded {100 * audit.padding_share:.0f} %",
        f"  lengths, 0 to max   {_bars(tenths(audit.lengths))}",
        f"  predicted           {100 * audit.masked / audit.tokens:.2f} % of tokens; [MASK] {shares['mask']:.1f} %, "
        f"random {shares['random']:.1f} %, unchanged {shares['original']:.1f} %",
        f"  predicted by place  {_percent(rates)} from the first to the last tenth of the positions",
        f"  n-grams drawn       {_percent(law)}, law {_percent(wanted)}, off by {deviation:.1f} sigma; "
        f"{audit.manifest.totals.get('cut_ngrams', 0):,} cut at the end of a budget",
        f"  runs of words       {_percent(audit.runs[1:] / max(audit.runs.sum(), 1))}",
        f"  sentence order      {pairs:,} pairs, {100 * audit.orders[1] / max(pairs, 1):.2f} % swapped "
        f"({audit.swapped_z:+.1f} sigma), {audit.orders[-100]:,} with one segment",
        f"  unknown tokens      {100 * audit.unknown / audit.tokens:.3f} %",
        f"  masked special tokens {audit.special_masked}, over budget {audit.over_budget}, "
        f"copied pairs {audit.copied_pairs}",
        f"  most predicted      {most}; % of predictions (% of the text)",
    ]
    found = warnings(audit)
    return lines + [f"warning: {text}" for text in found] + ([] if found else ["no warnings"])


def most_predicted(audit: Audit, count: int = 12) -> list[tuple[str, float, float]]:
    """The most frequent labels: piece, share of the predictions, share of the text."""
    top = np.argsort(-audit.labels, kind="stable")[:count]
    labels = audit.labels[top] / max(audit.masked, 1)
    text = audit.frequencies[top] / max(int(audit.frequencies.sum()), 1)
    return list(zip(audit.tokenizer.pieces(top.tolist()), labels.tolist(), text.tolist(), strict=True))


def _bars(values: NDArray[Any]) -> str:
    """Values as blocks of eight heights."""
    heights = np.ceil(8 * values / max(values.max(), 1)).astype(int)
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights.tolist())


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
    if audit.position_deviation > _MAX_POSITION_DEVIATION:
        found.append(
            f"predictions are {100 * audit.position_deviation:.0f} % off an even spread over the positions; "
            "this dataset is defective"
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
