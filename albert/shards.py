"""Shards: WebDataset tar files of blocks, written with canonical bytes and read by offset.

Any WebDataset reader can read a shard; this module reads blocks by offset instead and checks the CRC-32 of every
block before its bytes are used, because tar itself has no checksum for data and stock readers lose truncated
members silently.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from albert.addresses import is_remote
from albert.blocks import TAR_RECORD_BYTES, Block, decode_block, encode_block
from albert.durable_files import write_file_durably
from albert.errors import DataError, MissingInputError
from albert.manifest import BlockEntry, ShardEntry
from albert.shard_cache import CacheOptions, ShardCache

_END_OF_TAR = bytes(2 * TAR_RECORD_BYTES)


def write_shard(directory: Path, name: str, split: str, blocks: Iterable[Block]) -> ShardEntry:
    """Write blocks as one shard, durably and with canonical bytes; returns its manifest entry."""
    entries: list[BlockEntry] = []
    totals = {"offset": 0, "tokens": 0}

    def chunks() -> Iterator[bytes]:
        for index, block in enumerate(blocks):
            data = encode_block(block, f"{Path(name).stem}-{index:06d}")
            entries.append(
                BlockEntry(
                    offset=totals["offset"],
                    length=len(data),
                    examples=block.num_examples,
                    crc32=zlib.crc32(data),
                )
            )
            totals["offset"] += len(data)
            totals["tokens"] += int(block.lengths.sum(dtype=np.int64))
            yield data
        yield _END_OF_TAR

    sha256 = write_file_durably(directory / name, chunks())
    return ShardEntry(
        name=name,
        split=split,
        bytes=totals["offset"] + len(_END_OF_TAR),
        sha256=sha256,
        examples=sum(entry.examples for entry in entries),
        tokens=totals["tokens"],
        blocks=tuple(entries),
    )


class ShardReader:
    """Reads blocks of a dataset's shards by offset, each verified before use. Keeps files open; fork-safe."""

    def __init__(
        self,
        directory: Path | str,
        shards: Sequence[ShardEntry],
        vocab_size: int,
        cache: CacheOptions | None = None,
    ) -> None:
        """Open nothing yet; `shards` are manifest entries, `vocab_size` bounds the ids; `cache` if remote."""
        self.directory = directory
        self.shards = tuple(shards)
        self.vocab_size = vocab_size
        self._files: dict[int, io.FileIO] = {}
        self._cache = ShardCache(str(directory), cache or CacheOptions()) if is_remote(directory) else None

    def read_block(self, shard_index: int, block_index: int) -> Block:
        """Read, verify and decode one block.

        Raises:
            MissingInputError: the shard file is gone.
            DataError: the bytes are not those that the manifest describes; names shard and block.
            DiskError: a remote shard cannot be copied into the cache.
        """
        shard = self.shards[shard_index]
        entry = shard.blocks[block_index]
        file = self.open_shard(shard_index)
        copy = f" (copy {file.name!r})" if self._cache else ""
        where = f"{self.directory}/{shard.name}{copy}: block {block_index}"
        data = os.pread(file.fileno(), entry.length, entry.offset)
        if len(data) != entry.length:
            raise DataError(
                f"{where}: {len(data)} of {entry.length} bytes are there, the shard is truncated; "
                "copy it again or rebuild the dataset"
            )
        if zlib.crc32(data) != entry.crc32:
            raise DataError(f"{where}: checksum mismatch, the shard is damaged; copy it again or rebuild")
        block = decode_block(data, where)
        block.check(where, self.vocab_size)
        return block

    def open_shard(self, shard_index: int) -> io.FileIO:
        """The open file of a shard. Remote shards are held one at a time, so that others can be evicted.

        Raises:
            MissingInputError, DataError, DiskError: as `read_block`.
        """
        if shard_index not in self._files:
            shard = self.shards[shard_index]
            if self._cache:
                self.close()
                self._files[shard_index] = self._cache.open_shard(shard.name, shard.bytes, shard.sha256)
            else:
                self._files[shard_index] = _open_local(Path(self.directory) / shard.name)
        return self._files[shard_index]

    def close(self) -> None:
        """Close all shard files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _open_local(path: Path) -> io.FileIO:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise MissingInputError(f"{path}: shard is missing; the manifest names it") from None


def verify_shard(
    directory: Path | str, shard: ShardEntry, vocab_size: int, cache: CacheOptions | None = None
) -> None:
    """Verify every byte of a shard: size, SHA-256, each block's checksum and columns.

    Raises:
        MissingInputError: the file is gone.
        DataError: names the shard, and the block where one can be blamed.
    """
    path = f"{directory}/{shard.name}"
    reader = ShardReader(directory, [shard], vocab_size, cache)
    try:
        for index in range(len(shard.blocks)):
            reader.read_block(0, index)
        file = reader.open_shard(0)
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            raise DataError(f"{path}: {size} bytes, the manifest says {shard.bytes}; copy the shard again")
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise DataError(
                f"{path}: SHA-256 differs from the manifest outside its blocks; copy the shard again"
            )
    finally:
        reader.close()
