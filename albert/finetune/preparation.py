"""Everything that is read and checked before training: files, labels, tokenizer, pretrained weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from albert.errors import ConfigError, DataError, MissingInputError
from albert.finetune.examples import TagExample
from albert.finetune.reading import Split, collect_labels, find_file, read_split
from albert.finetune.request import Request
from albert.finetune.settings import FinetuneSettings
from albert.finetune.task_card import TaskCard
from albert.finetune.task_data import TaskData, make_task_data
from albert.finetune.task_definition import Task
from albert.model_config import ModelConfig
from albert.pretrained import load_pretrained
from albert.tokenization import Tokenizer, load_tokenizer
from albert.weights import hash_tensors

_MAX_VOCAB_PADDING = 128
"""Embedding rows that some projects add to reach a round number."""


@dataclass(frozen=True)
class Prepared:
    """A task ready to be trained, any number of times."""

    task: Task
    labels: tuple[str, ...]
    config: ModelConfig
    weights: dict[str, Tensor]
    source: Path
    """Directory of the weights."""
    keeps_head: bool
    """The weights have a head for this very task."""
    tokenizer: Tokenizer
    max_seq_length: int
    data: dict[str, TaskData]
    """By split."""

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the weights by name."""
        return hash_tensors(self.weights)

    @cached_property
    def data_sha256(self) -> str:
        """Hash of the examples that are trained on or that choose the best weights."""
        digest = hashlib.sha256()
        for name in ("train", "dev"):
            for example in self.data[name].split.examples if name in self.data else ():
                digest.update(f"{name} {example!r}\n".encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, dict[str, int]]:
        """Sizes and notable counts of every split."""
        return {
            name: {
                "examples": len(data.split.examples),
                "units": len(data.lengths),
                "longest": int(data.lengths.max()),
                **{f"skipped {reason}": count for reason, count in data.split.skipped.items()},
                **{note: count for note, count in data.notes.items() if count},
            }
            for name, data in self.data.items()
        }


def prepare(request: Request, task: Task, settings: FinetuneSettings) -> Prepared:
    """Read and check all inputs.

    Raises:
        MissingInputError: a data file, the model or its tokenizer is not there.
        DataError: bad rows, or the weights are damaged.
        ConfigError: model, tokenizer, labels and settings do not fit together.
    """
    source = find_model_directory(Path(request.model))
    card = TaskCard.read(source)
    labels, splits = _read_splits(request, task, card)
    config, weights, tokenizer_path = load_pretrained(source)
    keeps_head = card is not None and card.fits(task, labels)
    if not request.do_train and not keeps_head:
        _refuse_missing_head(request, task, card)
    tokenizer = _fitting_tokenizer(request, tokenizer_path, config)
    length = _sequence_length(request, settings, config, card if keeps_head else None)
    data = {name: make_task_data(task, split, labels, tokenizer, length) for name, split in splits.items()}
    return Prepared(
        task, labels, _with_dropout(config, settings), weights, source, keeps_head, tokenizer, length, data
    )


def find_model_directory(path: Path) -> Path:
    """`path`, or the model of a fine-tuning run's output directory."""
    if not path.exists():
        raise MissingInputError(f"--model {path}: no such directory")
    nested = path / "model"
    is_finetuned_run = (nested / "task.json").is_file() and not (path / "config.json").is_file()
    return nested if is_finetuned_run else path


def _read_splits(
    request: Request, task: Task, card: TaskCard | None
) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Labels, and the splits that the request needs; dev is read for training too where it is there."""
    wanted = request.splits()
    directory = Path(request.data_dir)
    if request.do_train and "dev" not in wanted and _has_file(task, directory, "dev"):
        wanted.append("dev")
    labels = task.labels
    if labels is None and not request.do_train and card is not None:
        labels = card.labels
    splits: dict[str, Split] = {}
    for name in wanted:
        split = read_split(task, directory, name, labels=labels, skip_bad_rows=request.skip_bad_rows)
        if labels is None and task.kind in {"classification", "tagging"}:
            labels = collect_labels(split.examples)
        _check_labels(task, split, labels or ())
        splits[name] = split
    return labels or (), splits


def _has_file(task: Task, directory: Path, split: str) -> bool:
    try:
        find_file(task, directory, split)
    except MissingInputError:
        return False
    return True


def _check_labels(task: Task, split: Split, labels: tuple[str, ...]) -> None:
    if split.name == "train" and task.kind == "classification":
        found = collect_labels(split.examples)
        if len(found) < 2:
            raise DataError(
                f"{split.path}: every label is '{found[0]}'; a classifier needs at least two classes"
            )
    for number, example in enumerate(split.examples, start=1):
        unknown = set(example.tags or ()) - set(labels) if isinstance(example, TagExample) else set()
        if unknown:
            raise DataError(
                f"{split.path}: sentence {number} has the tag '{min(unknown)}', which the training file has not; "
                f"known are {', '.join(labels)}"
            )


def _refuse_missing_head(request: Request, task: Task, card: TaskCard | None) -> None:
    found = f"was fine-tuned on {card.task} ({', '.join(card.labels[:6])})" if card else "has no task's head"
    raise ConfigError(
        f"--model {request.model}: {found}, so it cannot answer {task.name}; add --do-train, "
        "or name the model directory that a fine-tuning run wrote"
    )


def _fitting_tokenizer(request: Request, path: Path | None, config: ModelConfig) -> Tokenizer:
    chosen = Path(request.tokenizer) if request.tokenizer else path
    if chosen is None:
        raise MissingInputError(
            f"--model {request.model}: no spiece.model or vocab.txt there; name one with --tokenizer"
        )
    tokenizer = load_tokenizer(chosen)
    if path is not None and tokenizer.sha256 != load_tokenizer(path).sha256:
        raise ConfigError(
            f"--tokenizer {chosen}: differs from {path}, which the model was made with; leave the option out"
        )
    surplus = config.vocab_size - tokenizer.vocab_size
    if not 0 <= surplus < _MAX_VOCAB_PADDING:
        raise ConfigError(
            f"{chosen}: the tokenizer has {tokenizer.vocab_size} entries, the model {request.model} was made "
            f"for {config.vocab_size}; use the tokenizer that the model was pretrained with"
        )
    return tokenizer


def _sequence_length(
    request: Request, settings: FinetuneSettings, config: ModelConfig, card: TaskCard | None
) -> int:
    """What was asked for; else what the head was trained with; else the recipe's, as far as the model reaches."""
    if "max_seq_length" not in request.overrides:
        wanted = card.max_seq_length if card and not request.do_train else settings.max_seq_length
        return min(wanted, config.max_position_embeddings)
    if settings.max_seq_length > config.max_position_embeddings:
        raise ConfigError(
            f"--max-seq-length ({settings.max_seq_length}) exceeds the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    return settings.max_seq_length


def _with_dropout(config: ModelConfig, settings: FinetuneSettings) -> ModelConfig:
    changes: dict[str, float] = {}
    if settings.dropout is not None:
        changes |= {"hidden_dropout_prob": settings.dropout, "attention_probs_dropout_prob": settings.dropout}
    if settings.classifier_dropout is not None:
        changes["classifier_dropout_prob"] = settings.classifier_dropout
    return config.model_copy(update=changes)
