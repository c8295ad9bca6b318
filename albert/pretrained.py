"""Model directories: config.json, model.safetensors and the tokenizer file; read strictly, written whole.

A model is only ever complete: every parameter of the encoder and of each head that is there, with the right
shape, and nothing else. Heads may be absent as a whole (a fine-tuned model has no masked-language head).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from albert.errors import DataError, MissingInputError, UnsafeError
from albert.heads import (
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertHead,
)
from albert.model_config import ModelConfig, model_config_bytes, read_model_config
from albert.shards import sync_directory, write_file_durably
from albert.tokenization import SENTENCEPIECE_FILE, WORDPIECE_FILE, find_tokenizer_file

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_LISTED_NAMES = 12
"""Names per kind of difference that an error lists."""


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
        from albert.convert.huggingface import read_hugging_face

        config, state = read_hugging_face(path)
    else:
        config, state = read_model_config(path / CONFIG_NAME), _read_own_tensors(path)
    check_tensors(config, state, str(path))
    return config, {name: tensor.float() for name, tensor in state.items()}, find_tokenizer(path)


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], where: str) -> list[str]:
    """Fill a model from tensors of the same encoder; returns the names that stay as initialised.

    Only whole heads may stay so (a new classifier, a pooler that the source lacks); heads that the model lacks
    are passed over.

    Raises:
        DataError: tensors of the encoder are missing or have other shapes.
    """
    own = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    groups = {_group(name) for name in expected}
    given = {n: tuple(t.shape) for n, t in state_dict.items() if _group(n) in groups}
    fresh_groups = {g for g in groups if g != "albert" and not any(_group(n) == g for n in given)}
    fresh = [name for name in expected if _group(name) in fresh_groups]
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
    present = {_group(name) for name in given}
    expected = expected_shapes(config, given)
    kept = {n: s for n, s in expected.items() if _group(n) == "albert" or _group(n) in present}
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


def _group(name: str) -> str:
    """Part of a model that is there as a whole or not at all: the encoder, the pooler, or a head."""
    return "pooler" if name.startswith("albert.pooler.") else name.partition(".")[0]


def is_hugging_face(directory: Path) -> bool:
    """Whether config.json is Hugging Face's: `model_type` is albert."""
    text = (directory / CONFIG_NAME).read_text(encoding="utf-8")
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
        UnsafeError: `directory` exists and is neither empty nor a model directory.
    """
    if directory.exists() and not _is_replaceable(directory):
        raise UnsafeError(
            f"{directory}: exists and is not a model directory; choose another output directory"
        )
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


def _is_replaceable(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    names = {path.name for path in directory.iterdir()}
    return not names or (CONFIG_NAME in names and "checkpoints" not in names)


def build_model(config: ModelConfig, state_dict: Mapping[str, Tensor], where: str) -> AlbertHead:
    """The model with the head that the tensors have, filled and in evaluation mode.

    Raises:
        DataError: there is no head or more than one, or a part of the model is missing.
    """
    heads = {_group(name) for name in state_dict} - {"albert", "pooler"}

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
