"""English text that every Python carries: documentation of the standard library, for a first try without a network.

Docstrings, block comments and the language reference of `pydoc` are cleaned into sentences: one per line, a blank
line between documents (one document per module or topic). A sentence-pair task is made from the same text in the
form of LCQMC: does the second text continue the first, or the first the second? The texts are the first two
sentences of a docstring. The same Python gives the same bytes.

Any other text file can take the place of the documentation. The order of its sentences says too little to a small
model, so the question is then which of two neighbouring sentences is as it was written: in the other one every
third word has been replaced.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from albert.durable_files import write_file_durably
from albert.errors import DataError, MissingInputError, UnsafeError
from data_prep.cleaning import split_sentences
from data_prep.corpus import read_documents
from data_prep.plan import Part, find_sources
from data_prep.settings import BuildSettings

CORPUS_FILE = "corpus.txt"
PAIRS_DIRECTORY = "pairs"
_SKIPPED = ("site-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo", "encodings", "__phello__")
_MIN_SENTENCES = 4
_TAMPERED_PART = 3
_MAX_PAIRS = 100
"""Pairs of one document of a user's own text"""
_MIN_DOCUMENTS = 40
"""Fewer cannot be divided into train, dev and test with other documents to choose from in each."""
_SPLIT_SHARES = (("train", 0.8), ("dev", 0.1), ("test", 0.1))

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
        DataError: the file holds too little for a task.
        UnsafeError: there is a corpus already.
    """
    target = output / CORPUS_FILE
    if target.exists():
        raise UnsafeError(f"{target}: exists; remove it or name another --output")
    documents, pairs = standard_library() if source is None else read_own_documents(source)
    splits = split_pairs(pairs)
    if not all(splits.values()):
        raise DataError(
            f"{source}: the sentence-pair task needs neighbouring sentences that differ; give text that varies more"
        )
    text = "\n\n".join("\n".join(sentences) for sentences in documents) + "\n"
    (output / PAIRS_DIRECTORY).mkdir(parents=True, exist_ok=True)
    counts = []
    for split, rows in splits.items():
        lines = "".join(f"{first}\t{second}\t{label}\n" for first, second, label in rows)
        write_file_durably(output / PAIRS_DIRECTORY / f"{split}.tsv", [lines.encode()])
        counts.append(f"{split} {len(rows)}")
    write_file_durably(target, [text.encode()])
    sentences = sum(map(len, documents))
    return (
        f"{target}: {len(documents)} documents, {sentences} sentences, {len(text.encode()) / 1e6:.1f} MB; "
        f"pairs: {', '.join(counts)}"
    )


Pair = tuple[str, str]
"""Two texts that follow each other, or one as it was written and one that was tampered with"""
Corpus = tuple[list[list[str]], list[list[Pair]]]
"""Sentences of each document, and the pairs of each document"""


@dataclass(frozen=True)
class Text:
    """A docstring, a block of comments, or a topic of the reference."""

    line: int
    is_docstring: bool
    text: str


def standard_library() -> Corpus:
    """Sentences and pairs of every module and topic, in a fixed order.

    Raises:
        MissingInputError: the standard library holds no readable source.
    """
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted((path.relative_to(root) for path in root.rglob("*.py")), key=lambda path: path.as_posix())
    kept = [path for path in files if not any(p in _SKIPPED or p.startswith("config-") for p in path.parts)]
    modules = [_module_texts(root / path) for path in kept]
    if not any(modules):
        raise MissingInputError(
            "demo-corpus: this Python carries no source of its standard library; install one that does"
        )
    sentences = document_sentences([*modules, *([Text(0, False, topics[name])] for name in sorted(topics))])
    return sentences, docstring_pairs(modules)


def docstring_pairs(modules: Sequence[Sequence[Text]]) -> list[list[Pair]]:
    """The first two sentences of every docstring that has two, by module; none twice."""
    seen: set[Pair] = set()
    found = []
    for texts in modules:
        starts = [clean_sentences(text.text)[:2] for text in texts if text.is_docstring]
        pairs = dict.fromkeys((s[0], s[1]) for s in starts if len(s) == 2)
        found.append([pair for pair in pairs if pair not in seen])
        seen.update(pairs)
    return found


def document_sentences(documents: Sequence[Sequence[Text]]) -> list[list[str]]:
    """Sentences of each document; what was seen before is left out, and so are documents that hold little else."""
    seen: set[str] = set()
    found = []
    for texts in documents:
        sentences = dict.fromkeys(s for text in texts for s in clean_sentences(text.text) if s not in seen)
        seen.update(sentences)
        if len(sentences) >= _MIN_SENTENCES:
            found.append(list(sentences))
    return found


def read_own_documents(path: Path) -> Corpus:
    """Sentences of every document of a file, as `data_prep build` reads them, and pairs made from them.

    Raises:
        MissingInputError: no such file.
        DataError: too few documents, or UTF-16.
    """
    settings = BuildSettings()
    (source,) = find_sources([str(path)], (), settings)
    documents, counts = [], Counter[str]()
    for batch in read_documents(Part(source, 0, source.bytes), settings, counts):
        documents += [
            [" ".join(sentence.split()) for sentence in batch.sentences[begin:end]]
            for begin, end in pairwise(batch.ends)
        ]
    different = dict.fromkeys(map(tuple, documents))  # a repeated one would be held out and learned
    usable = [list(sentences) for sentences in different if len(sentences) >= _MIN_SENTENCES]
    if len(usable) < _MIN_DOCUMENTS:
        is_undecodable = counts["rejected.invalid_encoding"] > 0
        advice = "convert it to UTF-8" if is_undecodable else "put a blank line between documents"
        raise DataError(
            f"{path}: {len(usable)} documents of at least {_MIN_SENTENCES} sentences, none counted twice; the demo "
            f"needs {_MIN_DOCUMENTS}; {advice}"
        )
    return usable, tampered_pairs(usable)


def tampered_pairs(documents: Sequence[Sequence[str]]) -> list[list[Pair]]:
    """Neighbouring sentences of every document, the second with every third word replaced.

    The replacements are drawn from the distinct words of all documents; a text without spaces is taken as characters.
    """
    vocabulary = sorted({word for sentences in documents for text in sentences for word in _words(text)[0]})
    rng = np.random.default_rng(0)
    found = []
    for sentences in documents:
        neighbours = list(zip(sentences[0::2], sentences[1::2], strict=False))[:_MAX_PAIRS]
        found.append([(first, _tamper(second, vocabulary, rng)) for first, second in neighbours])
    return found


def _tamper(text: str, vocabulary: Sequence[str], rng: np.random.Generator) -> str:
    words, separator = _words(text)
    chosen = rng.choice(len(words), -(-len(words) // _TAMPERED_PART), replace=False)
    for position, word in zip(chosen, rng.integers(len(vocabulary), size=len(chosen)), strict=True):
        words[position] = vocabulary[word]
    return separator.join(words)


def _words(text: str) -> tuple[list[str], str]:
    """Words and what joins them."""
    return (text.split(), " ") if " " in text else (list(text), "")


def _module_texts(path: Path) -> list[Text]:
    """Docstrings and blocks of comments of a source file, in the order of their lines."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    found = [
        Text(getattr(node, "lineno", 0), True, inspect.cleandoc(text))
        for node in ast.walk(tree)
        if (text := _docstring(node))
    ]
    return sorted(found + _comment_blocks(source), key=lambda text: (text.line, text.text))


def _docstring(node: ast.AST) -> str | None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.get_docstring(node, clean=False)
    return None


def _comment_blocks(source: str) -> list[Text]:
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
    return [Text(number, False, "\n".join(texts)) for number, texts in blocks]


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


def split_pairs(documents: Sequence[Sequence[Pair]]) -> dict[str, list[tuple[str, str, int]]]:
    """Rows (text, text, label) per split: 1 if the second text continues the first, 0 if it is the other way round.

    Every pair occurs in both orders, so the classes are balanced. A document belongs to one split only, so that
    nothing of the test is seen in training.
    """
    groups = [pairs for pairs in documents if pairs]
    rng = np.random.default_rng(0)
    order = rng.permutation(len(groups))
    splits: dict[str, list[tuple[str, str, int]]] = {}
    begin = 0.0
    for name, share in _SPLIT_SHARES:
        chosen = order[round(begin * len(order)) : round((begin + share) * len(order))]
        begin += share
        pairs = [pair for i in chosen for pair in groups[i] if pair[0] != pair[1]]
        rows = [(first, second, 1) for first, second in pairs] + [
            (second, first, 0) for first, second in pairs
        ]
        splits[name] = [rows[i] for i in rng.permutation(len(rows))]
    return splits
