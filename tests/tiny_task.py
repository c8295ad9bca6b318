"""A small sentence-pair task that a tiny model learns in seconds: is the letter of text A among the first four."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from albert.heads import AlbertForPreTraining
from albert.model_config import ModelConfig
from albert.pretrained import save_pretrained

LETTERS = "abcdefgh"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *"0123456789"]
MODEL = ModelConfig(
    vocab_size=len(PIECES),
    embedding_size=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
    initializer_range=0.1,
    classifier_dropout_prob=0.0,
)


def write_task(directory: Path, *, num_train: int = 400, num_dev: int = 80, seed: int = 0) -> Path:
    """train.tsv, dev.tsv and test.tsv: `a 1 2 <TAB> 3 4 <TAB> 1`, digits are noise."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name, size in (("train", num_train), ("dev", num_dev), ("test", num_dev)):
        (directory / f"{name}.tsv").write_text("".join(_row(rng) for _ in range(size)))
    return directory


def _row(rng: np.random.Generator) -> str:
    letter = int(rng.integers(len(LETTERS)))
    digits = [" ".join(map(str, rng.integers(0, 10, rng.integers(1, 4)))) for _ in range(2)]
    return f"{LETTERS[letter]} {digits[0]}\t{digits[1]}\t{int(letter < len(LETTERS) // 2)}\n"


def write_model(directory: Path, config: ModelConfig = MODEL, seed: int = 0) -> Path:
    """A freshly initialised pretrained model with its tokenizer."""
    vocabulary = directory.parent / f"{directory.name}-vocab.txt"
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.write_text("\n".join(PIECES) + "\n")
    save_pretrained(directory, config, AlbertForPreTraining(config, seed=seed).state_dict(), vocabulary)
    return directory
