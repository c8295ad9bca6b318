"""Examples per second that one core reads from shards: verified, decoded, ordered, packed to tensors.

    python -m benchmarks.loader [--examples 40000] [--rounds 5]

Every example is a full 512 tokens with 77 predictions. The dataset is written first, outside the clock. Two figures,
in turns: the masks of the shards, and fresh masks in every epoch (data.remask=true), drawn in the same process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from albert.blocks import MAX_EXAMPLES_PER_BLOCK, Block
from albert.config import DataConfig
from albert.loader import BatchPlan, TrainLoader
from albert.manifest import Manifest, TokenizerEntry
from albert.shards import write_shard
from benchmarks.figure import print_figure

VOCAB_SIZE = 30000
_LENGTH = 512
_MICRO_BATCH = 32


def _block(generator: np.random.Generator, length: int) -> Block:
    n, preds = MAX_EXAMPLES_PER_BLOCK, round(0.15 * length)
    positions = np.sort(
        generator.permuted(np.tile(np.arange(1, length - 1), (n, 1)), axis=1)[:, :preds], axis=1
    )
    return Block(
        input_ids=generator.integers(5, VOCAB_SIZE, n * length).astype(np.uint16),
        lengths=np.full(n, length, np.uint16),
        segment_a_lengths=np.full(n, length // 2, np.uint16),
        masked_lm_positions=positions.ravel().astype(np.uint16),
        masked_lm_labels=generator.integers(5, VOCAB_SIZE, n * preds).astype(np.uint16),
        num_masked=np.full(n, preds, np.uint16),
        sentence_order_labels=generator.integers(0, 2, n).astype(np.int8),
        word_starts=generator.integers(0, 256, n * length // 8).astype(np.uint8),
    )


def write_dataset(directory: Path, num_examples: int, length: int) -> Manifest:
    """One shard of random full-length examples and a vocabulary; returns its manifest, which is not written."""
    generator = np.random.default_rng(0)
    blocks = (_block(generator, length) for _ in range(-(-num_examples // MAX_EXAMPLES_PER_BLOCK)))
    shard = write_shard(directory, "train-00000.tar", "train", blocks)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(5, VOCAB_SIZE))]
    (directory / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = TokenizerEntry(kind="wordpiece", file="vocab.txt", sha256="", vocab_size=VOCAB_SIZE)
    settings = {
        "max_seq_length": length,
        "masked_lm_prob": 0.15,
        "max_predictions_per_seq": round(0.15 * length),
        "max_ngram": 3,
        "favor_ngram": "shorter",
    }
    return Manifest(format_version=1, tokenizer=tokenizer, settings=settings, totals={}, shards=(shard,))


def main() -> None:
    """Measure and print the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=40000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        manifest = write_dataset(Path(name), options.examples, _LENGTH)
        for seed in range(options.rounds):
            for remask, values in sorted(rates.items(), reverse=bool(seed % 2)):
                values.append(_rate(name, manifest, options.examples // _MICRO_BATCH, seed, remask))
    for remask, values in rates.items():
        figure = "loader_fresh_masks" if remask else "loader_static_masks"
        print_figure(figure, values, "examples/s of CPU time", tokens_per_example=_LENGTH, workers=0)


def _rate(directory: str, manifest: Manifest, num_steps: int, seed: int, remask: bool) -> float:
    """Examples per CPU second of a whole pass."""
    plan = BatchPlan(_MICRO_BATCH, _MICRO_BATCH, 0, 1, num_steps)
    config = DataConfig(directory=directory, num_workers=0, remask=remask)
    loader = TrainLoader(config, manifest, plan, seed)
    begin = time.process_time()
    for _ in loader.steps(0, 0):
        pass
    return num_steps * _MICRO_BATCH / (time.process_time() - begin)


if __name__ == "__main__":
    main()
