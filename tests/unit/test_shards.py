"""The shard format: canonical bytes, readable by anybody, and no damage goes unnoticed."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from albert.blocks import COLUMNS, Block, decode_block, encode_block, ids_dtype
from albert.errors import DataError, MissingInputError
from albert.manifest import (
    FORMAT_VERSION,
    Manifest,
    TokenizerEntry,
    manifest_bytes,
    read_manifest,
    write_manifest,
)
from albert.shards import ShardReader, verify_shard, write_file_durably, write_shard
from tests.synthetic import VOCAB_SIZE, make_block


def make_blocks(count: int = 5, examples: int = 20) -> list[Block]:
    rng = np.random.default_rng(3)
    return [make_block(rng, examples) for _ in range(count)]


def assert_equal(one: Block, other: Block) -> None:
    for name in COLUMNS:
        ours, theirs = getattr(one, name), getattr(other, name)
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path, "train-00000.tar", "train", make_blocks())


def make_manifest(shard) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=TokenizerEntry(
            kind="wordpiece", file="tokenizer/vocab.txt", sha256="0", vocab_size=VOCAB_SIZE
        ),
        settings={"max_seq_length": 24, "encoding": "utf-8", "note": "天"},
        totals={"documents_in": 3},
        shards=(shard,),
    )


def test_blocks_come_back_as_they_were_written(tmp_path, shard):
    reader = ShardReader(tmp_path, [shard], VOCAB_SIZE)
    for index, block in enumerate(make_blocks()):
        assert_equal(reader.read_block(0, index), block)
    reader.close()
    assert (shard.examples, len(shard.blocks)) == (100, 5)
    assert shard.tokens == sum(len(block.input_ids) for block in make_blocks())


def test_bytes_are_canonical(tmp_path, shard):
    again = write_shard(tmp_path / "", "copy.tar", "train", make_blocks())
    assert again.bytes == shard.bytes == (tmp_path / "train-00000.tar").stat().st_size
    one, two = ((tmp_path / name).read_bytes() for name in ("train-00000.tar", "copy.tar"))
    assert one.replace(b"train-00000-", b"") != one
    assert hashlib.sha256(one).hexdigest() == shard.sha256
    assert len(one) == len(two)
    with tarfile.open(fileobj=io.BytesIO(one)) as archive:
        member = archive.getmembers()[0]
    assert (member.name, member.mtime, member.uid, member.mode) == (
        "train-00000-000000.input_ids.npy",
        0,
        0,
        0o644,
    )


def test_encoding_is_pinned():
    """A change of these bytes is a change of the format: raise FORMAT_VERSION."""
    block = Block(
        np.array([2, 4, 9, 3], np.uint16),
        np.array([4], np.uint16),
        np.array([4], np.uint16),
        np.array([1], np.uint16),
        np.array([8], np.uint16),
        np.array([1], np.uint16),
        np.array([-100], np.int8),
        np.packbits(np.array([0, 1, 1, 0], np.uint8)),
    )
    data = encode_block(block, "train-00000-000000")
    assert len(data) == 8 * (512 + 512)
    assert block.original_ids().tolist() == [2, 8, 9, 3]
    assert block.word_start_bits().tolist() == [0, 1, 1, 0]
    assert hashlib.sha256(data).hexdigest().startswith(PINNED)
    assert_equal(decode_block(data, "here"), block)


PINNED = "9a95aad8fff43246"


def test_stock_webdataset_reads_shards(tmp_path, shard):
    import webdataset

    dataset = webdataset.WebDataset(str(tmp_path / shard.name), shardshuffle=False).decode()
    for sample, block in zip(dataset, make_blocks(), strict=True):
        for name in COLUMNS:
            np.testing.assert_array_equal(sample[f"{name}.npy"], getattr(block, name))


def test_manifest_comes_back_and_is_canonical(tmp_path, shard):
    manifest = make_manifest(shard)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest_bytes(read_manifest(tmp_path)) == (tmp_path / "manifest.json").read_bytes()
    assert manifest.max_seq_length == 24
    assert [s.name for s in manifest.split("train")] == ["train-00000.tar"]
    assert manifest.split("eval") == ()
    json.loads((tmp_path / "manifest.json").read_text())


def damage_is_named(directory: Path, shard, data: bytes) -> None:
    """A damaged shard is refused by `verify_shard`, and by the reader unless the damage lies outside its blocks."""
    path = directory / shard.name
    path.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(shard.name)):
        verify_shard(directory, shard, VOCAB_SIZE)


def test_every_truncation_is_named_with_its_block(tmp_path, shard, request):
    """At each byte around every border of a block and of the file, and at 400 others; 4,000 with --slow."""
    number = 4000 if request.config.getoption("--slow") else 400
    whole = (tmp_path / shard.name).read_bytes()
    borders = [offset for block in shard.blocks for offset in (block.offset, block.offset + block.length)]
    lengths = {b + d for b in [*borders, len(whole)] for d in (-513, -512, -1, 0, 1, 511)}
    lengths |= set(np.random.default_rng(0).integers(0, len(whole), number).tolist())
    for length in sorted(n for n in lengths if 0 <= n < len(whole)):
        damage_is_named(tmp_path, shard, whole[:length])
        first = next((i for i, b in enumerate(shard.blocks) if b.offset + b.length > length), None)
        if first is not None:
            reader = ShardReader(tmp_path, [shard], VOCAB_SIZE)
            with pytest.raises(DataError, match=rf"block {first}: \d+ of \d+ bytes are there"):
                reader.read_block(0, first)
            reader.close()


def test_every_bit_flip_is_named_with_its_block(tmp_path, shard, request):
    """1,200 single bits, anywhere in the file; 8,000 with --slow."""
    number = 8000 if request.config.getoption("--slow") else 1200
    whole = (tmp_path / shard.name).read_bytes()
    for bit in np.random.default_rng(1).integers(0, 8 * len(whole), number).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << (bit % 8)
        damage_is_named(tmp_path, shard, bytes(data))
        hit = [i for i, b in enumerate(shard.blocks) if b.offset <= bit // 8 < b.offset + b.length]
        for index in hit:
            reader = ShardReader(tmp_path, [shard], VOCAB_SIZE)
            with pytest.raises(DataError, match=f"block {index}: checksum mismatch"):
                reader.read_block(0, index)
            reader.close()


def test_a_longer_file_and_a_missing_file_are_named(tmp_path, shard):
    whole = (tmp_path / shard.name).read_bytes()
    damage_is_named(tmp_path, shard, whole + b"\0")
    (tmp_path / shard.name).unlink()
    with pytest.raises(MissingInputError, match=r"train-00000.tar: shard is missing"):
        verify_shard(tmp_path, shard, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, MissingInputError, "not a finished dataset"),
        ("{", DataError, "damaged manifest"),
        ('{"format_version": 99}', DataError, "shard format 99, this program reads 1"),
        ('{"format_version": 1, "shards": []}', DataError, "damaged manifest"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path, text, error, message):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(error, match=message):
        read_manifest(tmp_path)


def test_columns_that_disagree_are_named():
    block = make_blocks(1)[0]
    with pytest.raises(DataError, match="holds id 63, the vocabulary has 40"):
        block.check("here", 40)
    broken = Block(**{**{name: getattr(block, name) for name in COLUMNS}, "lengths": block.lengths[:-1]})
    with pytest.raises(DataError, match="here: column input_ids has shape"):
        broken.check("here", VOCAB_SIZE)
    broken = Block(
        **{**{n: getattr(block, n) for n in COLUMNS}, "segment_a_lengths": block.lengths + np.uint16(1)}
    )
    with pytest.raises(DataError, match="segment A is longer"):
        broken.check("here", VOCAB_SIZE)
    broken = Block(
        **{
            **{n: getattr(block, n) for n in COLUMNS},
            "masked_lm_positions": block.masked_lm_positions + np.uint16(99),
        }
    )
    with pytest.raises(DataError, match="outside its example"):
        broken.check("here", VOCAB_SIZE)


def test_what_is_not_a_block_is_named():
    with pytest.raises(DataError, match="here: not a block of shard format 1"):
        decode_block(b"x" * 1024, "here")


def test_a_failed_write_leaves_nothing(tmp_path):
    def chunks():
        yield b"half"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_file_durably(tmp_path / "file", chunks())
    assert list(tmp_path.iterdir()) == []


def test_ids_take_two_bytes_where_they_can():
    assert (ids_dtype(65_536), ids_dtype(65_537)) == (np.dtype(np.uint16), np.dtype(np.uint32))
