"""Hugging Face's names and configuration for the same model, in both directions.

Hugging Face's AlbertModel is Google's layout, post-LN. brightmart's layout, pre-LN and partial sharing
have no counterpart there and are refused; layers that share nothing are written as one group each.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from albert.errors import DataError, MissingInputError, UnsafeError
from albert.model_config import ModelConfig, read_model_config
from albert.weights import expected_shapes, read_safetensors

_ATTENTION = {"LayerNorm": "attention.LayerNorm", "dense": "attention.dense"} | {
    part: f"attention.{part}" for part in ("query", "key", "value")
}
_FEED_FORWARD = {"intermediate": "ffn", "output": "ffn_output", "LayerNorm": "full_layer_layer_norm"}
_BLOCK_PARTS = {"attention": _ATTENTION, "feed_forward": _FEED_FORWARD}

_BLOCK = re.compile(r"albert\.encoder\.(attention|feed_forward)\.(\d+)\.(\w+)\.(weight|bias)")

_HEAD_NAMES = {
    "sop_classifier": "sop_classifier.classifier",
    "classifier": "classifier",
    "token_classifier": "classifier",
    "choice_classifier": "classifier",
    "span_classifier": "qa_outputs",
}


def hugging_face_name(name: str, inner_group_num: int) -> str:
    """Hugging Face's name of one of our parameters."""
    if match := _BLOCK.fullmatch(name):
        block, index, part, kind = match.groups()
        group, inner = divmod(int(index), inner_group_num)
        theirs = _BLOCK_PARTS[block][part]
        return f"albert.encoder.albert_layer_groups.{group}.albert_layers.{inner}.{theirs}.{kind}"
    head, _, rest = name.partition(".")
    return f"{_HEAD_NAMES[head]}.{rest}" if head in _HEAD_NAMES else name


_HEAD_OF_ARCHITECTURE = {
    "AlbertForSequenceClassification": "classifier",
    "AlbertForTokenClassification": "token_classifier",
    "AlbertForMultipleChoice": "choice_classifier",
    "AlbertForQuestionAnswering": "span_classifier",
}
_TIED = {
    "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
    "predictions.decoder.bias": "predictions.bias",
}
_BUFFERS = ("albert.embeddings.position_ids", "albert.embeddings.token_type_ids")


def read_hugging_face(directory: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a Hugging Face directory under our names; tied copies are checked and dropped.

    Raises:
        MissingInputError: there are no weights.
        DataError: damaged weights, or a decoder that is not tied to the word embeddings.
    """
    config = read_model_config(directory / "config.json")
    theirs = _read_tensors(directory)
    if "embeddings.word_embeddings.weight" in theirs:  # a bare AlbertModel has no prefix
        theirs = {f"albert.{name}": tensor for name, tensor in theirs.items()}
    if "predictions.bias" not in theirs and "predictions.decoder.bias" in theirs:
        theirs["predictions.bias"] = theirs["predictions.decoder.bias"]
    for copy, original in _TIED.items():
        if copy in theirs and not torch.equal(theirs.pop(copy), theirs[original]):
            raise DataError(f"{directory}: {copy} differs from {original}; ALBERT ties the two")
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    names = _our_names(config, (raw.get("architectures") or [""])[0])
    return config, {names.get(n, n): t for n, t in theirs.items() if n not in _BUFFERS}


def _our_names(config: ModelConfig, architecture: str) -> dict[str, str]:
    """Hugging Face name -> our name of every parameter; `classifier` means what the architecture says."""
    head = _HEAD_OF_ARCHITECTURE.get(architecture, "classifier")
    others = set(_HEAD_OF_ARCHITECTURE.values()) - {head, "span_classifier"}
    return {
        hugging_face_name(name, config.inner_group_num): name
        for name in expected_shapes(config)
        if name.partition(".")[0] not in others
    }


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """Tensors of model.safetensors, of its shards, or of pytorch_model.bin (weights only, no code is run)."""
    if (directory / "model.safetensors").is_file():
        return read_safetensors(directory / "model.safetensors")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return {n: t for file in files for n, t in read_safetensors(directory / file).items()}
    return read_torch_file(directory / "pytorch_model.bin")


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """A state dict written by `torch.save`, read without running code from it.

    Raises:
        MissingInputError: no such file.
        UnsafeError: the file holds objects that are no tensors, which could run code.
        DataError: the file is damaged or no state dict.
    """
    if not path.is_file():
        raise MissingInputError(f"{path}: no weights; expected model.safetensors or pytorch_model.bin")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for damaged files, and pickle's own for code
        if "Unsupported " in str(error):
            raise UnsafeError(
                f"{path}: refused, it holds more than tensors and reading it could run code; "
                "save the state dict alone with `torch.save(model.state_dict(), ...)`"
            ) from error
        reason = type(error).__name__
        raise DataError(f"{path}: damaged, truncated or no PyTorch file ({reason}); copy it again") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DataError(f"{path}: not a state dict of tensors; save `model.state_dict()`")
    return dict(state)
