"""Blocks: up to 256 examples as columns, which make one sample of a WebDataset shard.

Ragged values are concatenated, nothing is padded. Bytes are canonical: the same examples give the same sample,
whoever writes it.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albert.errors import DataError

FORMAT_VERSION = 1
MAX_EXAMPLES_PER_BLOCK = 256
NO_SENTENCE_ORDER = -100
"""Sentence-order label of an example that has one segment only; the SOP loss ignores it."""

TAR_RECORD_BYTES = 512


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
        out.write(bytes(-len(data) % TAR_RECORD_BYTES))
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
            header = data[offset : offset + TAR_RECORD_BYTES]
            name = header[:100].split(b"\0", 1)[0].decode("ascii")
            size = int(header[124:135], 8)
            offset += TAR_RECORD_BYTES
            payload = io.BytesIO(data[offset : offset + size])
            columns[name.split(".")[1]] = np.lib.format.read_array(payload, allow_pickle=False)
            offset += size + (-size % TAR_RECORD_BYTES)
        return Block(**columns)
    except (ValueError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not a block of shard format {FORMAT_VERSION}: {error}") from error
