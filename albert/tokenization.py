"""SentencePiece and WordPiece behind one small interface. Imports no torch.

SentencePiece follows ALBERT: quotes, NFKD, accents and case are normalised before the model sees the text, and a
piece that ends with a digit and a comma (`▁1999,`) is cut in two behind the model (google-research/albert
`tokenization.py`; the sentencepiece-based AlbertTokenizer of transformers 4 gives the same ids). Whether
case and accents are folded is read from the vocabulary itself: a vocabulary without one upper-case piece was
trained on lower-cased text. So training, data preparation and fine-tuning cannot disagree.

WordPiece gives the ids of Hugging Face's BertTokenizer. Text never yields a special token, whatever it says.
"""

from __future__ import annotations

import gc
import hashlib
import re
import struct
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from albert.blocks import ids_dtype
from albert.errors import DataError, MissingInputError

SENTENCEPIECE_FILE = "spiece.model"
WORDPIECE_FILE = "vocab.txt"
WORD_BOUNDARY = "\u2581"

_SPECIAL_PIECES = {
    "sentencepiece": ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"),
    "wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
}
_CASED_SHARE = 0.01
"""A vocabulary with more upper-case pieces than this is cased; BERT's uncased ones hold a handful, like <S>."""


_FLAT_BATCH = 8000
"""Texts that are encoded at once on the way to a flat array: few enough for the cache."""


class Tokenizer(ABC):
    """Text to ids and back; special tokens are never added here."""

    kind: Literal["sentencepiece", "wordpiece"]

    def __init__(self, path: Path, pieces: list[str]) -> None:
        """Find the special pieces of a vocabulary.

        Raises:
            DataError: a special piece is missing.
        """
        self.path = path
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.vocab_size = len(pieces)
        self._vocabulary = pieces
        index = {piece: i for i, piece in enumerate(pieces)}
        names = _SPECIAL_PIECES[self.kind]
        if missing := [name for name in names if name not in index]:
            raise DataError(
                f"{path}: the vocabulary lacks {', '.join(missing)}; ALBERT needs {', '.join(names)}, "
                "train one with `python -m data_prep tokenizer`"
            )
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (index[n] for n in names)

    @abstractmethod
    def _encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as the library gives them."""

    def _finish(
        self, ids: NDArray[Any], lengths: NDArray[np.int32]
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """What is left to do with the library's ids [tokens] and their number for each text [texts]."""
        return ids, lengths

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of ids; special tokens are left out."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        ids, lengths = self.encode_flat(texts)
        flat, ends = ids.tolist(), np.cumsum(lengths, dtype=np.int64).tolist()
        return [flat[begin:end] for begin, end in pairwise([0, *ends])]

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Ids of all texts in one array, [tokens] uint16 (uint32 for a large vocabulary), and lengths [texts]."""
        dtype = ids_dtype(self.vocab_size)
        # Millions of lists would make the collector look for cycles again and again; there are none.
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            parts = [
                self._finish(*_flatten(self._encode_rows(texts[start : start + _FLAT_BATCH]), dtype))
                for start in range(0, len(texts), _FLAT_BATCH)
            ] or [_flatten([], dtype)]
        finally:
            if was_enabled:
                gc.enable()
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise DataError(
                f"{self.path}: ids from {min(ids)} to {max(ids)} do not fit a vocabulary of {self.vocab_size}"
            )
        return [self._vocabulary[i] for i in ids]

    def special_ids(self) -> tuple[int, ...]:
        """Ids of pad, unk, cls, sep and mask."""
        return self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id

    @abstractmethod
    def word_start_table(self) -> NDArray[np.bool_]:
        """[vocab] True where a piece begins a word; special tokens are False, the unknown token is True."""

    @abstractmethod
    def ordinary_ids(self) -> NDArray[np.int64]:
        """Ids that text can yield, ascending: what a random replacement is drawn from."""


def _flatten(ids: list[list[int]], dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.int32]]:
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    flat = np.empty(int(lengths.sum(dtype=np.int64)), dtype)
    struct.pack_into(
        f"{len(flat)}{dtype.char}", flat.data, 0, *chain.from_iterable(ids)
    )  # faster than fromiter
    return flat, lengths


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with ALBERT's normalisation."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        """Load a model file.

        Raises:
            DataError: not a SentencePiece model, or a special piece is missing.
        """
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        try:
            proto.ParseFromString(path.read_bytes())
        except DecodeError:
            raise DataError(
                f"{path}: not a SentencePiece model; give a spiece.model or a vocab.txt"
            ) from None
        pieces, kinds = zip(*((piece.piece, piece.type) for piece in proto.pieces), strict=True)
        super().__init__(path, list(pieces))
        enum = sentencepiece_model_pb2.ModelProto.SentencePiece
        self._ordinary = [kind in (enum.NORMAL, enum.USER_DEFINED) for kind in kinds]
        text = [piece for piece, ordinary in zip(pieces, self._ordinary, strict=True) if ordinary]
        self.lower_case = not _is_cased(text)
        self.strip_accents = self.lower_case and not _has_accents("\n".join(text))
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        ends_numbered = [i for i, piece in enumerate(self._vocabulary) if ends_in_number_comma(piece)]
        self._number_commas = {i: self._cut_comma(self._vocabulary[i]) for i in ends_numbered}
        self._is_number_comma = np.zeros(self.vocab_size, np.bool_)
        self._is_number_comma[ends_numbered] = True

    def _encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        normal = normalise_texts(texts, self.lower_case, self.strip_accents)
        rows: list[list[int]] = self._processor.encode(normal, num_threads=1)
        return rows

    def _finish(
        self, ids: NDArray[Any], lengths: NDArray[np.int32]
    ) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Cut pieces such as `▁1999,` in two."""
        at = np.flatnonzero(self._is_number_comma[ids])
        if not len(at):
            return ids, lengths
        parts = [self._number_commas[i] for i in ids[at].tolist()]
        ids[at] = [part[0] for part in parts]
        more = np.array([len(part) - 1 for part in parts])
        text = np.searchsorted(np.cumsum(lengths, dtype=np.int64), at, side="right")
        grown = lengths + np.bincount(text, more, len(lengths)).astype(np.int32)
        return np.insert(ids, np.repeat(at + 1, more), [i for part in parts for i in part[1:]]), grown

    def _cut_comma(self, piece: str) -> list[int]:
        """Ids that ALBERT puts in the place of a piece such as `▁1999,`: those of the number, then the comma."""
        encode = self._processor.encode
        number = encode(piece[:-1].replace(WORD_BOUNDARY, ""), out_type=str)
        if not piece.startswith(WORD_BOUNDARY) and number[0].startswith(WORD_BOUNDARY):
            number = [number[0][1:], *number[1:]] if len(number[0]) > 1 else number[1:]
        return [self._processor.piece_to_id(part) for part in (*number, ",")]

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of ids; special tokens are left out."""
        return self._processor.decode([int(i) for i in ids])

    def word_start_table(self) -> NDArray[np.bool_]:
        """[vocab] True for pieces with the word boundary mark, punctuation, and scripts without spaces."""
        table = [
            ordinary and (piece.startswith(WORD_BOUNDARY) or _stands_alone(piece))
            for piece, ordinary in zip(self._vocabulary, self._ordinary, strict=True)
        ]
        table[self.unk_id] = True
        return np.array(table)

    def ordinary_ids(self) -> NDArray[np.int64]:
        """Ids that text can yield, ascending."""
        return np.flatnonzero(self._ordinary)


class WordPieceTokenizer(Tokenizer):
    """A BERT vocabulary, tokenised as Hugging Face's BertTokenizer does."""

    kind = "wordpiece"

    def __init__(self, path: Path) -> None:
        """Load a vocab.txt: one piece per line.

        Raises:
            DataError: not UTF-8, a piece twice, or a special piece is missing.
        """
        import tokenizers
        from tokenizers import models, normalizers, pre_tokenizers

        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 ({error.reason}); a vocab.txt has one piece per line"
            ) from None
        pieces = [line.rstrip("\r") for line in lines]
        while pieces and not pieces[-1]:
            pieces.pop()
        super().__init__(path, pieces)
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        if len(vocabulary) != len(pieces):
            twice = next(p for i, p in enumerate(pieces) if vocabulary[p] != i)
            raise DataError(f"{path}: piece '{twice}' stands on two lines; every piece needs one id")
        self.lower_case = not _is_cased([p for p in pieces if not _is_bracketed(p)])
        model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)  # noqa: S106
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=self.lower_case)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def _encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of one text and, for each, the characters of the text it covers."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of ids: `##` joined, Chinese without spaces; special tokens are left out."""
        special = set(self.special_ids()) - {self.unk_id}
        words = " ".join(p for i, p in zip(ids, self.pieces(ids), strict=True) if i not in special)
        text = words.replace(" ##", "")
        return re.sub(f"(?<=[{_NO_SPACES}]) (?=[{_NO_SPACES}])", "", text)

    def word_start_table(self) -> NDArray[np.bool_]:
        """[vocab] True for pieces without `##`."""
        table = np.array([not piece.startswith("##") for piece in self._vocabulary])
        table[[self.pad_id, self.cls_id, self.sep_id, self.mask_id]] = False
        return table

    def ordinary_ids(self) -> NDArray[np.int64]:
        """Ids that text can yield, ascending: no `[...]` pieces, and no `##` before a Chinese character."""
        return np.array([i for i, p in enumerate(self._vocabulary) if not _never_occurs(p)], np.int64)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from `spiece.model`, `vocab.txt`, or a directory that holds one of them.

    A directory may also be a dataset, which keeps its copy in `tokenizer/`. Another file name is read as a
    SentencePiece model where it ends with `.model` and as a vocabulary where it ends with `.txt`.

    Raises:
        MissingInputError: no such file, or the directory holds no tokenizer.
        DataError: the file is not what its name says.
    """
    file = find_tokenizer_file(Path(path))
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    if file.suffix == ".txt":
        return WordPieceTokenizer(file)
    raise DataError(f"{file}: a tokenizer is a SentencePiece .model or a WordPiece vocabulary .txt")


def find_tokenizer_file(path: Path) -> Path:
    """The tokenizer file that `path` means, see `load_tokenizer`.

    Raises:
        MissingInputError: there is none.
    """
    if path.is_file():
        return path
    for directory in (path, path / "tokenizer"):
        for name in (SENTENCEPIECE_FILE, WORDPIECE_FILE):
            if (directory / name).is_file():
                return directory / name
    if path.is_dir():
        raise MissingInputError(
            f"{path}: holds neither {SENTENCEPIECE_FILE} nor {WORDPIECE_FILE}, also not in its tokenizer/"
        )
    raise MissingInputError(
        f"{path}: no such tokenizer; give {SENTENCEPIECE_FILE}, {WORDPIECE_FILE} or a directory"
    )


def normalise_texts(texts: Sequence[str], lower_case: bool, strip_accents: bool) -> list[str]:
    """ALBERT's normalisation: TeX quotes, NFKD without accents, lower case.

    Texts are joined, so that every step is one call; ASCII and other texts apart, since ASCII is much faster.
    """
    others = [i for i, is_ascii in enumerate(map(str.isascii, texts)) if not is_ascii]
    if not others:
        return _normalise_joined(texts, lower_case, strip_accents=False)
    plain = list(texts)
    for i in others:
        plain[i] = ""
    done = _normalise_joined(plain, lower_case, strip_accents=False)
    for i, text in zip(
        others, _normalise_joined([texts[i] for i in others], lower_case, strip_accents), strict=True
    ):
        done[i] = text
    return done


def _normalise_joined(texts: Sequence[str], lower_case: bool, strip_accents: bool) -> list[str]:
    joined = "\n".join(texts)
    if joined.count("\n") != max(len(texts) - 1, 0):  # a line break inside a text; SentencePiece sees a space
        joined = "\n".join(text.replace("\n", " ") for text in texts)
    for space in _SPACES_TO_PYTHON_ONLY:
        joined = joined.replace(space, " ")
    for quote in ("``", "''"):
        if quote in joined:  # looking takes a tenth of the time of replacing nothing
            joined = joined.replace(quote, '"')
    if strip_accents:
        joined = _strip_accents(joined)
    if lower_case:
        joined = joined.lower()  # a capital sigma by its context, which a line break ends
    return joined.split("\n") if texts else []


def _strip_accents(text: str) -> str:
    """NFKD without combining characters (`unicodedata.combining`, as Google's code).

    They are dropped before NFKD as well as after it: the result is the same, and sorting a flood of them would take
    time that is quadratic in its length.
    """
    bare = _drop_combining(text)
    normal = unicodedata.normalize("NFKD", bare)
    return bare if normal == bare else _drop_combining(normal)


def _drop_combining(text: str) -> str:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    accents = _combining().take(codes, mode="clip")
    return codes[~accents].tobytes().decode("utf-32-le", "surrogatepass") if accents.any() else text


@cache
def _combining() -> NDArray[np.bool_]:
    """[code points] combining characters; no higher plane has any, and the last entry stands for all of them."""
    return np.array([unicodedata.combining(chr(code)) > 0 for code in range(0x20000)])


def ends_in_number_comma(piece: str) -> bool:
    """Whether a piece is like `▁1999,`, which ALBERT cuts in two."""
    return len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()


def _is_cased(pieces: Sequence[str]) -> bool:
    upper = sum(piece != piece.lower() for piece in pieces)
    return upper > _CASED_SHARE * len(pieces)


def _has_accents(text: str) -> bool:
    normal = unicodedata.normalize("NFKD", text)
    return _drop_combining(normal) != normal


def _is_bracketed(piece: str) -> bool:
    return len(piece) > 2 and piece[0] + piece[-1] in ("[]", "<>")


def _never_occurs(piece: str) -> bool:
    """Whether WordPiece never yields a piece: special, or a Chinese character inside a word (it stands alone)."""
    return _is_bracketed(piece) or bool(re.match("##[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]", piece))


def _stands_alone(piece: str) -> bool:
    """Whether a piece without a boundary mark begins a word: CJK and the like, or only punctuation."""
    if _NO_SPACES_START.match(piece):
        return True
    return all(unicodedata.category(char)[0] in "PS" for char in piece)


_NO_SPACES = (
    "\u3040-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Myanmar, Khmer
)
"""Scripts that are written without spaces, as a character class: each of their pieces begins a word."""

_NO_SPACES_START = re.compile(f"[{_NO_SPACES}]")
_SPACES_TO_PYTHON_ONLY = "\x0b\x1c\x1d\x1e\x1f\x85"
"""Characters at which ALBERT's `split()` divides words; SentencePiece would drop or keep them."""
