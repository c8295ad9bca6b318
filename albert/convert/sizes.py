"""Parameter counts by closed formulas, and the model-size table of albert_pytorch. Imports no torch.

S is one attention or feed-forward block with its LayerNorm; parameters that are used twice count once.
"""

from __future__ import annotations

from dataclasses import dataclass

from albert.model_config import MODEL_PRESETS, ModelConfig

_FILE_BYTES_PER_TENSOR = 173
"""Name and bookkeeping of one tensor in a file of `torch.save`, its form before 1.6, measured."""


@dataclass(frozen=True)
class ParameterCount:
    """Unique parameters of a model."""

    body: int
    """Embeddings, encoder and pooler."""
    heads: int
    """Masked-language and sentence-order heads; the decoder is the word embedding and counts there."""

    @property
    def total(self) -> int:
        """Body and heads."""
        return self.body + self.heads


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Unique parameters of a configuration."""
    vocab, embed, hidden = config.vocab_size, config.embedding_size, config.hidden_size
    is_google = config.layout == "google"
    width = embed if is_google else hidden
    positions = config.max_position_embeddings + config.type_vocab_size
    embeddings = vocab * embed + positions * width + 2 * width + _projection(config)
    num_attention, num_feed_forward = _num_blocks(config)
    encoder = num_attention * attention_block(hidden)
    encoder += num_feed_forward * feed_forward_block(hidden, config.intermediate_size)
    encoder += 2 * hidden if config.final_ln else 0
    transform = hidden * width + width + 2 * width
    return ParameterCount(
        body=embeddings + encoder + hidden * hidden + hidden,
        heads=transform + vocab + 2 * hidden + 2,
    )


def attention_block(hidden: int) -> int:
    """Query, key, value and output with biases, and the LayerNorm."""
    return 4 * (hidden * hidden + hidden) + 2 * hidden


def feed_forward_block(hidden: int, intermediate: int) -> int:
    """Both matrices with biases, and the LayerNorm."""
    return 2 * hidden * intermediate + intermediate + hidden + 2 * hidden


def _projection(config: ModelConfig) -> int:
    """Embedding to hidden size: with bias in Google's layout, without and only if needed in brightmart's."""
    weights = config.embedding_size * config.hidden_size
    if config.layout == "google":
        return weights + config.hidden_size
    return 0 if config.embedding_size == config.hidden_size else weights


def _num_blocks(config: ModelConfig) -> tuple[int, int]:
    """Attention and feed-forward blocks."""
    layers, groups = config.num_hidden_layers, config.num_hidden_groups * config.inner_group_num
    return {
        "all": (groups, groups),
        "attention": (1, layers),
        "ffn": (layers, 1),
        "none": (layers, layers),
    }[config.share_type]


def albert_pytorch_file_floats(config: ModelConfig) -> int:
    """Numbers in albert_pytorch's file: it stores the decoder, and the untied projection, a second time."""
    decoder = config.vocab_size * config.embedding_size
    return count_parameters(config).total + decoder + _projection(config)


def albert_pytorch_file_bytes(config: ModelConfig) -> int:
    """Size of its `pytorch_model.bin`, as `torch.save` of 2019 wrote it, to about 1 kB."""
    num_attention, num_feed_forward = _num_blocks(config)
    projections = 2 if _projection(config) else 0
    num_tensors = 15 + projections + 10 * num_attention + 6 * num_feed_forward
    return 4 * albert_pytorch_file_floats(config) + num_tensors * _FILE_BYTES_PER_TENSOR


def size_table() -> str:
    """The README table of albert_pytorch (brightmart's base, V=21128) and the counts of every preset."""
    lines = [
        "albert_pytorch's model-size table: brightmart layout, bert-base shape, V=21128, fp32, MB = 10^6 bytes",
        f"{'E':>5} {'share_type':<11} {'its file':>10} {'unique':>10} {'unique parameters':>18}",
    ]
    for embedding_size in (768, 128):
        for share_type in ("none", "attention", "ffn", "all"):
            config = MODEL_PRESETS["base_brightmart"].model_copy(
                update={"embedding_size": embedding_size, "share_type": share_type}
            )
            total = count_parameters(config).total
            duplicated = albert_pytorch_file_bytes(config) / 1e6
            lines.append(
                f"{embedding_size:>5} {share_type:<11} {duplicated:>7.1f} MB "
                f"{4 * total / 1e6:>7.1f} MB {total:>18,}"
            )
    lines += ["", f"{'preset':<20} {'body':>13} {'with heads':>13} {'fp32':>10}"]
    for name, config in MODEL_PRESETS.items():
        count = count_parameters(config)
        lines.append(f"{name:<20} {count.body:>13,} {count.total:>13,} {4 * count.total / 1e6:>7.1f} MB")
    return "\n".join(lines)
