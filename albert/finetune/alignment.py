"""Which characters of a text each of its tokens stands for. Imports no torch.

Tokenizers normalise (NFKD, lower case, no accents) and merge, and an unknown piece does not say what it was.
The text is normalised character by character with its origin kept, and the pieces are found in it one after
the other; what lies between two found pieces belongs to the unknown piece between them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SEARCH_CHARACTERS = 64
"""A piece that does not follow at once is looked for this far ahead, so that one surprise stays local."""


def align(text: str, pieces: Sequence[str]) -> NDArray[np.int64]:
    """Character range of every piece.

    Args:
        text: the text that was encoded.
        pieces: what it was encoded to, with the marks of SentencePiece or WordPiece.

    Returns:
        [pieces, 2] first character and character after the last, ascending; a piece that stands for nothing
        visible has an empty range.
    """
    characters, origins = _normalise(text)
    ends = _ends(text, origins)
    spans = np.zeros((len(pieces), 2), dtype=np.int64)
    cursor = 0
    unknown: list[int] = []
    for index, piece in enumerate(pieces):
        surface = _surface(piece)
        found = (
            characters.find(surface, cursor, cursor + len(surface) + _SEARCH_CHARACTERS) if surface else -1
        )
        if found < 0:
            unknown.append(index)
            continue
        _fill(spans, unknown, cursor, found, origins, ends)
        cursor = found + len(surface)
        spans[index] = origins[found], ends[cursor - 1]
        unknown = []
    _fill(spans, unknown, cursor, len(characters), origins, ends)
    return spans


def _normalise(text: str) -> tuple[str, list[int]]:
    """Normalised visible characters, and the position in `text` that each comes from."""
    characters: list[str] = []
    origins: list[int] = []
    for position, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character).lower():
            if not part.isspace() and not unicodedata.combining(part):
                characters.append(part)
                origins.append(position)
    return "".join(characters), origins


def _ends(text: str, origins: list[int]) -> list[int]:
    """Where each character ends: accents that normalisation drops belong to the character before them."""
    ends = []
    for origin in origins:
        end = origin + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        ends.append(end)
    return ends


def _surface(piece: str) -> str:
    """The characters that a piece shows, normalised; empty for an unknown one."""
    if piece in {"[UNK]", "<unk>"}:
        return ""
    return _normalise(piece.removeprefix("##").replace("▁", ""))[0]


def _fill(
    spans: NDArray[np.int64], unknown: list[int], start: int, end: int, origins: list[int], ends: list[int]
) -> None:
    """Give the characters `start` to `end` to unknown pieces: one each, the rest to the last."""
    for offset, index in enumerate(unknown):
        first = min(start + offset, end)
        last = end if offset == len(unknown) - 1 else min(first + 1, end)
        if first < last:
            spans[index] = origins[first], ends[last - 1]
        elif first > 0:
            spans[index] = ends[first - 1], ends[first - 1]
