"""Plain and compressed files as streams of bytes; damage is an error, never a silent end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, Any

import zstandard

from albert.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
DAMAGED = (EOFError, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile, OSError)
"""What reading a damaged file raises; an OSError of the file system has an errno, one of a decompressor has none."""
_BUFFER_BYTES = 1 << 20
_COMPRESSED_BYTES = 1 << 14
"""Compressed bytes that are expanded at once."""


def open_text(path: Path) -> IO[bytes] | gzip.GzipFile:
    """Open a plain or compressed file for reading bytes."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".bz2":
        return bz2.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardFile(path), _BUFFER_BYTES)
    return path.open("rb")


class _ZstandardFile(io.RawIOBase):
    """Frames one after the other. The library's own reader takes a truncated file for a complete one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            if self._frame is not None and self._frame.eof:
                rest, self._frame = self._frame.unused_data, None
            else:
                rest = b""
            data = rest or self._file.read(_COMPRESSED_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def read_head(path: Path, size: int = 1 << 18) -> bytes:
    """The first bytes of a file, decompressed.

    Raises:
        DataError: the file is not what its suffix says.
    """
    try:
        with open_text(path) as file:
            return file.read(size)
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read as {path.suffix or 'text'}: {error}") from error
