"""Readers: files to batches of documents, streaming, with bounded memory whatever the input is.

A document is a list of sentences. Text files hold documents between blank lines; JSONL holds one per line. What is
dropped is counted by reason, so that documents in = documents out + rejected.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from albert.errors import DataError
from data_prep import cleaning
from data_prep.files import DAMAGED, open_text
from data_prep.settings import BuildSettings

if TYPE_CHECKING:
    from data_prep.plan import Part

BATCH_BYTES = 2 << 20
"""Text read at once. Together with MAX_DOCUMENT_BYTES it bounds the memory of a worker."""
MAX_DOCUMENT_BYTES = 4 << 20
"""A longer document is cut into parts that count as documents of their own."""

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


@dataclass
class DocumentBatch:
    """Documents one after the other."""

    sentences: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])
    """Where each document ends, as an index into `sentences`; starts with 0"""
    input_bytes: int = 0
    """Bytes of text that were read for this batch"""


def detect_format(path: Path, head: bytes, settings: BuildSettings) -> str:
    """Which of lines, prose and jsonl the beginning of a file looks like."""
    if any(suffix in (".jsonl", ".ndjson", ".json") for suffix in path.suffixes):
        return "jsonl"
    text = cleaning.clean_text(head.decode(settings.encoding, errors="ignore"), Counter())
    lines = [line for line in text.split("\n")[:-1] or [text] if line.strip()]
    if not lines:
        return "lines"
    if lines[0].startswith("{") and _json_text(lines[0], settings.text_key) is not None:
        return "jsonl"
    sentences = cleaning.split_sentences("\n".join(lines)).count("\n") + 1
    # One sentence per line stays what it is under sentence splitting; wrapped lines shrink, paragraphs grow.
    return "lines" if 0.8 * len(lines) <= sentences <= 1.25 * len(lines) else "prose"


def read_documents(part: Part, settings: BuildSettings, counts: Counter[str]) -> Iterator[DocumentBatch]:
    """The documents of one part of a file, cleaned and split into sentences.

    Raises:
        DataError: a compressed file is damaged.
    """
    source = part.source
    path = Path(source.path)
    pieces = _jsonl_pieces if source.format == "jsonl" else _text_pieces
    try:
        with open_text(path) as file:
            if not source.is_compressed:
                file.seek(part.start)
            budget = None if source.is_compressed else part.end - part.start
            for data in pieces(_Limited(file, budget), counts):
                yield _parse(data, source.format, settings, counts)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path}: damaged {path.suffix} file: {error}; the text cannot be read to its end"
        ) from error


def reading_advice(counts: Mapping[str, int], settings: BuildSettings) -> str:
    """Which options may be why nothing could be read, to be put behind a message; empty where none is.

    Args:
        counts: of what was read.
        settings: under which.
    """
    found = [
        (counts.get("rejected.no_text_in_json", 0), f"have no text under --text-key {settings.text_key}"),
        (counts.get("rejected.invalid_encoding", 0), f"are not in --encoding {settings.encoding}"),
    ]
    texts = [f"{count} of {counts['documents_in']} documents {what}" for count, what in found if count]
    return f"; {' and '.join(texts)}: give the right one" if texts else ""


class _Limited:
    """Reads at most `budget` bytes of a file; None for all."""

    def __init__(self, file: _Readable, budget: int | None) -> None:
        self._file, self._left = file, budget

    def read(self, size: int = -1, /) -> bytes:
        if self._left is not None:
            size = min(size, self._left)
        data = self._file.read(size)
        if self._left is not None:
            self._left -= len(data)
        return data


def _text_pieces(file: _Readable, counts: Counter[str]) -> Iterator[bytes]:
    """Bytes in pieces that end where a document ends, as long as documents are not too long."""
    held = b""
    while data := file.read(BATCH_BYTES):
        data = held + data
        end = _last_blank_line(data)
        if end == 0 and len(data) >= MAX_DOCUMENT_BYTES:
            end = _cut_point(data)
            counts["long_documents_cut"] += 1
        if end:
            yield data[:end]
        held = data[end:]
    if held:
        yield held


def _last_blank_line(data: bytes) -> int:
    """Offset after the last blank line, 0 if there is none."""
    end = data.rfind(b"\n\n")
    if end >= 0:
        return end + 2
    last = 0
    for match in _BLANK_LINE.finditer(data):
        last = match.end()
    return last


def _cut_point(data: bytes) -> int:
    """Where a document that is too long is cut: after a line, a space, or before a character; never 0."""
    for separator in (b"\n", b" "):
        end = data.rfind(separator, len(data) // 2)
        if end >= 0:
            return end + 1
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1


def _jsonl_pieces(file: _Readable, counts: Counter[str]) -> Iterator[bytes]:
    """Bytes in pieces that end at the end of a line; a line that is too long is rejected."""
    held, skipping = b"", False
    while data := file.read(BATCH_BYTES):
        if skipping:
            newline = data.find(b"\n")
            skipping = newline < 0
            data = b"" if skipping else data[newline + 1 :]
        data = held + data
        end = data.rfind(b"\n") + 1
        if end:
            yield data[:end]
        held = data[end:]
        if len(held) > 2 * MAX_DOCUMENT_BYTES:
            counts["documents_in"] += 1
            counts["rejected.line_too_long"] += 1
            held, skipping = b"", True
    if held:
        yield held


def _parse(data: bytes, text_format: str, settings: BuildSettings, counts: Counter[str]) -> DocumentBatch:
    batch = DocumentBatch(input_bytes=len(data))
    if text_format == "jsonl":
        for line in data.splitlines():
            if line.strip():
                _add_json(batch, line, settings, counts)
        return batch
    try:
        text = data.decode(settings.encoding)
    except UnicodeDecodeError:
        _add_damaged_text(batch, data, text_format, settings, counts)
        return batch
    suspect = settings.encoding != "utf-8" or cleaning.is_suspect(text)
    if suspect:
        text = cleaning.clean_text(text, counts)
    _add_text(batch, text, text_format, suspect, counts)
    return batch


def _add_damaged_text(
    batch: DocumentBatch, data: bytes, text_format: str, settings: BuildSettings, counts: Counter[str]
) -> None:
    """Text that does not decode: look at each document by itself."""
    text = cleaning.clean_text(data.decode(settings.encoding, errors="replace"), counts)
    for document in re.split(r"\n[ \t]*\n", text):
        _add_text(batch, document, text_format, True, counts)


def _add_text(batch: DocumentBatch, text: str, text_format: str, suspect: bool, counts: Counter[str]) -> None:
    """Append the documents of a text, which end at blank lines."""
    if suspect and "\ufffd" in text:
        documents = re.split(r"\n[ \t]*\n", text)
        good = [cleaning.drop_invalid(document, counts) for document in documents]
        bad = good.count(None)
        counts["documents_in"] += bad
        counts["rejected.invalid_encoding"] += bad
        text = "\n\n".join(document for document in good if document is not None)
    if text_format == "prose":
        text = cleaning.split_sentences(text)
    lines = [line.strip() for line in text.split("\n")]
    has_long_line = cleaning.has_long_line(lines)
    sentences, start = batch.sentences, 0
    while start < len(lines):
        try:
            end = lines.index("", start)
        except ValueError:
            end = len(lines)
        if end > start:
            document = lines[start:end]
            sentences += cleaning.cut_long_lines(document, counts) if has_long_line else document
            batch.ends.append(len(sentences))
            counts["documents_in"] += 1
        start = end + 1


def _json_text(line: str | bytes, key: str) -> str | None:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = value.get(key) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None


def _add_json(batch: DocumentBatch, line: bytes, settings: BuildSettings, counts: Counter[str]) -> None:
    """Append the one document of a JSON line; its blank lines are no borders."""
    counts["documents_in"] += 1
    text = _json_text(line, settings.text_key)
    if text is None:
        counts["rejected.no_text_in_json"] += 1
        return
    cleaned = cleaning.drop_invalid(cleaning.clean_text(text, counts), counts)
    if cleaned is None:
        counts["rejected.invalid_encoding"] += 1
        return
    split = cleaning.split_sentences(cleaned).split("\n")
    lines = cleaning.cut_long_lines([s for part in split if (s := part.strip())], counts)
    if not lines:
        counts["rejected.empty"] += 1
        return
    batch.sentences += lines
    batch.ends.append(len(batch.sentences))
