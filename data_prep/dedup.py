"""Repeated documents: signatures while reading, and which documents to drop, decided once for the whole corpus.

exact: the same text. near: MinHash (Broder 1997) over shingles of five words or characters, eight bands of eight
hashes, and an estimated Jaccard similarity of at least 0.8 with an earlier document of the same band.
The first of several in the order of the input stays.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albert.masking import example_keys

Signatures = NDArray[np.uint64]

_SHINGLE_WORDS = 5
_NUM_BANDS, _BAND_ROWS = 8, 8
_SIMILAR = 0.8
_UNIT = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]")
"""A word, or one character of a script without spaces."""
_HASHES = example_keys(0x6D696E68617368, np.arange(_NUM_BANDS * _BAND_ROWS)) | np.uint64(1)
"""[64] odd multipliers; the upper bits of the products are the permutations"""


def signature_size(near: bool) -> int:
    """Hashes of one document."""
    return len(_HASHES) if near else 1


def signature(sentences: Sequence[str], text_hash: int, near: bool) -> Signatures:
    """[1] hash of a document's text, or its [64] MinHash values."""
    if not near:
        return np.array([text_hash], np.uint64)
    units = _UNIT.findall(" ".join(sentences).lower())
    if not units:
        return np.full(len(_HASHES), text_hash, np.uint64)
    words = np.array([zlib.crc32(unit.encode("utf-8", "replace")) for unit in units], np.uint64)
    size = min(_SHINGLE_WORDS, len(words))
    shingles = np.zeros(len(words) - size + 1, np.uint64)
    for i in range(size):
        shingles = example_keys(shingles, words[i : len(words) - size + 1 + i])
    shingles = np.unique(shingles)
    return np.array([((shingles * factor) >> np.uint64(16)).min() for factor in _HASHES], np.uint64)


def repeated_documents(signatures: Signatures) -> NDArray[np.bool_]:
    """[documents] True for those that repeat an earlier one; `signatures` is [1 or 64, documents].

    Of a memory-mapped array one row after the other is read, so that memory holds some 60 bytes for each document.
    """
    if len(signatures) == 1:
        return _later_of_group(signatures[0])[0]
    repeated = np.zeros(signatures.shape[1], np.bool_)
    for band in range(_NUM_BANDS):
        rows = signatures[band * _BAND_ROWS : (band + 1) * _BAND_ROWS]
        later, first = _later_of_group(example_keys(*rows))
        at = np.flatnonzero(later)
        equal = np.zeros(len(at), np.int64)
        for row in signatures:
            equal += row[at] == row[first[at]]
        repeated[at] |= equal >= _SIMILAR * len(signatures)
    return repeated


def _later_of_group(keys: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """[n] whether an equal key came before, and [n] index of the first equal key."""
    order = np.argsort(keys, kind="stable")
    new = np.concatenate(([True], keys[order][1:] != keys[order][:-1]))
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first != np.arange(len(keys)), first
