"""Small models and batches that several tests use, and how their tensors are compared."""

import torch

from albert.batches import PackedBatch, PretrainBatch, pack
from albert.model_config import ModelConfig

LENGTHS = (11, 17, 17, 4)


def scaled_down(config: ModelConfig) -> ModelConfig:
    """The preset with its proportions kept (head size, I / H, E), in a size that a test can afford."""
    factor = max(1, config.hidden_size // 512)
    return config.model_copy(
        update={
            "vocab_size": 500,
            "hidden_size": config.hidden_size // factor,
            "num_attention_heads": max(1, config.num_attention_heads // factor),
            "intermediate_size": config.intermediate_size // factor,
            "num_hidden_layers": min(config.num_hidden_layers, 4),
        }
    )


def tiny(**other) -> ModelConfig:
    fields = {
        "vocab_size": 60,
        "embedding_size": 8,
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    return ModelConfig(**{**fields, **other})


def random_sequences(vocab_size: int, lengths=LENGTHS, seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab_size, (sum(lengths),), generator=generator)
    types = torch.cat([(torch.arange(n) > n // 2).long() for n in lengths])
    return pack(ids, types, tuple(lengths))


def padded(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def pad(x):
        return torch.nn.utils.rnn.pad_sequence(list(x.split(batch.lengths)), batch_first=True)

    return pad(batch.input_ids), pad(batch.token_type_ids), pad(torch.ones_like(batch.input_ids)).bool()


def pretrain_batch(vocab_size: int, lengths=LENGTHS) -> PretrainBatch:
    sequences = random_sequences(vocab_size, lengths)
    indices = torch.arange(1, sum(lengths), 3)
    labels = (sequences.input_ids[indices] * 7) % vocab_size
    orders = torch.arange(len(lengths)) % 2
    return PretrainBatch(sequences, indices, labels, orders)


def perturbed(model: torch.nn.Module, scale: float = 0.1) -> torch.nn.Module:
    """Biases and LayerNorms away from 0 and 1, so that a missing or misplaced one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=scale)
    return model


def worst_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest relative error over tensors.

    Relative to a tensor's own norm, or to a thousandth of the norm of all where a tensor is (nearly)
    zero: the gradient of the key bias is zero in exact arithmetic.
    """
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * sum(x.norm().item() ** 2 for x in theirs.values()) ** 0.5
    return max((ours[n] - x).norm().item() / max(x.norm().item(), floor) for n, x in theirs.items())
