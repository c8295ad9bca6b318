"""Tensors of a model by name: complete, of the right shapes, and nothing else.

A model is only ever complete: every parameter of the encoder and of each head that is there. Heads may be absent
as a whole (a fine-tuned model has no masked-language head).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from albert.durable_files import write_file_durably
from albert.errors import DataError
from albert.heads import (
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertHead,
)
from albert.model_config import ModelConfig

_LISTED_NAMES = 12
"""Names per kind of difference that an error lists."""


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.dim() else tensor.numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], where: str) -> list[str]:
    """Fill a model from tensors of the same encoder; returns the names that stay as initialised.

    Only whole heads may stay so (a new classifier, a pooler that the source lacks); heads that the model lacks
    are passed over.

    Raises:
        DataError: tensors of the encoder are missing or have other shapes.
    """
    own = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    groups = {part_of(name) for name in expected}
    given = {n: tuple(t.shape) for n, t in state_dict.items() if part_of(n) in groups}
    fresh_groups = {g for g in groups if g != "albert" and not any(part_of(n) == g for n in given)}
    fresh = [name for name in expected if part_of(name) in fresh_groups]
    raise_if_different({name: shape for name, shape in expected.items() if name not in fresh}, given, where)
    with torch.no_grad():
        for name in given:
            own[name].copy_(state_dict[name])
    return fresh


def check_tensors(config: ModelConfig, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Check that tensors are a complete encoder with complete heads.

    Raises:
        DataError: lists what is missing, unexpected, or of another shape.
    """
    given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    present = {part_of(name) for name in given}
    expected = expected_shapes(config, given)
    kept = {n: s for n, s in expected.items() if part_of(n) == "albert" or part_of(n) in present}
    raise_if_different(kept, given, where)


def expected_shapes(
    config: ModelConfig, given: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of every parameter that a model of this configuration can have.

    Args:
        config: the model.
        given: shapes of actual tensors, from which the number of labels of a fine-tuned head is taken.
    """
    given = given or {}

    def labels(head: str) -> int:
        return (given.get(f"{head}.bias") or (2,))[0]

    with torch.device("meta"):
        model = AlbertForPreTraining(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    widths = {
        "classifier": labels("classifier"),
        "token_classifier": labels("token_classifier"),
        "span_classifier": 2,
        "choice_classifier": 1,
    }
    for head, width in widths.items():
        shapes |= {f"{head}.weight": (width, config.hidden_size), f"{head}.bias": (width,)}
    return shapes


def raise_if_different(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare names and shapes.

    Raises:
        DataError: names every difference (at most a dozen of each kind).
    """
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    shapes = [
        f"{name} is {list(given[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)]
    problems = [f"{kind}: {_listed(names)}" for kind, names in parts if names]
    if problems:
        raise DataError(
            f"{where}: the tensors are not the model that the configuration describes; "
            f"{'; '.join(problems)}; use the configuration that belongs to these weights"
        )


def _listed(names: list[str]) -> str:
    rest = len(names) - _LISTED_NAMES
    return ", ".join(names[:_LISTED_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def part_of(name: str) -> str:
    """Part of a model that is there as a whole or not at all: the encoder, the pooler, or a head."""
    return "pooler" if name.startswith("albert.pooler.") else name.partition(".")[0]


def build_model(config: ModelConfig, state_dict: Mapping[str, Tensor], where: str) -> AlbertHead:
    """The model with the head that the tensors have, filled and in evaluation mode.

    Raises:
        DataError: there is no head or more than one, or a part of the model is missing.
    """
    heads = {part_of(name) for name in state_dict} - {"albert", "pooler"}

    def labels(head: str) -> int:
        return len(state_dict[f"{head}.bias"])

    makers: dict[str, Callable[[], AlbertHead]] = {
        "predictions": lambda: AlbertForPreTraining(config),
        "classifier": lambda: AlbertForSequenceClassification(config, labels("classifier")),
        "token_classifier": lambda: AlbertForTokenClassification(config, labels("token_classifier")),
        "span_classifier": lambda: AlbertForQuestionAnswering(config),
        "choice_classifier": lambda: AlbertForMultipleChoice(config, 1),
    }
    chosen = [head for head in makers if head in heads]
    if len(chosen) != 1:
        found = " and ".join(chosen) or "no head"
        raise DataError(f"{where}: has {found}; exactly one is needed of {', '.join(makers)}")
    model = makers[chosen[0]]()
    if fresh := load_weights(model, state_dict, where):
        raise DataError(f"{where}: lacks {_listed(fresh)}; train those heads first")
    return model.eval()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        DataError: the file is truncated or no safetensors file.
    """
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: damaged or truncated ({error}); copy it again") from error


def write_safetensors(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write tensors in fp32, durably, with the metadata key that Hugging Face asks for."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state_dict.items()}
    write_file_durably(path, [safetensors.torch.save(tensors, metadata={"format": "pt"})])
