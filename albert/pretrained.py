"""Model directories: config.json, model.safetensors and the tokenizer file; read strictly, written whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from albert.config_files import read_text
from albert.convert.huggingface import read_hugging_face
from albert.durable_files import sync_directory, write_file_durably
from albert.errors import MissingInputError, UnsafeError
from albert.finetune.task_card import TASK_CARD_NAME
from albert.model_config import ModelConfig, model_config_bytes, read_model_config
from albert.tokenization import SENTENCEPIECE_FILE, WORDPIECE_FILE, find_tokenizer_file
from albert.weights import check_tensors, read_safetensors, write_safetensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_OWN_NAMES = {
    CONFIG_NAME, WEIGHTS_NAME, TASK_CARD_NAME, SENTENCEPIECE_FILE, WORDPIECE_FILE, "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip
"""All that a model directory holds, exported ones included; nothing else is ever removed."""


def save_pretrained(
    directory: Path | str,
    model_config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer_path: Path | str | None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model directory at once: it is there completely, or not at all.

    Args:
        directory: replaced if it is a model directory or empty.
        model_config: written as config.json.
        state_dict: our parameter names; written in fp32.
        tokenizer_path: spiece.model, vocab.txt, or a directory with one of them.
        extra_files: small files by name that belong to the model, such as the labels of a fine-tuned head.

    Raises:
        DataError: the tensors are not this configuration's model.
        UnsafeError: `directory` holds something that is no model.
    """
    check_tensors(model_config, state_dict, f"model for {directory}")
    with replaced_directory(Path(directory)) as temporary:
        write_file_durably(temporary / CONFIG_NAME, [model_config_bytes(model_config)])
        write_safetensors(temporary / WEIGHTS_NAME, state_dict)
        if tokenizer_path is not None:
            copy_tokenizer(Path(tokenizer_path), temporary)
        for name, data in (extra_files or {}).items():
            write_file_durably(temporary / name, [data])


def load_pretrained(path: Path | str) -> tuple[ModelConfig, dict[str, Tensor], Path | None]:
    """Read a model: configuration, fp32 tensors by our names, and the tokenizer file if there is one.

    Args:
        path: a model directory, a Hugging Face directory, a training checkpoint
            (`RUN/checkpoints/step-N`), or a run directory (its newest checkpoint).

    Raises:
        MissingInputError: nothing to read there.
        DataError: a file is damaged, or the tensors are not the configuration's model.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        from albert.checkpoint import find_latest

        path = find_latest(path)
    if not (path / CONFIG_NAME).is_file():
        raise MissingInputError(
            f"{path}: no {CONFIG_NAME}; give a model directory, a Hugging Face directory, "
            "a training checkpoint or a run directory"
        )
    if is_hugging_face(path):
        config, state = read_hugging_face(path)
    else:
        config, state = read_model_config(path / CONFIG_NAME), _read_own_tensors(path)
    check_tensors(config, state, str(path))
    return config, {name: tensor.float() for name, tensor in state.items()}, find_tokenizer(path)


def is_hugging_face(directory: Path) -> bool:
    """Whether config.json is Hugging Face's: `model_type` is albert.

    Raises:
        ConfigError: it is not UTF-8.
    """
    text = read_text(directory / CONFIG_NAME)
    return re.search(r'"model_type"\s*:\s*"albert"', text) is not None


def _read_own_tensors(path: Path) -> dict[str, Tensor]:
    if (path / WEIGHTS_NAME).is_file():
        return read_safetensors(path / WEIGHTS_NAME)
    if (path / "manifest.json").is_file():
        from albert.checkpoint import read_weights

        return read_weights(path)
    raise MissingInputError(
        f"{path}: no {WEIGHTS_NAME} beside {CONFIG_NAME}; the copy is incomplete, or these are another "
        "project's weights: convert them with `python -m albert.convert`"
    )


def find_tokenizer(directory: Path) -> Path | None:
    """The tokenizer file in a directory, None where there is none."""
    try:
        return find_tokenizer_file(directory)
    except MissingInputError:
        return None


def copy_tokenizer(source: Path, directory: Path) -> Path:
    """Copy a tokenizer (file, or directory with one) under its standard name; returns the copy.

    Raises:
        MissingInputError: there is no tokenizer at `source`.
    """
    file = find_tokenizer_file(source)
    target = directory / (WORDPIECE_FILE if file.suffix == ".txt" else SENTENCEPIECE_FILE)
    write_file_durably(target, [file.read_bytes()])
    return target


@contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` when the block ends without an error.

    Raises:
        UnsafeError: see `check_replaceable`.
    """
    check_replaceable(directory)
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_directory(temporary)
        old = directory.with_name(f"{directory.name}.old-{os.getpid()}")
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
        sync_directory(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(directory: Path) -> None:
    """Check that a model may be written to a directory.

    Raises:
        UnsafeError: it exists, is not empty, and holds something else than the files of a model.
    """
    advice = "choose another output directory"
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UnsafeError(f"{directory}: exists and is not a directory; {advice}")
    files = {path.name: path.is_file() for path in directory.iterdir()}
    others = [name for name, is_file in files.items() if name not in _OWN_NAMES or not is_file]
    if others:
        raise UnsafeError(
            f"{directory}: exists and is not a model directory, it holds {min(others)}; {advice}"
        )
    if files and CONFIG_NAME not in files:
        raise UnsafeError(f"{directory}: exists and is not a model directory, no {CONFIG_NAME}; {advice}")
