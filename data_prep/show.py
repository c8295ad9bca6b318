"""Examples of a dataset as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from albert.errors import MissingInputError
from albert.shards import Block, Manifest, ShardReader, dataset_tokenizer, read_manifest
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
        shown += [describe_example(block, i, f"{where}, example {i}", tokenizer) for i in range(take)]
    return shown


def describe_example(block: Block, index: int, where: str, tokenizer: Tokenizer) -> str:
    """One example side by side: original, masked, labels with their positions."""
    begin = int(block.lengths[:index].sum(dtype=np.int64))
    end = begin + int(block.lengths[index])
    first = int(block.num_masked[:index].sum(dtype=np.int64))
    preds = slice(first, first + int(block.num_masked[index]))
    order = {0: "in order", 1: "swapped"}.get(int(block.sentence_order_labels[index]), "one segment")
    original = tokenizer.pieces(block.original_ids()[begin:end].tolist())
    masked = tokenizer.pieces(block.input_ids[begin:end].tolist())
    labels = tokenizer.pieces(block.masked_lm_labels[preds].tolist())
    positions = block.masked_lm_positions[preds].tolist()
    pairs = ", ".join(f"{p}:{label}" for p, label in zip(positions, labels, strict=True))
    return (
        f"{where}: {end - begin} tokens, A {int(block.segment_a_lengths[index])}, {order}\n"
        f"  original: {' '.join(original)}\n  masked:   {' '.join(masked)}\n  labels:   {pairs}"
    )
