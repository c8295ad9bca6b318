"""What there is to do: input files cut into tasks.

A task is a byte range of one plain file, aligned to the end of a document, or one compressed file, or several small
files together. Tasks depend on the files and the settings only, never on the number of workers: each yields its own
shards, so that the bytes of a dataset do not depend on who made which part of it.
"""

from __future__ import annotations

import codecs
import fnmatch
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from albert.errors import ConfigError, DataError, MissingInputError
from data_prep.corpus import detect_format
from data_prep.files import COMPRESSED_SUFFIXES, read_head
from data_prep.settings import BuildSettings

MAX_TASK_BYTES = 64 << 20
MIN_TASK_BYTES = 1 << 20
_TASKS_WANTED = 16
_SEARCH_BYTES = 4 << 20
"""How far a task border looks for the end of a document before it takes the end of a line."""
_BLANK_LINE = re.compile(rb"\r?\n[ \t\r]*\n")
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NUL_SHARE, _FEW_NULS = 0.002, 8
"""Stray NUL bytes are removed as other controls are; Chinese prose in UTF-16 has five times as many as this share."""


@dataclass(frozen=True)
class Source:
    """An input file, how it is read, and how often."""

    path: str
    format: str
    bytes: int
    weight: float = 1.0

    @property
    def is_compressed(self) -> bool:
        """Whether only the whole file can be read."""
        return Path(self.path).suffix in COMPRESSED_SUFFIXES


@dataclass(frozen=True)
class Part:
    """A byte range of a file; a compressed file has one part, from 0 to its size."""

    source: Source
    start: int
    end: int


@dataclass(frozen=True)
class Task:
    """A unit of data preparation."""

    index: int
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Input bytes, as they lie on disk."""
        return sum(part.end - part.start for part in self.parts)


def find_sources(
    inputs: Sequence[str], weights: Sequence[str], settings: BuildSettings
) -> tuple[Source, ...]:
    """Check the input files, find out the format of each, and attach the weights `PATTERN=WEIGHT`.

    Raises:
        MissingInputError: a file does not exist or is not a file.
        ConfigError: a weight cannot be read or matches no file.
        DataError: a file is UTF-16 or binary, which cannot be cut into byte ranges.
    """
    rules = [_parse_weight(text) for text in weights]
    sources = []
    for name in inputs:
        path = Path(name)
        if not path.is_file():
            what = "is a directory; name its files" if path.is_dir() else "no such file"
            raise MissingInputError(f"--input {name}: {what}")
        head = read_head(path)
        _refuse_utf16(name, head)
        weight = next((w for pattern, w in rules if fnmatch.fnmatch(name, pattern)), 1.0)
        kind = settings.format if settings.format != "auto" else detect_format(path, head, settings)
        sources.append(Source(name, kind, path.stat().st_size, weight))
    for pattern, _ in rules:
        if not fnmatch.filter(inputs, pattern):
            raise ConfigError(f"--weight {pattern}: matches none of the input files {', '.join(inputs)}")
    return tuple(sources)


def _refuse_utf16(name: str, head: bytes) -> None:
    """Refuse a file that cannot be cut between bytes.

    Raises:
        DataError: it begins with the mark of UTF-16, or holds too many NUL bytes to be other text.
    """
    if head.startswith(_UTF16_MARKS):
        what, kind = "UTF-16", "UTF-16"
    elif head.count(0) >= max(_FEW_NULS, _NUL_SHARE * len(head)) and not _separates_with_nuls(head):
        # Only in the right order of bytes do many line ends and spaces come out.
        orders = ("UTF-16LE", "UTF-16BE")
        kind = max(orders, key=lambda order: sum(map(head.decode(order, errors="ignore").count, "\n ")))
        what = "UTF-16 or no text (it holds many NUL bytes)"
    else:
        return
    raise DataError(f"{name}: is {what}; convert it first: iconv -f {kind} -t UTF-8 {shlex.quote(name)}")


def _separates_with_nuls(head: bytes) -> bool:
    """Whether it is UTF-8 with NUL bytes anywhere; UTF-16 that is valid UTF-8 has them at odd or at even places."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return max(head[::2].count(0), head[1::2].count(0)) < 0.9 * head.count(0)


def _parse_weight(text: str) -> tuple[str, float]:
    pattern, separator, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not separator or not 0 <= weight <= 1000:
        raise ConfigError(f"--weight '{text}' is not of the form PATTERN=WEIGHT with a weight from 0 to 1000")
    return pattern, weight


def plan_tasks(sources: Sequence[Source], settings: BuildSettings) -> tuple[Task, ...]:
    """Cut the inputs into tasks of roughly equal work, in input order."""
    total = sum(source.bytes for source in sources)
    size = min(max(total // _TASKS_WANTED, MIN_TASK_BYTES), MAX_TASK_BYTES)
    size = max(size // settings.dupe_factor, MIN_TASK_BYTES)
    tasks: list[Task] = []
    pending: list[Part] = []
    for source in sources:
        for part in _cut_source(source, size):
            if pending and sum(p.end - p.start for p in pending) + part.end - part.start > size:
                tasks.append(Task(len(tasks), tuple(pending)))
                pending = []
            pending.append(part)
    if pending:
        tasks.append(Task(len(tasks), tuple(pending)))
    return tuple(tasks)


def _cut_source(source: Source, size: int) -> list[Part]:
    """Parts of about `size` bytes, each ending where a document ends if one ends nearby."""
    if source.weight == 0 or source.bytes == 0:
        return []
    if source.is_compressed or source.bytes <= size:
        return [Part(source, 0, source.bytes)]
    parts, start = [], 0
    with Path(source.path).open("rb") as file:
        while source.bytes - start > size + size // 4:
            file.seek(start + size)
            end = start + size + _border(file.read(_SEARCH_BYTES), source.format)
            parts.append(Part(source, start, min(end, source.bytes)))
            start = end
            if start >= source.bytes:
                return parts
    parts.append(Part(source, start, source.bytes))
    return parts


def _border(data: bytes, text_format: str) -> int:
    """Bytes from the start of `data` to the first end of a document, else of a line, else of a character."""
    if text_format != "jsonl" and (match := _BLANK_LINE.search(data)):
        return match.end()
    newline = data.find(b"\n")
    if newline >= 0:
        return newline + 1
    # No line end in sight: a border between two ASCII characters or before a UTF-8 lead byte.
    return next((i for i, byte in enumerate(data[:8]) if byte & 0xC0 != 0x80), 0)
