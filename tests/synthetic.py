"""A small dataset with learnable structure: counting sequences, half of them swapped."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from albert.blocks import Block
from albert.manifest import Manifest, TokenizerEntry, write_manifest
from albert.shards import write_shard

VOCAB_SIZE = 64
MAX_LENGTH = 24
_CLS, _SEP, _MASK, _FIRST = 2, 3, 4, 5


def make_block(generator: np.random.Generator, num_examples: int) -> Block:
    """Examples `[CLS] n n+1 ... [SEP] m m+1 ... [SEP]` with 15 % masks."""
    rows = [_make_example(generator) for _ in range(num_examples)]
    ids, a_lengths, positions, labels, orders = zip(*rows, strict=True)
    flat = np.concatenate(ids)
    return Block(
        input_ids=flat.astype(np.uint16),
        lengths=np.array([len(row) for row in ids], np.uint16),
        segment_a_lengths=np.array(a_lengths, np.uint16),
        masked_lm_positions=np.concatenate(positions).astype(np.uint16),
        masked_lm_labels=np.concatenate(labels).astype(np.uint16),
        num_masked=np.array([len(row) for row in positions], np.uint16),
        sentence_order_labels=np.array(orders, np.int8),
        word_starts=np.packbits((flat != _CLS) & (flat != _SEP)),
    )


def _make_example(generator: np.random.Generator) -> tuple[np.ndarray, int, np.ndarray, np.ndarray, int]:
    sizes = generator.integers(4, (MAX_LENGTH - 3) // 2 + 1, 2)
    start = generator.integers(_FIRST, VOCAB_SIZE)
    run = (start - _FIRST + np.arange(sizes.sum())) % (VOCAB_SIZE - _FIRST) + _FIRST
    first, second = run[: sizes[0]], run[sizes[0] :]
    is_swapped = int(generator.integers(2))
    if is_swapped:
        first, second = second, first
    ids = np.concatenate([[_CLS], first, [_SEP], second, [_SEP]])
    candidates = np.flatnonzero(ids >= _FIRST)
    positions = np.sort(generator.choice(candidates, max(1, round(0.15 * len(ids))), replace=False))
    labels = ids[positions].copy()
    ids[positions] = _MASK
    return ids, len(first) + 2, positions, labels, is_swapped


def make_dataset(
    directory: Path,
    *,
    num_blocks: int = 8,
    examples_per_block: int = 32,
    eval_examples: int = 48,
    seed: int = 0,
) -> Manifest:
    """Write train blocks in two shards and one eval shard; returns the manifest."""
    (directory / "tokenizer").mkdir(parents=True)
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"n{i}" for i in range(VOCAB_SIZE - _FIRST)),
    ]
    tokenizer = directory / "tokenizer" / "vocab.txt"
    tokenizer.write_text("\n".join(vocabulary) + "\n")
    generator = np.random.default_rng(seed)
    # The last block of each shard is shorter, as in real datasets.
    sizes = [examples_per_block] * (num_blocks - 1) + [max(1, examples_per_block // 3)]
    blocks = [make_block(generator, size) for size in sizes]
    half = num_blocks // 2
    shards = (
        write_shard(directory, "train-00000.tar", "train", blocks[:half]),
        write_shard(directory, "train-00001.tar", "train", blocks[half:]),
        write_shard(directory, "eval-00000.tar", "eval", [make_block(generator, eval_examples)]),
    )
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    manifest = Manifest(
        format_version=1,
        tokenizer=TokenizerEntry(
            kind="wordpiece", file="tokenizer/vocab.txt", sha256=sha256, vocab_size=VOCAB_SIZE
        ),
        settings={
            "max_seq_length": MAX_LENGTH,
            "masked_lm_prob": 0.15,
            "max_predictions_per_seq": 4,
            "max_ngram": 3,
            "favor_ngram": "shorter",
        },
        totals={},
        shards=shards,
    )
    write_manifest(directory, manifest)
    return manifest


TINY_MODEL = {
    "vocab_size": VOCAB_SIZE,
    "embedding_size": 10,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": MAX_LENGTH,
}
"""Odd sizes, so that partitions need padding."""
