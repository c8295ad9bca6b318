"""The audit as one HTML file with plots, no other files needed."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from albert.durable_files import write_file_durably
from data_prep.audit import Audit, ngram_law, report_lines, warnings

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
pre{background:#f6f6f4;padding:1rem;overflow-x:auto;white-space:pre-wrap}img{max-width:100%}
.warning{background:#fff3d6;padding:.5rem 1rem;border-left:4px solid #d90;margin:.5rem 0}"""
_PLOT_BUCKETS = 64


def write_html(audit: Audit, path: Path) -> None:
    """Write the report durably."""
    found = warnings(audit)
    notes = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in found) or "<p>No warnings.</p>"
    lines = [line for line in report_lines(audit) if not line.startswith(("warning:", "no warnings"))]
    settings = "\n".join(f"{key}: {value}" for key, value in sorted(audit.manifest.settings.items()))
    counts = "\n".join(f"{key}: {value:,}" for key, value in sorted(audit.manifest.totals.items()))
    samples = "\n\n".join(audit.samples)
    page = (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(audit.directory)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(audit.directory)}</h1>{notes}<pre>{html.escape(chr(10).join(lines))}</pre>"
        f'<img alt="plots" src="data:image/png;base64,{base64.b64encode(_plots(audit)).decode()}">'
        f"<h2>Examples</h2><pre>{html.escape(samples)}</pre>"
        f"<h2>Counts</h2><pre>{html.escape(counts)}</pre><h2>Settings</h2><pre>{html.escape(settings)}</pre>"
    )
    write_file_durably(path, [page.encode()])


def _plots(audit: Audit) -> bytes:
    """Lengths, mask rate by position, n-gram lengths and replacements as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (lengths, rate), (ngrams, replaced) = figure.subplots(2, 2)
    _plot_lengths(lengths, audit)
    _plot_rate(rate, audit)
    law, wanted, _ = ngram_law(audit)
    n = np.arange(1, len(law) + 1)
    ngrams.bar(n - 0.2, law, 0.4, label="drawn")
    ngrams.bar(n + 0.2, wanted, 0.4, label="law")
    ngrams.set(title="n-gram lengths", xlabel="words", xticks=n)
    ngrams.legend()
    kinds = ("mask", "random", "original")
    replaced.bar(kinds, [audit.replaced[kind] / max(audit.masked, 1) for kind in kinds])
    replaced.set(title="what stands at predicted positions", ylim=(0, 1))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _plot_lengths(axes: Any, audit: Audit) -> None:
    edges = np.linspace(0, audit.max_seq_length + 1, min(_PLOT_BUCKETS, audit.max_seq_length) + 1).astype(int)
    counts = np.add.reduceat(audit.lengths, edges[:-1])
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge")
    axes.set(title="length of examples", xlabel="tokens", ylabel="examples")


def _plot_rate(axes: Any, audit: Audit) -> None:
    edges = np.linspace(0, audit.max_seq_length, min(_PLOT_BUCKETS, audit.max_seq_length) + 1).astype(int)
    masked = np.add.reduceat(audit.position_masked, edges[:-1])
    tokens = np.add.reduceat(audit.position_tokens, edges[:-1])
    axes.step(edges[:-1], masked / np.maximum(tokens, 1), where="post")
    axes.axhline(audit.manifest.settings["masked_lm_prob"], color="grey", linestyle=":")
    axes.set(title="share predicted by position (special tokens left out)", xlabel="position", ylim=(0, None))
