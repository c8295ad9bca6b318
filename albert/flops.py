"""Useful floating-point operations of a training step. Imports no torch.

Counts matrix products only, a multiply-add as 2, backward as twice forward, real tokens only; recomputation is not
useful work, and neither is what the last layer would compute for tokens that no head uses (it does not). The usual
6 x parameters x tokens is 8 to 21 times too low for ALBERT, because the one layer is applied L times.
"""

from __future__ import annotations

from albert.model_config import ModelConfig


def step_flops(
    config: ModelConfig, *, tokens: int, sum_squared_lengths: int, sequences: int, preds: int
) -> float:
    """FLOPs of forward and backward for one batch.

    Args:
        config: the model.
        tokens: real tokens.
        sum_squared_lengths: sum over the sequences of length squared; attention is quadratic per sequence.
        sequences: number of sequences (pooler and sentence-order head).
        preds: predicted positions.
    """
    hidden, embed, uses = config.hidden_size, config.embedding_size, config.num_layer_uses
    layer = 8 * hidden**2 + 4 * hidden * config.intermediate_size
    keys_values, attention = 4 * hidden**2, 4 * hidden * sum_squared_lengths
    used = sequences + preds
    forward: float = (uses - 1) * (tokens * layer + attention)
    forward += tokens * keys_values + used * (layer - keys_values) + used / tokens * attention
    forward += sequences * (2 * hidden**2 + 4 * hidden)
    if config.layout == "brightmart":
        forward += tokens * 2 * embed * hidden
        forward += preds * 2 * (hidden**2 + hidden * embed + embed * config.vocab_size)
    else:
        forward += tokens * 2 * embed * hidden
        forward += preds * 2 * (hidden * embed + embed * config.vocab_size)
    return 3.0 * forward
