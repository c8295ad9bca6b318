"""Text hygiene: line ends, control characters, over-long lines, sentence splitting. Every change is counted.

The common case, clean text, must cost next to nothing beside the tokenizer: it is tested with `translate` or a table,
which run at memory speed, and only dirty text takes the slow path.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

MAX_LINE_CHARACTERS = 20_000
"""Longer lines are cut at a space, or anywhere where there is none."""
MAX_INVALID_SHARE = 0.01
"""A document with more undecodable characters than this is rejected."""

_CONTROL_BYTES = bytes([*range(9), *range(11, 32), 127])
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# Controls, zero-width and direction marks, byte order marks, replacement and non-characters, lone surrogates.
# Zero-width joiners (U+200C, U+200D) stay: Persian, Indic scripts and emoji need them.
_REMOVED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufffc\ufffe\uffff\ud800-\udfff]+"
)
_INVALID = "\ufffd"
_SUSPECT_UNITS = np.zeros(1 << 16, np.bool_)
"""[UTF-16 code units] what cleaning looks for; characters of two units are never that"""
for _code in (*range(0x2100), *range(0xFE00, 0x10000)):
    _SUSPECT_UNITS[_code] = bool(_LINE_ENDS.match(chr(_code)) or _REMOVED.match(chr(_code)))
_SUSPECT_UNITS[ord(_INVALID)] = True

# A sentence ends at . ! ? with closing quotes, before a space and something that can begin a sentence; or at a
# Chinese full stop with its closing quotes. Common abbreviations and initials do not end one. The patterns begin with
# the characters that are looked for, since only then the search for them is fast.
_SENTENCE_END = re.compile(
    r"([.!?](?=[ \t\"'”’)\]])(?<!\b[A-Z].)(?<!\b(?:Mr|Ms|Dr|St|Jr|vs|cf|No|pp).)"
    r"(?<!\b(?:Mrs|etc|Fig|Vol|e\.g|i\.e|Gen|Col|Sen|Rep).)"
    r"[\"'”’)\]]*)[ \t]+(?=[\"'“‘(\[]*[A-Z0-9])"
)
_CHINESE_SENTENCE_END = re.compile(r"([。！？]+[…”’」』）〉》]*)[ \t\u3000]*(?=[^\s…”’」』）〉》])")
# A line that stops in the middle of a sentence goes on with a lower-case letter.
_GOES_ON = re.compile(r"\n[ \t]*[a-z]")
_WRAPPED = re.compile(r"\n(?<=[a-z,;–-]\n)(?=[a-z])")


def is_suspect(text: str) -> bool:
    """Whether text that was UTF-8 may hold anything that `clean_text` would change; False is certain."""
    if text.isascii():
        data = text.encode()
        return len(data.translate(None, _CONTROL_BYTES)) != len(data)
    units = np.frombuffer(text.encode("utf-16-le"), np.uint16)
    return bool(_SUSPECT_UNITS[units].any())


def clean_text(text: str, counts: Counter[str]) -> str:
    """Text with a line feed as its only line end and without control characters; counts what it changed."""
    text, line_ends = _LINE_ENDS.subn("\n", text)
    text, removed = _REMOVED.subn("", text)
    counts["line_ends_normalised"] += line_ends
    counts["control_characters_removed"] += removed
    return text


def drop_invalid(text: str, counts: Counter[str]) -> str | None:
    """Text without replacement characters, or None where they are too many to trust the rest."""
    invalid = text.count(_INVALID)
    if not invalid:
        return text
    if invalid > MAX_INVALID_SHARE * len(text):
        return None
    counts["invalid_characters_removed"] += invalid
    return text.replace(_INVALID, "")


def split_sentences(text: str) -> str:
    """Prose with a line break after every sentence; joins lines that break a sentence."""
    if _GOES_ON.search(text):
        text = "\n".join(line.strip(" \t") for line in text.split("\n"))
        text = _WRAPPED.sub(" ", text)
    text = _break_lines(_SENTENCE_END, text)
    return _break_lines(_CHINESE_SENTENCE_END, text) if any(stop in text for stop in "。！？") else text


def _break_lines(end: re.Pattern[str], text: str) -> str:
    """Replace the space after each end of a sentence; like `end.sub`, but twice as fast."""
    parts = end.split(text)
    parts[1::2] = [stop + "\n" for stop in parts[1::2]]
    return "".join(parts)


def has_long_line(lines: list[str]) -> bool:
    """Whether there is anything to cut."""
    return max(map(len, lines), default=0) > MAX_LINE_CHARACTERS


def cut_long_lines(lines: list[str], counts: Counter[str]) -> list[str]:
    """Lines of at most MAX_LINE_CHARACTERS characters, cut at a space where there is one."""
    if not has_long_line(lines):
        return lines
    out: list[str] = []
    for line in lines:
        start = 0
        while len(line) - start > MAX_LINE_CHARACTERS:
            space = line.rfind(" ", start + MAX_LINE_CHARACTERS // 2, start + MAX_LINE_CHARACTERS)
            end = space if space > 0 else start + MAX_LINE_CHARACTERS
            out.append(line[start:end])
            start = end
            counts["long_lines_cut"] += 1
        out.append(line[start:])
    return [stripped for line in out if (stripped := line.strip())]
