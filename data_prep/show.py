"""Examples of a dataset as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from albert.blocks import Block
from albert.errors import MissingInputError
from albert.manifest import Manifest, dataset_tokenizer, read_manifest
from albert.shards import ShardReader
from albert.tokenization import Tokenizer, load_tokenizer


def read_blocks(
    directory: Path | str, manifest: Manifest, split: str, max_blocks: int
) -> Iterator[tuple[str, Block]]:
    """At most `max_blocks` blocks of a split, spread evenly, each with its place in words."""
    shards = manifest.split(split)
    places = [(s, b) for s, shard in enumerate(shards) for b in range(len(shard.blocks))]
    reader = ShardReader(directory, shards, manifest.tokenizer.vocab_size)
    try:
        for i in np.unique(np.linspace(0, len(places) - 1, min(max_blocks, len(places))).astype(int)):
            shard, block = places[i]
            yield f"{shards[shard].name}: block {block}", reader.read_block(shard, block)
    finally:
        reader.close()


@dataclass(frozen=True)
class ShownExample:
    """One example in pieces."""

    where: str
    order: str
    """in order, swapped, or one segment"""
    segment_a_length: int
    original: tuple[str, ...]
    """[tokens]"""
    masked: tuple[str, ...]
    """[tokens]"""
    predicted: tuple[int, ...]
    """[preds] positions; the labels are the original pieces there"""

    @property
    def title(self) -> str:
        """Where it lies and what it is."""
        return f"{self.where}: {len(self.original)} tokens, A {self.segment_a_length}, {self.order}"

    @property
    def labels(self) -> list[str]:
        """[preds] `position:piece`."""
        return [f"{position}:{self.original[position]}" for position in self.predicted]

    def text(self) -> str:
        """Original, masked and labels below each other, for a terminal."""
        return (
            f"{self.title}\n  original: {' '.join(self.original)}\n  masked:   {' '.join(self.masked)}\n"
            f"  labels:   {', '.join(self.labels)}"
        )


def show_examples(directory: Path | str, split: str, count: int) -> list[str]:
    """Examples as text, spread over the dataset: original, masked, labels.

    Raises:
        MissingInputError: the dataset has no such split.
    """
    manifest = read_manifest(directory)
    if not manifest.split(split):
        raise MissingInputError(f"{directory}: has no {split} split; see --eval-fraction of the build")
    tokenizer = load_tokenizer(dataset_tokenizer(directory, manifest))
    num_blocks = sum(len(shard.blocks) for shard in manifest.split(split))
    per_block = -(-count // min(count, num_blocks))
    shown: list[str] = []
    for where, block in read_blocks(directory, manifest, split, count):
        take = min(per_block, block.num_examples, count - len(shown))
        shown += [take_example(block, i, f"{where}, example {i}", tokenizer).text() for i in range(take)]
    return shown


def take_example(block: Block, index: int, where: str, tokenizer: Tokenizer) -> ShownExample:
    """One example of a block."""
    begin = int(block.lengths[:index].sum(dtype=np.int64))
    end = begin + int(block.lengths[index])
    first = int(block.num_masked[:index].sum(dtype=np.int64))
    predicted = block.masked_lm_positions[first : first + int(block.num_masked[index])]
    return ShownExample(
        where=where,
        order={0: "in order", 1: "swapped"}.get(int(block.sentence_order_labels[index]), "one segment"),
        segment_a_length=int(block.segment_a_lengths[index]),
        original=tuple(tokenizer.pieces(block.original_ids()[begin:end].tolist())),
        masked=tuple(tokenizer.pieces(block.input_ids[begin:end].tolist())),
        predicted=tuple(predicted.tolist()),
    )
