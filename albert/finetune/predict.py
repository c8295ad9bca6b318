"""Prediction with a fine-tuned model: `python -m albert.finetune predict --model DIR [--input FILE]`.

Reads one JSON object per line from a file or standard input and writes one per line to standard output, in order:
`text_a` and `text_b`; `question` and `context`; `context`, `question` and `options`; or `words`. A line without what
the model was trained on ends the program with code 65, after the answers to the lines before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from albert.command_line import CommandParser
from albert.errors import ConfigError, DataError, MissingInputError
from albert.finetune.batching import evaluation_batches
from albert.finetune.examples import ChoiceExample, Example, SpanExample, TagExample, TextExample
from albert.finetune.preparation import find_model_directory
from albert.finetune.reading import Split
from albert.finetune.task_card import TaskCard
from albert.finetune.task_data import make_task_data
from albert.finetune.task_model import build_model, initialise
from albert.pretrained import load_pretrained
from albert.tokenization import load_tokenizer

_CHUNK = 512
"""Lines that are read, encoded and answered at once."""
_BATCH = 64


class Predictor:
    """A fine-tuned model and its task."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        """Load a model directory that a fine-tuning run wrote.

        Raises:
            ConfigError: the model was not fine-tuned.
        """
        source = find_model_directory(directory)
        card = TaskCard.read(source)
        if card is None:
            raise ConfigError(
                f"--model {directory}: no task.json; name the model directory of a fine-tuning run"
            )
        config, weights, tokenizer_path = load_pretrained(source)
        if tokenizer_path is None:
            raise MissingInputError(f"{source}: no spiece.model or vocab.txt there; copy the model again")
        self.card = card
        self.task = card.as_task()
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.device = device
        self.model = build_model(self.task, card.labels, config, seed=0)
        initialise(self.model, weights, str(source), keeps_head=True, reinit_pooler=False)
        self.model.to(device).eval()

    @torch.no_grad()
    def predict(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """One prediction per example, in order."""
        split = Split("test", Path("-"), tuple(examples))
        data = make_task_data(self.task, split, self.card.labels, self.tokenizer, self.card.max_seq_length)
        rows = np.empty((len(data.lengths), data.row_width), dtype=np.float32)
        for units in evaluation_batches(data.lengths, 0, 1, _BATCH):
            batch = data.batch(units).to(self.device)
            rows[units] = data.rows(self.model(batch.sequences), batch, units)
        return [{k: v for k, v in p.items() if k not in {"label", "words"}} for p in data.predictions(rows)]


_KEYS: dict[str, tuple[str, ...]] = {
    "classification": ("text_a",),
    "regression": ("text_a",),
    "span": ("question", "context"),
    "choice": ("context", "question", "options"),
    "tagging": ("words",),
}
_LISTS = {"options", "words"}


def parse_example(kind: str, line: str, number: int) -> Example:
    """One line of input.

    Raises:
        DataError: not a JSON object with the keys that the kind of task needs.
    """
    keys = _KEYS[kind]
    try:
        fields = json.loads(line)
        values = {key: fields[key] for key in keys}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"line {number}: wanted a JSON object with {', '.join(keys)} ({type(error).__name__}: {error})"
        ) from error
    if fields.get("text_b") is not None and "text_a" in keys:
        values["text_b"] = fields["text_b"]
    for key, value in values.items():
        is_text = isinstance(value, list) and all(isinstance(part, str) for part in value)
        if not (is_text if key in _LISTS else isinstance(value, str)):
            raise DataError(f"line {number}: {key} is no {'list of texts' if key in _LISTS else 'text'}")
        if not value:
            raise DataError(f"line {number}: {key} is empty")
    return _example(kind, str(fields.get("id", number)), values)


def _example(kind: str, guid: str, values: dict[str, Any]) -> Example:
    if kind == "span":
        return SpanExample(guid, values["question"], values["context"], (), is_labelled=False)
    if kind == "choice":
        return ChoiceExample(guid, values["context"], values["question"], tuple(values["options"]), None)
    if kind == "tagging":
        return TagExample(guid, tuple(values["words"]), None)
    return TextExample(guid, values["text_a"], values.get("text_b"), None)


def predict_lines(predictor: Predictor, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Predictions of JSON lines, a chunk at a time, so that a stream of any length is served.

    Raises:
        DataError: a line is not what the task needs; the lines before it are answered.
    """
    examples = _examples(predictor, lines)
    error: DataError | None = None
    while error is None:
        chunk, error = _next_chunk(examples)
        if chunk:
            yield from predictor.predict(chunk)
        elif error is None:
            return
    raise error


def _next_chunk(examples: Iterator[Example]) -> tuple[list[Example], DataError | None]:
    """The next examples, none at the end, and what is wrong with the line behind them."""
    chunk: list[Example] = []
    try:
        chunk.extend(itertools.islice(examples, _CHUNK))  # what came before an error stays
    except DataError as error:
        return chunk, error
    return chunk, None


def _examples(predictor: Predictor, lines: Iterable[str]) -> Iterator[Example]:
    """Parsed lines; all have a second text or none, as in the training where that is known."""
    trained_on_pairs = is_pair = predictor.card.is_pair
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        example = parse_example(predictor.task.kind, line, number)
        if isinstance(example, TextExample):
            has_second = example.text_b is not None
            is_pair = has_second if is_pair is None else is_pair
            if has_second != is_pair:
                wanted = "unlike before" if trained_on_pairs is None else "unlike in the training"
                raise DataError(f"line {number}: text_b is {'given' if has_second else 'missing'}, {wanted}")
        yield example


def run_predict(arguments: Sequence[str]) -> None:
    """The subcommand.

    Raises:
        MissingInputError: no such model or input file.
    """
    parser = CommandParser(
        prog="python -m albert.finetune predict",
        description=__doc__,
        epilog='example:\n  echo \'{"text_a": "How are you?", "text_b": "How do you do?"}\' | '
        "python -m albert.finetune predict --model runs/lcqmc/model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="model directory (or run) of a fine-tuning")
    parser.add_argument("--input", default="-", help="JSON lines (default: standard input)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    if options.input != "-" and not Path(options.input).is_file():
        raise MissingInputError(f"--input {options.input}: no such file")
    use_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    predictor = Predictor(Path(options.model), torch.device("cuda" if use_cuda else "cpu"))
    if options.input == "-":
        _serve(predictor, sys.stdin.buffer)
        return
    with Path(options.input).open("rb") as file:
        _serve(predictor, file)


def decode_lines(file: Iterable[bytes]) -> Iterator[str]:
    """Lines of UTF-8, whatever the locale; a byte order mark is left out.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"line {number}: byte {error.start} is not UTF-8; convert the input to UTF-8"
            ) from error


def _serve(predictor: Predictor, file: BinaryIO) -> None:
    began_at, count = time.perf_counter(), 0
    for prediction in predict_lines(predictor, decode_lines(file)):
        sys.stdout.buffer.write(json.dumps(prediction, ensure_ascii=False).encode() + b"\n")
        count += 1
    sys.stdout.flush()
    seconds = time.perf_counter() - began_at
    sys.stderr.write(f"{count:,} examples in {seconds:.2f} s, {count / seconds:,.0f} per second\n")
