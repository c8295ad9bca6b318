"""Text that breaks parsers, in any amount: `python -m tests.hostile DOCUMENTS FILE` writes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Generator = np.random.Generator


def _random_bytes(rng: Generator) -> bytes:
    return rng.bytes(int(rng.integers(1, 300)))


def _broken_utf8(rng: Generator) -> bytes:
    return ("Wörter und 天下 ok. " * 30).encode()[: int(rng.integers(1, 200))] + b"\xff\xc3(\xed\xa0\x80\xf8"


def _floods(rng: Generator) -> bytes:
    marks = [
        "\x00",
        "\u202e",
        "\u200b",
        "\u0301\u0323",
        "\ufeff",
        "\ufffd",
        "\u2028",
        "\x85",
        "\r",
        "\x1b[31m",
        "\u200d",
    ]
    return "".join(rng.choice(marks) * int(rng.integers(1, 400)) + "a b. " for _ in range(5)).encode()


def _characters(rng: Generator) -> bytes:
    codes = rng.integers(1, 0x10FFFF, int(rng.integers(1, 200)))
    return "".join(chr(c) for c in codes.tolist()).encode("utf-8", "surrogatepass")


def _scripts(rng: Generator) -> bytes:
    starts = rng.choice([0x0E01, 0x0590, 0x0621, 0x0905, 0x1F600, 0x3042, 0xAC00, 0x20000, 0xFB00, 0xE000], 3)
    return " ".join(
        "".join(chr(s + i % 30) for i in range(int(rng.integers(1, 90)))) for s in starts.tolist()
    ).encode()


def _special_tokens(rng: Generator) -> bytes:
    tokens = ["[CLS]", "[SEP]", "[MASK]", "<pad>", "<unk>", "[unused1]", "\u2581", "##a", "</s>", ",", "."]
    return " ".join(rng.choice(tokens, int(rng.integers(1, 80)))).encode()


def _long_words(rng: Generator) -> bytes:
    return (
        str(rng.choice(["x", "ab", "天", "\u0e01", "1,", "\u0301"])) * int(rng.integers(1000, 30_000))
    ).encode()


def _refrain(rng: Generator) -> bytes:
    return b"La la la, la.\n" * int(rng.integers(1, 60))


def _tiny(rng: Generator) -> bytes:
    return bytes([int(rng.integers(32, 127))])


def _json(rng: Generator) -> bytes:
    texts = [
        b'{"text": "a\\ud800b"}',
        b'{"text": 1}',
        b'{"text":',
        b"[" * 5000,
        b'{"text": "Fine. Good."}',
        b"null",
    ]
    return texts[int(rng.integers(len(texts)))]


_KINDS: tuple[Callable[[Generator], bytes], ...] = (
    _random_bytes, _broken_utf8, _floods, _characters, _scripts, _special_tokens, _refrain, _tiny, _json,
)  # fmt: skip


def hostile_documents(count: int, seed: int = 0) -> Iterator[bytes]:
    """Documents of every kind in turn; one in 200 has a word without end."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield _long_words(rng) if i % 200 == 199 else _KINDS[i % len(_KINDS)](rng)


def write_hostile(path: Path, count: int, long_line_bytes: int, one_character_documents: int) -> Path:
    """Hostile documents, one line that is too long for anything, and a flood of tiny documents."""
    with path.open("wb") as file:
        for i, document in enumerate(hostile_documents(count)):
            file.write(document + (b"\n" if i % 7 == 0 else b"\n\n"))
        file.write(("y\u0301z" * (long_line_bytes // 4)).encode() + b"\n\n")
        file.write(b"q\n\n" * one_character_documents)
        file.write(b"This sentence is as it should be, with enough words. And so is this one here.\n" * 50)
    return path


if __name__ == "__main__":
    write_hostile(Path(sys.argv[2]), int(sys.argv[1]), 50_000_000, 100_000)
