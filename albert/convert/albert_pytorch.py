"""State dicts of lonePatient's albert_pytorch, both layouts and every revision's sharing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albert.convert.foreign import Imported, fold_pooled_shift, import_tensors
from albert.convert.huggingface import read_torch_file
from albert.model_config import ModelConfig


def read_albert_pytorch(
    path: Path, config: ModelConfig, overrides: Mapping[str, Any], *, legacy_pooled_shift: bool = False
) -> Imported:
    """Read `pytorch_model.bin` (or a directory with one) without running code from it.

    Args:
        path: the file or its directory.
        config: of the checkpoint.
        overrides: fields that the user gave.
        legacy_pooled_shift: fold the 0.1 that its sequence classifier adds to every feature into the bias.
    """
    file = path / "pytorch_model.bin" if path.is_dir() else path
    tensors = {name.removeprefix("module."): t for name, t in read_torch_file(file).items()}
    imported = import_tensors(tensors, config, overrides, str(file))
    if imported.config.hidden_act == "gelu_new" and "hidden_act" not in overrides:
        imported.notes.append(
            "hidden_act gelu was read as gelu_new, which converted TensorFlow weights need; albert_pytorch "
            "itself computes the erf form, so give --hidden-act gelu for weights that it trained"
        )
    return fold_pooled_shift(imported) if legacy_pooled_shift else imported
