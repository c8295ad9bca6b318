"""TensorFlow checkpoints of Google's ALBERT and of brightmart's albert_zh, read without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from albert.convert.foreign import Imported, import_tensors
from albert.convert.tensor_bundle import TensorBundle
from albert.model_config import ModelConfig

_NO_MODEL = re.compile(r"(.*/)?(adam_[mv]|lamb_[mv]|Adam(_1)?|global_step|beta[12]_power|loss_scale\w*)")
"""Optimizer slots and counters."""


def read_tensorflow(path: Path, config: ModelConfig, overrides: Mapping[str, Any]) -> Imported:
    """Read a checkpoint of either layout; see `foreign.import_tensors` for what is raised.

    Args:
        path: prefix, one of its files, a directory with one checkpoint, or a TF-Hub module.
        config: of the checkpoint.
        overrides: fields that the user gave.
    """
    bundle = TensorBundle(path)
    ignored = [name for name in bundle.entries if _NO_MODEL.fullmatch(name)]
    tensors = {
        dotted_name(name): _tensor(name, bundle.read(name)) for name in bundle.entries if name not in ignored
    }
    imported = import_tensors(tensors, config, overrides, str(bundle.prefix))
    if ignored:
        imported.notes.insert(0, f"{len(ignored)} optimizer slots and counters were passed over")
    return imported


def dotted_name(name: str) -> str:
    """albert_pytorch's name of a TensorFlow variable; other variables keep their own."""
    name = name.removeprefix("module/")
    if re.fullmatch(r"output_(weights|bias)", name):
        name = f"classifier/{name}"
    name = name.replace("cls/squad/", "qa_outputs/")
    name = name.replace("/attention_1/", "/attention/").replace("/ffn_1/", "/ffn/")
    name = re.sub(r"(group)_(\d+)(?=/)", r"\1/\2", name)
    name = re.sub(r"/(kernel|gamma|output_weights)$", "/weight", name)
    name = re.sub(r"/(beta|output_bias)$", "/bias", name)
    name = re.sub(r"_embeddings(_2)?$", r"_embeddings\1/weight", name)
    return name.replace("/", ".")


def _tensor(name: str, value: np.ndarray[Any, Any]) -> Tensor:
    """Kernels and brightmart's embedding projection are [in, out] there and [out, in] here."""
    is_transposed = name.endswith(("/kernel", "/word_embeddings_2"))
    return torch.from_numpy(np.array(value.T if is_transposed else value, dtype=np.float32, order="C"))
