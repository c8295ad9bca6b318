"""The audit as one HTML file with plots, no other files needed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from albert.durable_files import write_file_durably
from albert.tokenization import WORD_BOUNDARY
from data_prep.audit import Audit, ngram_law
from data_prep.audit_report import most_predicted, report_lines, warnings
from data_prep.show import ShownExample

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
pre{background:#f6f6f4;padding:1rem;overflow-x:auto;white-space:pre-wrap}img{max-width:100%}
.warning{background:#fff3d6;padding:.5rem 1rem;border-left:4px solid #d90;margin:.5rem 0}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;vertical-align:top;text-align:left}
.examples td{border-top:1px solid #ddd;width:42%;white-space:pre-wrap}.examples td:last-child{width:16%;font-size:80%}
mark{background:#ffe08a}mark.random{background:#f5b5a8}mark.original{background:#bfe3c0}
.bar{background:#4a7db5;height:.7rem}.bar+.bar{background:#bbb}"""
_PLOT_BUCKETS = 64


def write_html(audit: Audit, path: Path) -> None:
    """Write the report durably."""
    found = warnings(audit)
    notes = "".join(f'<p class="warning">{escape(text)}</p>' for text in found) or "<p>No warnings.</p>"
    lines = [line for line in report_lines(audit) if not line.startswith(("warning:", "no warnings"))]
    settings = [f"{key}: {value}" for key, value in sorted(audit.manifest.settings.items())]
    counts = [f"{key}: {value:,}" for key, value in sorted(audit.manifest.totals.items())]
    page = (
        f'<!doctype html><meta charset="utf-8"><title>{escape(audit.directory)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(audit.directory)}</h1>{notes}{_preformatted(lines)}"
        f'<img alt="plots" src="data:image/png;base64,{base64.b64encode(_plots(audit)).decode()}">'
        f"<h2>Most predicted tokens</h2>{_most_predicted_table(audit)}"
        f"<h2>Examples</h2>{_examples_table(audit)}"
        f"<h2>Counts</h2>{_preformatted(counts)}<h2>Settings</h2>{_preformatted(settings)}"
    )
    write_file_durably(path, [page.encode()])


def _preformatted(lines: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _most_predicted_table(audit: Audit) -> str:
    """Share of the predictions above share of the text, as bars. A plot would need fonts for every script."""
    most = most_predicted(audit, 20)
    scale = 100 / max(max(label, text) for _, label, text in most)
    rows = "".join(
        f"<tr><td>{escape(piece)}</td><td>{100 * label:.2f} %</td><td>{100 * text:.2f} %</td>"
        f'<td style="width:70%"><div class="bar" style="width:{scale * label:.1f}%"></div>'
        f'<div class="bar" style="width:{scale * text:.1f}%"></div></td></tr>'
        for piece, label, text in most
    )
    return f"<table><tr><th>token</th><th>of predictions</th><th>of the text</th><th></th></tr>{rows}</table>"


def _examples_table(audit: Audit) -> str:
    """Original and masked text side by side; predicted tokens are marked by what stands in their place."""
    rows = "".join(
        f'<tr><th colspan="3">{escape(example.title)}</th></tr><tr><td>{_marked(audit, example, example.original)}'
        f"</td><td>{_marked(audit, example, example.masked)}</td><td>{escape(', '.join(example.labels))}</td></tr>"
        for example in audit.samples
    )
    legend = (
        "<p>Predicted: <mark>[MASK]</mark>, <mark class=random>random</mark>, "
        "<mark class=original>unchanged</mark>.</p>"
    )
    head = "<tr><th>original</th><th>masked</th><th>labels</th></tr>"
    return f'{legend}<table class="examples">{head}{rows}</table>'


def _marked(audit: Audit, example: ShownExample, pieces: Sequence[str]) -> str:
    """Pieces as readable text with the predicted ones marked."""
    predicted = set(example.predicted)
    mask = audit.tokenizer.pieces([audit.tokenizer.mask_id])[0]
    out = []
    for position, piece in enumerate(pieces):
        space, text = _readable(audit, piece)
        if position in predicted:
            now = example.masked[position]
            kind = "mask" if now == mask else "original" if now == example.original[position] else "random"
            out.append(f"{space}<mark class={kind}>{escape(text)}</mark>")
        else:
            out.append(space + escape(text))
    return "".join(out).strip()


def _readable(audit: Audit, piece: str) -> tuple[str, str]:
    """The space before a piece, and its text."""
    if audit.tokenizer.kind == "wordpiece":
        return ("", piece[2:]) if piece.startswith("##") and len(piece) > 2 else (" ", piece)
    is_special = piece.startswith("[")
    return " " if is_special or piece.startswith(WORD_BOUNDARY) else "", piece.replace(WORD_BOUNDARY, "")


def _plots(audit: Audit) -> bytes:
    """Lengths, mask rate by position, n-gram lengths, replacements, runs and sentence order as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    (lengths, rate), (ngrams, runs), (replaced, order) = figure.subplots(3, 2)
    _plot_lengths(lengths, audit)
    _plot_rate(rate, audit)
    law, wanted, _ = ngram_law(audit)
    n = np.arange(1, len(law) + 1)
    ngrams.bar(n - 0.2, law, 0.4, label="drawn")
    ngrams.bar(n + 0.2, wanted, 0.4, label="law")
    ngrams.set(title="n-gram lengths", xlabel="words", xticks=n)
    ngrams.legend()
    runs.bar(np.arange(1, len(audit.runs)), audit.runs[1:] / max(audit.runs.sum(), 1))
    runs.set(title="predicted words in a row (neighbouring n-grams join)", xlabel="words")
    kinds = ("mask", "random", "original")
    replaced.bar(kinds, [audit.replaced[kind] / max(audit.masked, 1) for kind in kinds])
    replaced.set(title="what stands at predicted positions", ylim=(0, 1))
    orders = [audit.orders[0], audit.orders[1], audit.examples - audit.orders[0] - audit.orders[1]]
    order.bar(("in order", "swapped", "one segment"), [count / audit.examples for count in orders])
    order.set(title="sentence order", ylim=(0, 1))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _plot_lengths(axes: Any, audit: Audit) -> None:
    edges = np.linspace(0, audit.max_seq_length + 1, min(_PLOT_BUCKETS, audit.max_seq_length) + 1).astype(int)
    counts = np.add.reduceat(audit.lengths, edges[:-1])
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge")
    padding = f"{100 * audit.padding_share:.0f} % padding, if padded"
    axes.set(title=f"length of examples ({padding})", xlabel="tokens", ylabel="examples")


def _plot_rate(axes: Any, audit: Audit) -> None:
    edges = np.linspace(0, audit.max_seq_length, min(_PLOT_BUCKETS, audit.max_seq_length) + 1).astype(int)
    tokens = np.maximum(np.add.reduceat(audit.position_tokens, edges[:-1]), 1)
    for name, values in (("masked", audit.position_masked), ("even spread", audit.position_expected)):
        axes.step(edges[:-1], np.add.reduceat(values, edges[:-1]) / tokens, where="post", label=name)
    axes.set(title="share predicted by position (special tokens left out)", xlabel="position", ylim=(0, None))
    axes.legend()
