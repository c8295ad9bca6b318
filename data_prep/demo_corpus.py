"""English text that every Python carries: documentation of the standard library, for a first try without a network.

Docstrings, block comments and the language reference of `pydoc` are cleaned into sentences: one per line, a blank
line between documents (one document per module or topic). A sentence-pair task is made from the same text in the
form of LCQMC: does the second text continue the first, or does it come from another document?
The same Python gives the same bytes. Any other text file can take the place of the documentation.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from albert.errors import DataError, MissingInputError, UnsafeError
from albert.shards import write_file_durably
from data_prep.cleaning import split_sentences
from data_prep.corpus import detect_format, read_documents, read_head
from data_prep.plan import Part, Source
from data_prep.settings import BuildSettings

CORPUS_FILE = "corpus.txt"
PAIRS_DIRECTORY = "pairs"
_SKIPPED = ("site-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo", "encodings", "__phello__")
_MIN_SENTENCES = 4
_MIN_DOCUMENTS = 40
"""Fewer cannot be divided into train, dev and test with other documents to choose from in each."""
_PAIR_SENTENCES = 2
"""Sentences in each text of a pair."""
_SPLIT_SHARES = (("train", 0.84), ("dev", 0.08), ("test", 0.08))

_MARKUP = re.compile(r":\w+(?::\w+)?:`~?([^`<]+)(?:<[^`>]*>)?`|`{1,2}([^`]*)`{1,2}|\*{1,2}(\w[^*\n]*)\*{1,2}")
_BULLET = re.compile(r"^[ \t]*(?:[-*+•o]|\(?\d{1,2}[.)]|#+|\.\.|@\w+)[ \t]+", re.MULTILINE)
_SENTENCE = re.compile(r"[\"'(]?[A-Za-z][^\n]*[a-z0-9)\"'\]][.!?:;]?[\"')]?")
_WORD = re.compile(r"[A-Za-z]{2,}")


def write_demo_corpus(output: Path, source: Path | None = None) -> str:
    """Write `OUTPUT/corpus.txt` and `OUTPUT/pairs/{train,dev,test}.tsv`; returns a line about them.

    Args:
        output: directory of the files.
        source: text or JSONL file that takes the place of the documentation of the standard library.

    Raises:
        MissingInputError: no such file, or this Python has no source of its standard library.
        DataError: the file holds too few documents for a task.
        UnsafeError: there is a corpus already.
    """
    target = output / CORPUS_FILE
    if target.exists():
        raise UnsafeError(f"{target}: exists; remove it or name another --output")
    documents = gather_documents() if source is None else read_own_documents(source)
    text = "\n\n".join("\n".join(sentences) for sentences in documents) + "\n"
    (output / PAIRS_DIRECTORY).mkdir(parents=True, exist_ok=True)
    counts = []
    for split, rows in make_pairs(documents).items():
        lines = "".join(f"{first}\t{second}\t{label}\n" for first, second, label in rows)
        write_file_durably(output / PAIRS_DIRECTORY / f"{split}.tsv", [lines.encode()])
        counts.append(f"{split} {len(rows)}")
    write_file_durably(target, [text.encode()])
    sentences = sum(map(len, documents))
    return (
        f"{target}: {len(documents)} documents, {sentences} sentences, {len(text.encode()) / 1e6:.1f} MB; "
        f"pairs: {', '.join(counts)}"
    )


def gather_documents() -> list[list[str]]:
    """Sentences of every module and topic, in a fixed order; sentences that were seen before are left out.

    Raises:
        MissingInputError: the standard library holds no readable source.
    """
    seen: set[str] = set()
    documents = []
    for text in (*_module_texts(), *_topic_texts()):
        fresh = []
        for sentence in clean_sentences(text):
            if sentence not in seen:
                seen.add(sentence)
                fresh.append(sentence)
        if len(fresh) >= _MIN_SENTENCES:
            documents.append(fresh)
    if not documents:
        raise MissingInputError(
            "demo-corpus: this Python carries no source of its standard library; install one that does"
        )
    return documents


def read_own_documents(path: Path) -> list[list[str]]:
    """Sentences of every document of a file, as `data_prep build` reads them.

    Raises:
        MissingInputError: no such file.
        DataError: too few documents.
    """
    if not path.is_file():
        raise MissingInputError(f"--input {path}: no such file")
    settings = BuildSettings()
    size = path.stat().st_size
    source = Source(str(path), detect_format(path, read_head(path), settings), size)
    documents = []
    for batch in read_documents(Part(source, 0, size), settings, Counter()):
        documents += [
            [" ".join(sentence.split()) for sentence in batch.sentences[begin:end]]
            for begin, end in pairwise(batch.ends)
        ]
    usable = [sentences for sentences in documents if len(sentences) >= _MIN_SENTENCES]
    if len(usable) < _MIN_DOCUMENTS:
        raise DataError(
            f"{path}: {len(usable)} documents of at least {_MIN_SENTENCES} sentences, the sentence-pair task needs "
            f"{_MIN_DOCUMENTS}; put a blank line between documents"
        )
    return usable


def _module_texts() -> Iterator[str]:
    """Documentation of each module of the standard library: docstrings and comments in their order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    for path in sorted(files, key=lambda path: path.as_posix()):
        if not any(part in _SKIPPED or part.startswith("config-") for part in path.parts):
            yield _module_text(root / path)


def _module_text(path: Path) -> str:
    """Docstrings and comment blocks of a source file as paragraphs, in the order of their lines."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
    found = [(_line(node), inspect.cleandoc(text)) for node in ast.walk(tree) if (text := _docstring(node))]
    found += _comment_blocks(source)
    return "\n\n".join(text for _, text in sorted(found))


def _docstring(node: ast.AST) -> str | None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.get_docstring(node, clean=False)
    return None


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def _comment_blocks(source: str) -> list[tuple[int, str]]:
    """Lines that are nothing but a comment, neighbours joined, with the line they begin on."""
    blocks: list[tuple[int, list[str]]] = []
    last = -1
    for number, line in enumerate(source.split("\n"), 1):
        text = line.lstrip()
        if not text.startswith("#"):
            continue
        if number == last + 1:
            blocks[-1][1].append(text.lstrip("#!: "))
        else:
            blocks.append((number, [text.lstrip("#!: ")]))
        last = number
    return [(number, "\n".join(texts)) for number, texts in blocks]


def _topic_texts() -> Iterator[str]:
    """The language reference that `help()` shows, one text per topic."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def clean_sentences(text: str) -> list[str]:
    """The sentences of a documentation text that read like prose; code, tables and markup are left out."""
    sentences = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if ">>>" in paragraph or "::=" in paragraph:
            continue
        plain = _MARKUP.sub(lambda match: match[1] or match[2] or match[3] or "", _BULLET.sub("", paragraph))
        split = split_sentences(" ".join(plain.split())).split("\n")
        sentences += [sentence.strip() for sentence in split if _is_prose(sentence)]
    return sentences


def _is_prose(sentence: str) -> bool:
    words = _WORD.findall(sentence)
    letters = sum(map(len, words))
    return (
        4 <= len(words) <= 80
        and bool(_SENTENCE.fullmatch(sentence.strip()))
        and letters + sentence.count(" ") > 0.85 * len(sentence)
        and "  " not in sentence
    )


def make_pairs(documents: Sequence[Sequence[str]]) -> dict[str, list[tuple[str, str, int]]]:
    """Rows (text, text, label) per split: 1 if the second text follows the first, 0 if from another document.

    Documents belong to one split only, so that nothing of the test is seen in training. Every first text occurs
    once with each label, and every second text too: neither text alone gives the label away.
    """
    rng = np.random.default_rng(0)
    order = rng.permutation(len(documents))
    splits: dict[str, list[tuple[str, str, int]]] = {}
    begin = 0.0
    for name, share in _SPLIT_SHARES:
        first, last = int(begin * len(order)), int((begin + share) * len(order))
        begin += share
        splits[name] = _pair_rows([documents[i] for i in order[first:last]], rng)
    return splits


def _pair_rows(documents: Sequence[Sequence[str]], rng: np.random.Generator) -> list[tuple[str, str, int]]:
    neighbours = []
    for index, sentences in enumerate(documents):
        step = 2 * _PAIR_SENTENCES
        for i in range(0, len(sentences) - step + 1, step):
            first = " ".join(sentences[i : i + _PAIR_SENTENCES])
            second = " ".join(sentences[i + _PAIR_SENTENCES : i + step])
            neighbours.append((index, first, second))
    owners = np.array([index for index, _, _ in neighbours])
    other = _derange(owners, rng)
    rows = [(first, second, 1) for _, first, second in neighbours]
    rows += [
        (first, neighbours[j][2], 0)
        for (_, first, _), j in zip(neighbours, other.tolist(), strict=True)
        if owners[j] >= 0
    ]
    return [rows[i] for i in rng.permutation(len(rows))]


def _derange(owners: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation that takes every index to one of another owner, as far as there are enough others."""
    order = np.arange(len(owners))
    rng.shuffle(order)
    for i in range(len(order)):
        tries = 0
        while owners[order[i]] == owners[i] and tries < 1000:
            j = int(rng.integers(len(order)))
            if owners[order[j]] != owners[i] and owners[order[i]] != owners[j]:
                order[i], order[j] = order[j], order[i]
            tries += 1
    return order
