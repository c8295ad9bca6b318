"""Raw JSON rows of the two CLUE tasks whose input is not a sentence or a pair. Imports no torch."""

from __future__ import annotations

from typing import Any


def csl(fields: dict[str, Any]) -> dict[str, Any]:
    """Keywords and abstract as a pair, keywords joined by a space (CLUE baseline)."""
    return {**fields, "sentence1": " ".join(fields["keyword"]), "sentence2": fields["abst"]}


def wsc(fields: dict[str, Any]) -> dict[str, Any]:
    """Mark the noun with underscores and the pronoun with brackets inside the text (CLUE baseline)."""
    target, text = fields["target"], fields["text"]
    spans = [
        (int(target["span1_index"]), target["span1_text"], "_", "_"),
        (int(target["span2_index"]), target["span2_text"], "[", "]"),
    ]
    for start, words, left, right in sorted(spans, reverse=True):
        end = start + len(words)
        text = f"{text[:start]}{left}{text[start:end]}{right}{text[end:]}"
    return {**fields, "text": text}


TRANSFORMS = {"csl": csl, "wsc": wsc}
