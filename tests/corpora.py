"""Real text for tests: the language reference that every Python carries, and a little Chinese."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from data_prep.demo_corpus import clean_sentences
from data_prep.tokenizer import train_tokenizer

CHINESE = """话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚汉分争，又并入于汉。
汉朝自高祖斩白蛇而起义，一统天下，后来光武中兴，传至献帝，遂分为三国。推其致乱之由，殆始于桓灵二帝。

且说那一日，众人在园中饮酒，忽听得外面有人高声叫道：今天天气很好，我们一起去公园散步吧！
大家听了，都笑起来，说道：中华人民共和国首都北京市，是一个历史悠久的城市。
"""


@cache
def english_documents() -> tuple[tuple[str, ...], ...]:
    """Sentences of each topic of the language reference, about 300 kB."""
    from pydoc_data.topics import topics

    documents = [tuple(clean_sentences(topics[name])) for name in sorted(topics)]
    return tuple(document for document in documents if len(document) >= 4)


def write_english(path: Path) -> Path:
    """One sentence per line, blank lines between documents."""
    path.write_text("\n\n".join("\n".join(document) for document in english_documents()) + "\n")
    return path


def english_tokenizer(directory: Path, vocab_size: int = 2000) -> Path:
    """A SentencePiece model of that text."""
    corpus = write_english(directory / "english-for-tokenizer.txt")
    return train_tokenizer([str(corpus)], directory / "tokenizer", vocab_size)


def wordpiece_vocabulary(path: Path) -> Path:
    """A small BERT vocabulary: letters, some words, and the characters of CHINESE."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["the", "un", "##aff", "##able", "##ing", "walk", "##ed", "token", "##s", "hello", "world"]
    marks = list(".,!?;:()[]\"'-，。！？：、")
    characters = sorted({c for c in CHINESE if "\u4e00" <= c <= "\u9fff"})
    pieces = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *marks, *letters]
    pieces += [f"##{c}" for c in letters] + words + characters + [f"##{c}" for c in characters[:5]]
    path.write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    return path


def fingerprint(directory: Path) -> str:
    """Hash of names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(directory)).encode() + path.read_bytes())
    return digest.hexdigest()
