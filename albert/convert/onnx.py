"""ONNX export of any model with a head, checked against onnxruntime before the file appears."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from albert.durable_files import sync_directory
from albert.errors import ConfigError, DataError, UnsafeError
from albert.heads import AlbertForPreTraining, AlbertForQuestionAnswering, AlbertHead
from albert.model_config import ModelConfig
from albert.weights import build_model

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
_TOLERANCE = 1e-4
"""Largest difference from PyTorch's logits, relative to the largest logit, that an export may have."""


class _Padded(nn.Module):
    """A model's padded call as a forward with the argument order that Hugging Face exports have."""

    def __init__(self, model: AlbertHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
        return self.model.forward_padded(input_ids, token_type_ids, attention_mask)  # type: ignore[operator]


def refuse_to_overwrite(file: Path) -> None:
    """An ONNX file may be replaced, anything else not.

    Raises:
        UnsafeError: `file` exists, and is a directory or has another suffix.
    """
    if file.exists() and (file.suffix != ".onnx" or not file.is_file()):
        raise UnsafeError(f"--output {file}: exists and is no .onnx file; choose another name")


def write_onnx(file: Path, config: ModelConfig, state: Mapping[str, Tensor], where: str) -> float:
    """Export [batch, sequence] int64 inputs to logits, all sizes free; returns the error of the check.

    Args:
        file: the .onnx file to write.
        config: the model.
        state: our parameter names, with one head.
        where: the model, for messages.

    Raises:
        ConfigError: the packages of the extra `onnx` are missing.
        DataError: the model has no head, or the exported model computes something else.
    """
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if missing:
        raise ConfigError(
            f"to-onnx needs {', '.join(missing)}; install them with `pip install albert-pretraining[onnx]`"
        )
    model = _Padded(build_model(config, state, where)).eval()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        _export(model, config, temporary)
        error = max(_compare(model, config, temporary, shape) for shape in ((2, 9), (3, 14)))
        if not error <= _TOLERANCE:
            raise DataError(f"{where}: the ONNX model's logits differ by {error:.1e} relative; not written")
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(file)
        sync_directory(file.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return error


def _export(model: _Padded, config: ModelConfig, file: Path) -> None:
    free = {0: "batch", 1: "sequence"}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            model,
            _example(config, (2, 8)),
            file,
            input_names=list(INPUT_NAMES),
            output_names=_output_names(model.model),
            dynamic_shapes=(free, free, free),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _output_names(model: AlbertHead) -> list[str]:
    if isinstance(model, AlbertForPreTraining):
        return ["prediction_logits", "sop_logits"]
    return ["start_logits", "end_logits"] if isinstance(model, AlbertForQuestionAnswering) else ["logits"]


def _example(config: ModelConfig, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and types of random sequences; the last one is padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, shape[1] // 2 :] = 0
    return ids, mask, (torch.arange(shape[1]) >= shape[1] // 3).long().repeat(shape[0], 1)


def _compare(model: _Padded, config: ModelConfig, file: Path, shape: tuple[int, int]) -> float:
    """Largest difference of real tokens' logits, relative to the largest logit."""
    import onnxruntime

    inputs = _example(config, shape)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = {name: value.numpy() for name, value in zip(INPUT_NAMES, inputs, strict=True)}
    with torch.no_grad():
        expected = model(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    errors = []
    for ours, theirs in zip(expected, session.run(None, given), strict=True):
        real = inputs[1].bool() if ours.shape[:2] == shape else slice(None)
        difference = (torch.from_numpy(theirs) - ours)[real].abs().max()
        errors.append(float(difference / ours[real].abs().max()))
    return max(errors)
