"""Find settings that no tensor shape shows by their masked-language loss on real text.

Head count, activation and LayerNorm order change nothing in a checkpoint's shapes, and published configurations
have had all three wrong. The right ones predict masked words far better than the wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from albert.batches import PretrainBatch, pack
from albert.convert.foreign import with_fields
from albert.errors import ConfigError, DataError, MissingInputError
from albert.heads import AlbertForPreTraining
from albert.model_config import ModelConfig
from albert.tokenization import Tokenizer
from albert.weights import load_weights

_MAX_LINES = 64
_MAX_TOKENS = 126
_MASKED_SHARE = 0.15
_PUBLISHED_HEADS = (12, 16, 32, 64)


@dataclass(frozen=True)
class Score:
    """How well a model predicts masked words under some settings."""

    loss: float
    """Mean cross entropy in nats; the logarithm of the vocabulary size is chance."""
    fields: dict[str, Any]
    """num_attention_heads, hidden_act and ln_type."""


def probe(config: ModelConfig, state: Mapping[str, Tensor], tokenizer: Tokenizer, text: Path) -> list[Score]:
    """Score candidate settings, the best first.

    Args:
        config: the settings that the checkpoint's file gives; all others are varied around it.
        state: our parameter names, with the masked-language head.
        tokenizer: of the model.
        text: file of plain text, one sentence or paragraph per line; the first 64 lines are used.

    Raises:
        ConfigError: the checkpoint has no masked-language head.
        MissingInputError: no such text.
        DataError: the text is too short, or the tokenizer is not the model's.
    """
    if "predictions.bias" not in state:
        raise ConfigError("--probe needs the masked-language head, which this checkpoint does not have")
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(
            f"{tokenizer.path}: {tokenizer.vocab_size} pieces, the model has vocab_size "
            f"{config.vocab_size}; give the tokenizer that belongs to the model"
        )
    batch = _masked_batch(tokenizer, text, config.max_position_embeddings)
    scores = []
    for fields in candidate_fields(config):
        model = AlbertForPreTraining(with_fields(config, fields)).eval()
        load_weights(model, state, str(text))
        with torch.no_grad():
            total = model(batch).mlm_loss_sum
        scores.append(Score(total.item() / len(batch.masked_lm_labels), fields))
    return sorted(scores, key=lambda score: score.loss)


def candidate_fields(config: ModelConfig) -> list[dict[str, Any]]:
    """Combinations of the published head counts, activations and (brightmart) LayerNorm orders."""
    heads = {config.num_attention_heads, *_PUBLISHED_HEADS}
    possible = sorted(n for n in heads if config.hidden_size % n == 0)
    orders = ("postln", "preln") if config.layout == "brightmart" else (config.ln_type,)
    return [
        {"num_attention_heads": n, "hidden_act": act, "ln_type": order}
        for n, act, order in product(possible, ("gelu_new", "gelu", "relu"), orders)
    ]


def _masked_batch(tokenizer: Tokenizer, text: Path, max_positions: int) -> PretrainBatch:
    """The first lines of a text with 15 % of the tokens replaced by the mask, the same every time."""
    if not text.is_file():
        raise MissingInputError(f"--probe {text}: no such text file")
    try:
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(
            f"--probe {text}: byte {error.start} is not UTF-8; convert the file to UTF-8"
        ) from error
    length = min(_MAX_TOKENS, max_positions - 2)
    rows = [ids[:length] for ids in tokenizer.encode_batch(lines[:_MAX_LINES]) if len(ids) >= 8]
    if not rows:
        raise DataError(f"--probe {text}: no line of at least 8 tokens; give some ordinary text")
    rng = np.random.default_rng(0)
    ids, indices, labels, start = [], [], [], 0
    for row in rows:
        ids += [tokenizer.cls_id, *row, tokenizer.sep_id]
        chosen = rng.choice(len(row), max(1, round(_MASKED_SHARE * len(row))), replace=False)
        for position in sorted(int(i) for i in chosen):
            indices.append(start + 1 + position)
            labels.append(row[position])
            ids[indices[-1]] = tokenizer.mask_id
        start += len(row) + 2
    packed = torch.tensor(ids)
    lengths = tuple(len(row) + 2 for row in rows)
    return PretrainBatch(
        pack(packed, torch.zeros_like(packed), lengths),
        torch.tensor(indices),
        torch.tensor(labels),
        torch.full((len(rows),), -100),
    )
