"""Memory of one rank, by part, for this project's own model and engine. Imports no torch.

Counts what the backward pass needs, tensor by tensor as `albert/modeling.py` keeps them, and what ZeRO leaves.
Layers are shared, but their activations are not: those are what fills a device, never the weights.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from albert.config import RunConfig
from albert.model_config import ModelConfig

_FP32 = 4
LOGITS_AT_A_TIME = 2**24
"""As in `albert/cross_entropy.py`, which imports torch."""
_MOST_SEQUENCES = 2**20
_STATISTICS = 2 * 2 * _FP32
"""Mean and inverse deviation of two LayerNorms, per token."""


def num_parameters(config: ModelConfig) -> int:
    """Parameters of `AlbertForPreTraining`, tied ones once."""
    hidden, embed, inner = config.hidden_size, config.embedding_size, config.intermediate_size
    is_google = config.layout == "google"
    width = embed if is_google else hidden
    norm = 2
    embeddings = config.vocab_size * embed + (config.max_position_embeddings + config.type_vocab_size) * width
    embeddings += norm * width
    has_projection = is_google or embed != hidden
    projection = (embed * hidden + is_google * hidden) * has_projection
    attention = 4 * (hidden * hidden + hidden) + norm * hidden
    feed_forward = 2 * hidden * inner + inner + hidden + norm * hidden
    num_attention, num_feed_forward = num_blocks(config)
    pooler = hidden * hidden + hidden
    heads = hidden * width + width + norm * width + config.vocab_size + 2 * hidden + 2
    final = norm * hidden if config.final_ln else 0
    blocks = num_attention * attention + num_feed_forward * feed_forward
    return embeddings + projection + blocks + pooler + heads + final


def num_blocks(config: ModelConfig) -> tuple[int, int]:
    """Attention and feed-forward blocks that have parameters of their own."""
    layers = config.num_hidden_layers
    if config.share_type == "all":
        groups = config.num_hidden_groups * config.inner_group_num
        return groups, groups
    return {"ffn": (layers, 1), "attention": (1, layers), "none": (layers, layers)}[config.share_type]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step."""

    weights: int
    """In the precision of the computation."""
    gradients: int
    optimizer: int
    """fp32 master weights and moments."""
    activations: int
    """What the layers keep for the backward pass."""
    vocabulary: int
    """Logits of a piece of the predicted positions, and the gradient that they give the word embeddings."""
    runtime: int = 0
    """What libraries take beside tensors."""

    @property
    def state(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All parts."""
        return self.state + self.activations + self.vocabulary + self.runtime


def peak_memory(config: RunConfig, stage: int, num_ranks: int, *, seq_length: int, preds: int) -> Memory:
    """Memory of a rank.

    Args:
        config: its micro-batch, precision and activation checkpointing count.
        stage: of ZeRO.
        num_ranks: over which ZeRO spreads its part.
        seq_length: tokens of a sequence.
        preds: predicted positions of a sequence.
    """
    size = _FP32 if config.train.precision == "fp32" else 2
    parameters = num_parameters(config.model)
    share = {stage_: num_ranks if stage >= stage_ else 1 for stage_ in (1, 2, 3)}
    sequences = config.train.micro_batch_size
    return Memory(
        weights=size * (parameters // share[3] + _joined_values(config.model))
        + _packed_bytes(config.model, size),
        gradients=_gradient_bytes(parameters, size, stage, share),
        optimizer=(3 if stage or size == 2 else 2) * _FP32 * parameters // share[1],
        activations=round(sequences * seq_length * activation_bytes_per_token(config, seq_length, preds)),
        vocabulary=vocabulary_bytes(config.model, sequences * preds, size),
    )


def _joined_values(model: ModelConfig) -> int:
    """Queries, keys and values joined into one matrix, and its gradient, for the time of a pass."""
    return 2 * 3 * model.hidden_size**2 * num_blocks(model)[0]


def _packed_bytes(model: ModelConfig, size: int) -> int:
    """Shared weights and their transposes as `albert/linear.py` lays them out in fp32; on a GPU this stays free."""
    if size != _FP32:
        return 0
    hidden, uses = model.hidden_size, model.num_layer_uses
    sizes = (4 * hidden**2, 2 * hidden * model.intermediate_size)
    shared = [
        blocks * values for blocks, values in zip(num_blocks(model), sizes, strict=True) if blocks < uses
    ]
    return 2 * _FP32 * sum(shared)


def _gradient_bytes(parameters: int, size: int, stage: int, share: dict[int, int]) -> int:
    """Gradients of the micro-batch, and their fp32 sum over the step where the computation is 16-bit."""
    if stage == 0:
        return size * parameters
    accumulated = _FP32 * parameters // share[2]
    return size * parameters + accumulated


def activation_bytes_per_token(config: RunConfig, seq_length: int, preds: int) -> float:
    """Bytes that all layer uses keep for one token, on average.

    Of the tokens that no head uses, neither predicted nor first, the last one keeps its input, keys and values only.
    """
    model = config.model
    size = _FP32 if config.train.precision == "fp32" else 2
    kept = layer_bytes_per_token(config, seq_length)
    if config.train.activation_checkpointing:
        return model.num_layer_uses * model.hidden_size * size + kept
    unused = max(0.0, 1 - (preds + 1) / seq_length)
    return model.num_layer_uses * kept - unused * size * (5 * model.hidden_size + 2 * model.intermediate_size)


def layer_bytes_per_token(config: RunConfig, seq_length: int) -> int:
    """Bytes that one layer use keeps for one token.

    Inputs of the matrix products (hidden, attention output, LayerNorm output, activation: 3 hidden + 1 inner),
    query, key and value (3 hidden), inputs of both LayerNorms (2 hidden) and of the activation (1 inner).
    """
    model = config.model
    size = _FP32 if config.train.precision == "fp32" else 2
    values = 8 * model.hidden_size + 2 * model.intermediate_size
    attention = model.num_attention_heads * _FP32  # logarithm of the sum of each row
    if model.attention_probs_dropout_prob > 0:
        # No fused kernel drops out: the probabilities are kept before and after, with their mask.
        attention = model.num_attention_heads * seq_length * (2 * size + 1)
    masks = 2 * model.hidden_size if model.hidden_dropout_prob > 0 else 0
    return values * size + attention + masks + _STATISTICS


def vocabulary_bytes(model: ModelConfig, preds: int, size: int) -> int:
    """What `albert.cross_entropy` holds for so many predicted positions.

    A piece of logits, in fp32 too, the logarithms of their softmax, and the fp32 gradient of the word embeddings.
    """
    logits = min(preds, max(1, LOGITS_AT_A_TIME // model.vocab_size)) * model.vocab_size
    copies = 1 if size == _FP32 else 2
    return logits * (size + copies * _FP32) + _FP32 * model.vocab_size * (model.embedding_size + 1)


def largest_micro_batch(
    config: RunConfig, stage: int, num_ranks: int, *, seq_length: int, preds: int, budget: int
) -> int:
    """Most sequences of a forward pass whose peak stays below `budget` bytes; 0 if not even one does."""

    def exceeds(sequences: int) -> bool:
        train = config.train.model_copy(update={"micro_batch_size": sequences})
        asked = config.model_copy(update={"train": train})
        return peak_memory(asked, stage, num_ranks, seq_length=seq_length, preds=preds).total > budget

    return bisect.bisect_left(range(1, _MOST_SEQUENCES), True, key=exceeds)
