"""Data preparation against the tokenizer's own batch encode of the same text, alternating, in CPU seconds.

python -m benchmarks.data_prep [NAME ...] [--rounds 5] [--english FILE --english-tokenizer MODEL]
                               [--chinese FILE --chinese-model SPIECE --chinese-vocabulary VOCAB]

Without files the English text is the documentation of the standard library, repeated, with a model trained on it;
the Chinese figures need --chinese. Texts hold one sentence per line. Figures: the whole `build` (reading, hashing,
pairs, masks, shards on disk; process start not) over the encode, for `english`, its `copies` (ten), its `prose` (the
same text as paragraphs, which are split into sentences) and `chinese`; `masks` by themselves. Only when named, since
they take minutes: `two_workers`, wall-clock time of one worker over two, which needs two idle cores, and the share of
the CPU time that the parent spends; `memory`, the peak of one worker on 2 GB.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np

from albert.manifest import read_manifest
from albert.masking import MaskingPolicy, example_keys, remask_block
from albert.shards import ShardReader
from albert.tokenization import SentencePieceTokenizer, Tokenizer, WordPieceTokenizer, load_tokenizer
from benchmarks.figure import print_figure
from data_prep.build import BuildRequest, build
from data_prep.demo_corpus import write_demo_corpus
from data_prep.settings import BuildSettings
from data_prep.tokenizer import train_tokenizer

_REPEATS = 8
_LINES_PER_CALL = 20_000
_PARALLEL_BYTES, _LARGE_BYTES = 250_000_000, 2_000_000_000
# getrusage would count the memory that this process had when it forked; the high-water mark in /proc does not.
_RUN_AND_TELL_MEMORY = """
import atexit, pathlib
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(status.read_text().partition("VmHWM:")[2].split()[0]))
from data_prep.cli import main
main()
"""


def main() -> None:
    """Measure and print the figures that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    short = ("english", "copies", "prose", "masks", "chinese")
    names = (*short, "two_workers", "memory")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("english", "english-tokenizer", "chinese", "chinese-model", "chinese-vocabulary"):
        parser.add_argument(f"--{name}", type=Path, default=None)
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # CPU seconds of one thread
    with tempfile.TemporaryDirectory() as name:
        for chosen in options.names or short:
            _measure(chosen, options, Path(name))


def _measure(name: str, options: argparse.Namespace, place: Path) -> None:
    if name == "chinese":
        _chinese(options, place)
        return
    text, model, rounds = options.english, options.english_tokenizer, options.rounds
    if text is None:
        text, model = _default_text(place)
    if name == "english":
        _compare("english_512", text, model, rounds, place)
    elif name == "copies":
        _compare("english_512_10_copies", text, model, rounds, place, dupe_factor=10)
    elif name == "prose":
        paragraphs = place / "prose.txt"
        documents = text.read_text().split("\n\n")
        paragraphs.write_text("\n\n".join(document.strip().replace("\n", " ") for document in documents))
        _compare("english_prose_512", paragraphs, model, rounds, place)
    elif name == "masks":
        _masks_alone(text, model, rounds, place)
    elif name == "two_workers":
        _two_workers(text, model, rounds, place)
    else:
        _memory(text, model, place)


def _chinese(options: argparse.Namespace, place: Path) -> None:
    for kind, tokenizer in (
        ("sentencepiece", options.chinese_model),
        ("wordpiece", options.chinese_vocabulary),
    ):
        if options.chinese is None or tokenizer is None:
            sys.stderr.write(f"no --chinese text and {kind} tokenizer: that figure is left out\n")
            continue
        _compare(f"chinese_{kind}_512", options.chinese, tokenizer, options.rounds, place)


def _default_text(place: Path) -> tuple[Path, Path]:
    text, model = place / "english.txt", place / "tokenizer" / "spiece.model"
    if not text.is_file():
        write_demo_corpus(place / "demo")
        corpus = place / "demo" / "corpus.txt"
        train_tokenizer([str(corpus)], model.parent, 8000)
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


def _seconds(action: Callable[[], None]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def _compare(name: str, text: Path, model: Path, rounds: int, place: Path, dupe_factor: int = 1) -> None:
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
    """Wall-clock time of one worker over two on 250 MB, so that the half second of their start counts little.

    On a busy machine two figures in CPU seconds tell what an idle one would do: what two workers spend over what one
    spends, and the share of it that the parent spends alone, which bounds what more workers can gain.
    """
    longer = _repeat(text, place, _PARALLEL_BYTES)
    figures: dict[str, list[float]] = {"two_workers": [], "two_workers_cpu": [], "parent_share": []}
    for number in range(rounds):
        wall, own, all_cpu = {}, {}, {}
        for workers in (1, 2) if number % 2 else (2, 1):
            output = place / f"out{workers}"
            before = time.perf_counter(), time.process_time(), _children_seconds()
            _build(longer, model, output, num_workers=workers)
            wall[workers] = time.perf_counter() - before[0]
            own[workers] = time.process_time() - before[1]
            all_cpu[workers] = own[workers] + _children_seconds() - before[2]
            shutil.rmtree(output)
        figures["two_workers"].append(wall[1] / wall[2])
        figures["two_workers_cpu"].append(all_cpu[2] / all_cpu[1])
        figures["parent_share"].append(own[2] / all_cpu[2])
    units = ("x one worker", "x CPU seconds of one worker", "of all CPU seconds")
    for (name, values), unit in zip(figures.items(), units, strict=True):
        print_figure(f"data_prep_{name}", values, unit, input_bytes=longer.stat().st_size)


def _children_seconds() -> float:
    """CPU seconds of processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _repeat(text: Path, place: Path, size: int) -> Path:
    """A text of at least `size` bytes."""
    longer = place / "longer.txt"
    with longer.open("w") as file:
        while file.tell() < size:
            file.write(text.read_text() + "\n")
    return longer


def _memory(text: Path, model: Path, place: Path) -> None:
    """Peak resident memory of a build in a process of its own."""
    longer = _repeat(text, place, _LARGE_BYTES)
    command = ["build", "--input", str(longer), "--tokenizer", str(model), "--output", str(place / "large")]
    result = subprocess.run(
        [sys.executable, "-c", _RUN_AND_TELL_MEMORY, *command, "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    peak = int(result.stdout.split()[-1]) / 1024
    print_figure("data_prep_memory", [peak], "MiB", input_bytes=longer.stat().st_size)


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
