"""Data preparation against the tokenizer's own batch encode of the same text, alternating, in CPU seconds.

python -m benchmarks.data_prep [--rounds 5] [--english FILE --english-tokenizer MODEL] [--chinese FILE
                               --chinese-model SPIECE --chinese-vocabulary VOCAB]

Without files the English text is the documentation of the standard library, repeated, with a model trained on it;
the Chinese figures need --chinese. Texts hold one sentence per line. Figures: the whole `build` (reading, hashing,
pairs, masks, shards on disk; process start not) over the encode; wall-clock time of one worker over two; masks alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np

from albert.masking import MaskingPolicy, example_keys, remask_block
from albert.shards import ShardReader, read_manifest
from albert.tokenization import SentencePieceTokenizer, Tokenizer, WordPieceTokenizer, load_tokenizer
from benchmarks.figure import print_figure
from data_prep.build import BuildRequest, build
from data_prep.demo_corpus import write_demo_corpus
from data_prep.settings import BuildSettings
from data_prep.tokenizer import train_tokenizer

_REPEATS = 8
_LINES_PER_CALL = 20_000


def main() -> None:
    """Measure and print every figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("english", "english-tokenizer", "chinese", "chinese-model", "chinese-vocabulary"):
        parser.add_argument(f"--{name}", type=Path, default=None)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # CPU seconds of one thread
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        text, model = options.english, options.english_tokenizer
        if text is None:
            text, model = _default_text(place)
        _compare("english_512", text, model, options.rounds, place, dupe_factor=1)
        _compare("english_512_10_copies", text, model, options.rounds, place, dupe_factor=10)
        _two_workers(text, model, options.rounds, place)
        _masks_alone(text, model, options.rounds, place)
        for kind, tokenizer in (
            ("sentencepiece", options.chinese_model),
            ("wordpiece", options.chinese_vocabulary),
        ):
            if options.chinese is None or tokenizer is None:
                sys.stderr.write(f"no --chinese text and {kind} tokenizer: that figure is left out\n")
                continue
            _compare(f"chinese_{kind}_512", options.chinese, tokenizer, options.rounds, place, dupe_factor=1)


def _default_text(place: Path) -> tuple[Path, Path]:
    write_demo_corpus(place / "demo")
    corpus = place / "demo" / "corpus.txt"
    model = train_tokenizer([str(corpus)], place / "tokenizer", 8000)
    text = place / "english.txt"
    text.write_text((corpus.read_text() + "\n") * _REPEATS)
    return text, model


def _encode(tokenizer: Tokenizer, lines: Sequence[str]) -> None:
    """The library's own batch encode, on raw lines, without this project's normalisation."""
    for start in range(0, len(lines), _LINES_PER_CALL):
        batch = lines[start : start + _LINES_PER_CALL]
        if isinstance(tokenizer, SentencePieceTokenizer):
            tokenizer._processor.encode(batch, num_threads=1)
        else:
            assert isinstance(tokenizer, WordPieceTokenizer)
            tokenizer._tokenizer.encode_batch(batch, add_special_tokens=False)


def _build(text: Path, tokenizer: Path, output: Path, dupe_factor: int = 1, num_workers: int = 1) -> None:
    settings = BuildSettings(dupe_factor=dupe_factor)
    request = BuildRequest((str(text),), str(tokenizer), str(output), settings, num_workers=num_workers)
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # no progress bar
        build(request)


def _seconds(action: Callable[[], None], clock: Callable[[], float] = time.process_time) -> float:
    begin = clock()
    action()
    return clock() - begin


def _compare(name: str, text: Path, model: Path, rounds: int, place: Path, dupe_factor: int) -> None:
    """CPU time of the build over that of the encode, in turns."""
    tokenizer = load_tokenizer(model)
    lines = [line for line in text.read_text().split("\n") if line]
    output = place / "out"
    ratios, rates = [], []
    for number in range(rounds + 1):
        steps = [lambda: _encode(tokenizer, lines), lambda: _build(text, model, output, dupe_factor)]
        order = (0, 1) if number % 2 else (1, 0)
        taken = {i: _seconds(steps[i]) for i in order}
        shutil.rmtree(output)
        if number:  # the first round warms caches
            ratios.append(taken[1] / taken[0])
            rates.append(text.stat().st_size / taken[1] / 1e6)
    bytes_in = text.stat().st_size
    print_figure(f"data_prep_{name}", ratios, "x tokenizer", input_bytes=bytes_in, copies=dupe_factor)
    print_figure(f"data_prep_{name}_rate", rates, "MB/s per core", input_bytes=bytes_in, copies=dupe_factor)


def _two_workers(text: Path, model: Path, rounds: int, place: Path) -> None:
    """Wall-clock time of one worker over two; the text four times over, so that start-up counts little."""
    longer = place / "longer.txt"
    with longer.open("w") as file:
        for _ in range(4):
            file.write(text.read_text() + "\n")
    ratios = []
    for number in range(rounds):
        taken = {}
        for workers in (1, 2) if number % 2 else (2, 1):
            output = place / f"out{workers}"
            taken[workers] = _seconds(
                lambda o=output, w=workers: _build(longer, model, o, num_workers=w), time.perf_counter
            )
            shutil.rmtree(output)
        ratios.append(taken[1] / taken[2])
    print_figure("data_prep_two_workers", ratios, "x one worker", input_bytes=longer.stat().st_size)


def _masks_alone(text: Path, model: Path, rounds: int, place: Path) -> None:
    """CPU time of fresh masks for finished blocks of up to 256 examples, as at load time."""
    output = place / "masks"
    _build(text, model, output)
    manifest = read_manifest(output)
    reader = ShardReader(output, manifest.split("train"), manifest.tokenizer.vocab_size)
    blocks = [reader.read_block(s, 0) for s in range(len(manifest.split("train")))]
    policy = MaskingPolicy.of_tokenizer(load_tokenizer(output))
    tokens = sum(len(block.input_ids) for block in blocks)
    values = []
    for number in range(rounds + 1):
        keys = [example_keys(number, i, np.arange(block.num_examples)) for i, block in enumerate(blocks)]
        taken = _seconds(
            lambda k=keys: [remask_block(b, key, policy) for b, key in zip(blocks, k, strict=True)]  # type: ignore[arg-type,return-value]
        )
        if number:
            values.append(taken / tokens * 1e9)
    print_figure("data_prep_masks", values, "ns/token", tokens=tokens, blocks=len(blocks))


if __name__ == "__main__":
    main()
