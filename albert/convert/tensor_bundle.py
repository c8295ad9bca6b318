"""Reader of TensorFlow checkpoints (tensor bundles) without TensorFlow. Imports no torch.

`PREFIX.index` is a LevelDB table of variable name -> entry (type, shape, place, checksum); the values lie in
`PREFIX.data-NNNNN-of-NNNNN`, raw and little-endian. Formats: `tensorflow/core/protobuf/tensor_bundle.proto`,
`tensorflow/core/lib/io/format.cc`. Every block and every tensor is checked against its CRC-32C.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albert.convert.crc32c import masked_crc32c
from albert.errors import DataError, MissingInputError

_TABLE_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_BLOCK_TRAILER_BYTES = 5
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
"""TensorFlow's DataType -> numpy; bfloat16 (14) is widened to fp32."""
_BFLOAT16 = 14


@dataclass(frozen=True)
class BundleEntry:
    """Where a variable lies."""

    dtype: int
    """TensorFlow's DataType number."""
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    """Bytes."""
    crc32c: int
    """Masked."""
    sliced: bool
    """Whether the variable is stored in slices (partitioned variables)."""


class TensorBundle:
    """A checkpoint by its prefix, such as `model.ckpt-best`."""

    def __init__(self, path: Path | str) -> None:
        """Read the index.

        Args:
            path: the prefix, one of its files, a directory with a `checkpoint` file, or a TF-Hub module.

        Raises:
            MissingInputError: there is no such checkpoint.
            DataError: the index is damaged.
        """
        self.prefix = find_prefix(Path(path))
        index = Path(f"{self.prefix}.index")
        try:
            rows = dict(_read_table(index.read_bytes()))
            header = _fields(rows.pop(""))
            self.num_shards = int(header.get(1, [1])[0])
            self.entries = {name: _entry(value) for name, value in rows.items()}
        except (ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
            raise DataError(
                f"{index}: damaged or no TensorFlow checkpoint index ({error}); copy it again"
            ) from error

    def read(self, name: str) -> NDArray[Any]:
        """Value of a variable, checked.

        Raises:
            MissingInputError: the data file is missing.
            DataError: the file is truncated or damaged, or of a type that no weight has.
        """
        entry = self.entries[name]
        path = Path(f"{self.prefix}.data-{entry.shard:05d}-of-{self.num_shards:05d}")
        if entry.sliced or entry.dtype not in (*_DTYPES, _BFLOAT16):
            kind = "is stored in slices" if entry.sliced else f"has TensorFlow data type {entry.dtype}"
            raise DataError(f"{self.prefix}: variable {name} {kind}, which no ALBERT checkpoint has")
        if not path.is_file():
            raise MissingInputError(f"{path}: missing; a checkpoint is its .index and all its .data files")
        with path.open("rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        if len(data) != entry.size:
            raise DataError(
                f"{path}: truncated, variable {name} needs bytes {entry.offset} to "
                f"{entry.offset + entry.size} and the file has {path.stat().st_size}; copy it again"
            )
        if masked_crc32c(data) != entry.crc32c:
            raise DataError(f"{path}: checksum mismatch in variable {name}; copy the file again")
        if entry.dtype == _BFLOAT16:
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(entry.shape)
        return np.frombuffer(data, _DTYPES[entry.dtype]).reshape(entry.shape)


def find_prefix(path: Path) -> Path:
    """Prefix of the checkpoint that a path means; see `TensorBundle`.

    Raises:
        MissingInputError: there is none, or several to choose from.
    """
    if path.is_dir():
        return _prefix_in_directory(path)
    text = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", str(path))
    if not Path(f"{text}.index").is_file():
        raise MissingInputError(f"{path}: no TensorFlow checkpoint; {text}.index does not exist")
    return Path(text)


def _prefix_in_directory(directory: Path) -> Path:
    pointer = directory / "checkpoint"
    if pointer.is_file():
        match = re.search(
            r'^model_checkpoint_path: "(.+)"', pointer.read_text(encoding="utf-8"), re.MULTILINE
        )
        if match and (directory / f"{Path(match[1]).name}.index").is_file():
            return directory / Path(match[1]).name
    found = sorted((*directory.glob("*.index"), *directory.glob("variables/*.index")))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise MissingInputError(
            f"{directory}: name one checkpoint by its prefix; .index files there: {names}"
        )
    return found[0].with_suffix("")


def _read_table(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Rows of a LevelDB table."""
    if len(data) < _FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != _TABLE_MAGIC:
        raise ValueError("the table has no footer")
    footer = data[-_FOOTER_BYTES:]
    _, _, position = _handle(footer, 0)
    offset, size, _ = _handle(footer, position)
    for _, value in _read_block(data, offset, size):
        block_offset, block_size, _ = _handle(value, 0)
        for key, row in _read_block(data, block_offset, block_size):
            yield key.decode("utf-8"), row


def _read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Rows of one block; keys share prefixes with their predecessors."""
    body = data[offset : offset + size + 1]
    trailer = data[offset + size : offset + size + _BLOCK_TRAILER_BYTES]
    if len(trailer) < _BLOCK_TRAILER_BYTES or trailer[0] != 0:
        raise ValueError("a block is truncated or compressed")
    if masked_crc32c(body) != struct.unpack("<I", trailer[1:])[0]:
        raise ValueError("checksum mismatch")
    num_restarts = struct.unpack("<I", data[offset + size - 4 : offset + size])[0]
    end = size - 4 * (num_restarts + 1)
    position, key = 0, b""
    while position < end:
        shared, position = _varint(body, position)
        unshared, position = _varint(body, position)
        length, position = _varint(body, position)
        key = key[:shared] + body[position : position + unshared]
        position += unshared
        yield key, body[position : position + length]
        position += length


def _handle(data: bytes, position: int) -> tuple[int, int, int]:
    """Offset and size of a block, and the position behind them."""
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return offset, size, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(data: bytes) -> dict[int, list[Any]]:
    """Field number -> values of a protocol buffer message, undecoded."""
    fields: dict[int, list[Any]] = {}
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        value: Any
        if key & 7 == 0:
            value, position = _varint(data, position)
        elif key & 7 == 2:
            length, position = _varint(data, position)
            value, position = data[position : position + length], position + length
        elif key & 7 == 5:
            value, position = struct.unpack("<I", data[position : position + 4])[0], position + 4
        else:
            raise ValueError(f"protocol buffer wire type {key & 7}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _entry(data: bytes) -> BundleEntry:
    """Decode a BundleEntryProto."""
    fields = _fields(data)
    shape = _fields(fields[2][0]) if 2 in fields else {}
    return BundleEntry(
        dtype=fields.get(1, [0])[0],
        shape=tuple(_fields(dimension).get(1, [0])[0] for dimension in shape.get(2, [])),
        shard=fields.get(3, [0])[0],
        offset=fields.get(4, [0])[0],
        size=fields.get(5, [0])[0],
        crc32c=fields.get(6, [0])[0],
        sliced=7 in fields,
    )
