"""Chinese words: where they begin among the tokens of a sentence, by jieba's segmentation.

The words are found in the text that the tokens spell, so that labels always match the inputs; there is no limit on
their length (brightmart's code matches at most three characters, anywhere in the sentence).
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albert.errors import ConfigError
from albert.tokenization import WORD_BOUNDARY, Tokenizer

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_UNKNOWN = "\ufffd"


def load_segmenter() -> Callable[[str], Iterator[str]]:
    """The `cut` function of jieba, made quiet.

    Raises:
        ConfigError: jieba is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba's own regular expressions and pkg_resources
            import jieba
    except ImportError:
        raise ConfigError("--whole-words jieba: jieba is not installed; pip install jieba") from None
    jieba.setLogLevel(logging.WARNING)
    return jieba.cut


class WordFinder:
    """Word starts of tokenised sentences."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Prepare the surface of every piece."""
        self._cut = load_segmenter()
        self._table = tokenizer.word_start_table()
        self._surfaces: list[str] = []
        for piece in tokenizer.pieces(range(tokenizer.vocab_size)):
            self._surfaces.append(piece.removeprefix("##").replace(WORD_BOUNDARY, " "))
        self._surfaces[tokenizer.unk_id] = _UNKNOWN
        self._is_han = np.array([bool(_HAN.match(surface.strip())) for surface in self._surfaces])

    def word_starts(self, ids: NDArray[Any], lengths: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[tokens] for sentences end to end: Chinese words by jieba, everything else by its pieces."""
        starts = self._table[ids]
        begin = 0
        for length in lengths.tolist():
            sentence = ids[begin : begin + length]
            han = self._is_han[sentence]
            if han.any():
                starts[begin : begin + length][han] = self._in_sentence(sentence.tolist())[han]
            begin += length
        return starts

    def _in_sentence(self, ids: list[int]) -> NDArray[np.bool_]:
        surfaces = [self._surfaces[i] for i in ids]
        if not any(surface.startswith(" ") for surface in surfaces):
            # WordPiece keeps no spaces; put one between words that are not Chinese.
            surfaces = [
                surface if self._is_han[i] or not self._table[i] else " " + surface
                for i, surface in zip(ids, surfaces, strict=True)
            ]
        words = np.cumsum([0, *(len(word) for word in self._cut("".join(surfaces)))])
        ends = np.cumsum([len(surface) for surface in surfaces])
        first = ends - [len(surface.lstrip()) or 1 for surface in surfaces]
        return np.isin(first, words)
