"""THE shard format: WebDataset tar shards of blocks of examples, their index and their manifest.

One sample of a shard is a *block* of up to 256 examples, stored as columns (`KEY.input_ids.npy`, ...). Ragged
values are concatenated, nothing is padded. Any WebDataset reader can read a shard; this module reads blocks by
offset instead and checks the CRC-32 of every block before its bytes are used, because tar itself has no
checksum for data and stock readers lose truncated members silently.

A dataset is a directory, here or at `https://` or `s3://`, with `manifest.json`, `tokenizer/` and shards. Bytes
are canonical: the same examples give the same file, whoever writes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from albert.addresses import check_address, file_address, is_remote
from albert.durable_files import write_file_durably
from albert.errors import DataError, MissingInputError
from albert.remote import Patience, fetch
from albert.shard_cache import CacheOptions, ShardCache

FORMAT_VERSION = 1
MAX_EXAMPLES_PER_BLOCK = 256
MANIFEST_NAME = "manifest.json"
NO_SENTENCE_ORDER = -100
"""Sentence-order label of an example that has one segment only; the SOP loss ignores it."""

_TAR_RECORD_BYTES = 512
_END_OF_TAR = bytes(2 * _TAR_RECORD_BYTES)
_MANIFEST_PATIENCE = Patience(deadline_s=60.0)
"""Shorter than for shards: a mistyped address shows here."""


@dataclass(frozen=True)
class Block:
    """Examples as columns; every array is one-dimensional.

    `tokens` is the sum of `lengths`, `preds` the sum of `num_masked`.
    """

    input_ids: NDArray[np.uint16 | np.uint32]
    """[tokens] ids after masking, `[CLS] A [SEP] B [SEP]` (or `[CLS] A [SEP]`), examples concatenated."""
    lengths: NDArray[np.uint16]
    """[examples] number of tokens, special tokens included."""
    segment_a_lengths: NDArray[np.uint16]
    """[examples] number of tokens with token type 0: `[CLS] A [SEP]`."""
    masked_lm_positions: NDArray[np.uint16]
    """[preds] positions inside their example, ascending."""
    masked_lm_labels: NDArray[np.uint16 | np.uint32]
    """[preds] the original ids at those positions."""
    num_masked: NDArray[np.uint16]
    """[examples] number of predicted positions."""
    sentence_order_labels: NDArray[np.int8]
    """[examples] 0 in order, 1 swapped, `NO_SENTENCE_ORDER` for one segment."""
    word_starts: NDArray[np.uint8]
    """[ceil(tokens / 8)] one bit per token (numpy.packbits, big endian): 1 where a word begins.

    Special tokens have bit 0 and belong to no word: the first token of a segment always has bit 1.
    """

    @property
    def num_examples(self) -> int:
        """Examples in the block."""
        return len(self.lengths)

    def word_start_bits(self) -> NDArray[np.uint8]:
        """Unpacked word starts, [tokens] of 0 and 1."""
        return np.unpackbits(self.word_starts, count=int(self.lengths.sum(dtype=np.int64)))

    def original_ids(self) -> NDArray[np.uint16 | np.uint32]:
        """Undo the masking: [tokens] ids of the original text."""
        starts = np.concatenate(([0], np.cumsum(self.lengths[:-1], dtype=np.int64)))
        flat = np.repeat(starts, self.num_masked) + self.masked_lm_positions
        ids = self.input_ids.copy()
        ids[flat] = self.masked_lm_labels
        return ids

    def check(self, where: str, vocab_size: int) -> None:
        """Check that the columns agree with each other and that ids are inside the vocabulary.

        Raises:
            DataError: names `where` and the first disagreement.
        """
        tokens, preds = (
            int(self.lengths.sum(dtype=np.int64)),
            int(self.num_masked.sum(dtype=np.int64)),
        )
        n = self.num_examples
        sizes = {
            "input_ids": (self.input_ids, tokens),
            "segment_a_lengths": (self.segment_a_lengths, n),
            "masked_lm_positions": (self.masked_lm_positions, preds),
            "masked_lm_labels": (self.masked_lm_labels, preds),
            "num_masked": (self.num_masked, n),
            "sentence_order_labels": (self.sentence_order_labels, n),
            "word_starts": (self.word_starts, (tokens + 7) // 8),
        }
        for name, (column, expected) in sizes.items():
            if column.shape != (expected,):
                raise DataError(f"{where}: column {name} has shape {column.shape}, expected ({expected},)")
        for name in ("input_ids", "masked_lm_labels"):
            column = getattr(self, name)
            if column.size and int(column.max()) >= vocab_size:
                raise DataError(
                    f"{where}: {name} holds id {int(column.max())}, the vocabulary has {vocab_size} "
                    "entries; the shards were made with another tokenizer"
                )
        if (self.segment_a_lengths > self.lengths).any():
            raise DataError(f"{where}: segment A is longer than its example")
        if (self.masked_lm_positions >= np.repeat(self.lengths, self.num_masked)).any():
            raise DataError(f"{where}: a masked position lies outside its example")


COLUMNS = tuple(field.name for field in fields(Block))


def ids_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds all ids of a vocabulary: uint16 up to 65,536."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_block(block: Block, key: str) -> bytes:
    """One block as consecutive tar members `KEY.COLUMN.npy` with canonical headers."""
    out = io.BytesIO()
    for name in COLUMNS:
        payload = io.BytesIO()
        np.lib.format.write_array(payload, getattr(block, name), version=(1, 0), allow_pickle=False)
        data = payload.getvalue()
        info = tarfile.TarInfo(f"{key}.{name}.npy")
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        out.write(info.tobuf(tarfile.USTAR_FORMAT))
        out.write(data)
        out.write(bytes(-len(data) % _TAR_RECORD_BYTES))
    return out.getvalue()


def decode_block(data: bytes, where: str) -> Block:
    """Read back what `encode_block` made; `data` must have been verified already.

    Raises:
        DataError: the bytes are not a block of this format.
    """
    columns: dict[str, Any] = {}
    offset = 0
    try:
        while offset < len(data):
            header = data[offset : offset + _TAR_RECORD_BYTES]
            name = header[:100].split(b"\0", 1)[0].decode("ascii")
            size = int(header[124:135], 8)
            offset += _TAR_RECORD_BYTES
            payload = io.BytesIO(data[offset : offset + size])
            columns[name.split(".")[1]] = np.lib.format.read_array(payload, allow_pickle=False)
            offset += size + (-size % _TAR_RECORD_BYTES)
        return Block(**columns)
    except (ValueError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not a block of shard format {FORMAT_VERSION}: {error}") from error


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerEntry(_Model):
    """Which tokenizer made the ids; a copy lies in the dataset."""

    kind: str
    file: str
    sha256: str
    vocab_size: int


class BlockEntry(_Model):
    """Where one block lies in its shard."""

    offset: int
    length: int
    examples: int
    crc32: int


class ShardEntry(_Model):
    """One shard file: how to verify it, and its blocks."""

    name: str
    split: str
    bytes: int
    sha256: str
    examples: int
    tokens: int
    blocks: tuple[BlockEntry, ...]


class Manifest(_Model):
    """What a dataset holds and how it was made."""

    format_version: int
    tokenizer: TokenizerEntry
    settings: dict[str, Any]
    totals: dict[str, Any]
    shards: tuple[ShardEntry, ...]

    def split(self, name: str) -> tuple[ShardEntry, ...]:
        """Shards of one split, `train` or `eval`."""
        return tuple(shard for shard in self.shards if shard.split == name)

    @property
    def max_seq_length(self) -> int:
        """Longest example that the dataset can hold, in tokens."""
        return int(self.settings["max_seq_length"])

    @property
    def sha256(self) -> str:
        """Identity of the dataset: the hash of its canonical manifest."""
        return hashlib.sha256(manifest_bytes(self)).hexdigest()


def manifest_bytes(manifest: Manifest) -> bytes:
    """Canonical JSON; blocks are rows `[offset, length, examples, crc32]`, one shard per line."""
    head = manifest.model_dump(exclude={"shards"})
    lines = []
    for shard in manifest.shards:
        entry = shard.model_dump(exclude={"blocks"})
        entry["blocks"] = [[b.offset, b.length, b.examples, b.crc32] for b in shard.blocks]
        lines.append(json.dumps(entry, sort_keys=True, ensure_ascii=False))
    text = json.dumps(head, sort_keys=True, ensure_ascii=False, indent=1)
    return (text[:-2] + ',\n "shards": [\n' + ",\n".join(lines) + "\n ]\n}\n").encode()


def read_manifest(directory: Path | str) -> Manifest:
    """Read and check `manifest.json` of a dataset, a local directory or an address.

    Raises:
        MissingInputError: there is no manifest (not a dataset, or its build did not finish).
        DataError: the manifest is damaged or of another format version, or cannot be fetched.
        UnsafeError, ConfigError: see `albert.addresses.check_address`.
    """
    path = f"{directory}/{MANIFEST_NAME}"
    content = (
        _fetch_manifest(str(directory)) if is_remote(directory) else _read_local_manifest(Path(directory))
    )
    try:
        raw = json.loads(content)
        if raw["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path}: shard format {raw['format_version']}, this program reads {FORMAT_VERSION}; "
                "build the dataset again"
            )
        for shard in raw["shards"]:
            shard["blocks"] = [dict(zip(BlockEntry.model_fields, b, strict=True)) for b in shard["blocks"]]
        return Manifest.model_validate(raw)
    except (
        KeyError,
        TypeError,
        ValidationError,
        json.JSONDecodeError,
        UnicodeDecodeError,
    ) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: damaged manifest ({reason}); build the dataset again") from error


def _read_local_manifest(directory: Path) -> bytes:
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise MissingInputError(
            f"{directory}: no {MANIFEST_NAME}; this is not a finished dataset, "
            "run `python -m data_prep build --output` on it"
        )
    return path.read_bytes()


def _fetch_manifest(address: str) -> bytes:
    """Complete copies only: JSON that ends early is no JSON."""
    check_address(address)
    content = io.BytesIO()
    fetch(file_address(address, MANIFEST_NAME), content, None, _is_json, _MANIFEST_PATIENCE)
    return content.getvalue()


def _is_json(file: BinaryIO) -> bool:
    file.seek(0)
    try:
        json.load(file)
    except ValueError:
        return False
    return True


def dataset_tokenizer(directory: Path | str, manifest: Manifest, cache: CacheOptions | None = None) -> Path:
    """The dataset's own tokenizer file; of a remote dataset, a verified copy in the cache.

    Raises:
        MissingInputError, DataError, DiskError: a remote one cannot be copied.
    """
    entry = manifest.tokenizer
    if is_remote(directory):
        return ShardCache(str(directory), cache or CacheOptions()).tokenizer(entry.file, entry.sha256)
    return Path(directory) / entry.file


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest durably; its presence says that the dataset is complete."""
    write_file_durably(directory / MANIFEST_NAME, [manifest_bytes(manifest)])


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
