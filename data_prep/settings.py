"""What a build is asked to do: everything that decides the bytes of a dataset."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TextFormat = Literal["auto", "lines", "prose", "jsonl"]
PairAlgorithm = Literal["strict", "google", "albert_pytorch", "none"]

_ASCII = bytes(range(128))


def _check_encoding(name: str) -> None:
    """Files are cut into byte ranges at line ends, so ASCII bytes must mean themselves.

    Raises:
        ValueError: the encoding is unknown or is not like that.
    """
    try:
        keeps_ascii = _ASCII.decode(name) == _ASCII.decode("ascii")
    except LookupError:
        raise ValueError(f"no encoding '{name}' is known; for example utf-8, gb18030, latin-1") from None
    except UnicodeDecodeError:
        keeps_ascii = False
    if not keeps_ascii:
        raise ValueError(f"{name} does not keep ASCII bytes as they are; convert the files with iconv")


class BuildSettings(BaseModel):
    """All settings that change the output; the number of workers does not and is not here."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_seq_length: int = Field(default=512, ge=8, le=65535)
    """Tokens of the longest example, special tokens included."""
    dupe_factor: int = Field(default=1, ge=1, le=1000)
    """Passes over the text, each with other pairs and masks."""
    short_seq_prob: float = Field(default=0.1, ge=0, le=1)
    """Share of documents whose examples are shorter than max_seq_length."""
    masked_lm_prob: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that is predicted."""
    max_predictions_per_seq: int | None = Field(default=None, ge=1)
    """Most predictions of one example; default ceil(masked_lm_prob x max_seq_length)."""
    max_ngram: int = Field(default=3, ge=1, le=16)
    """Longest n-gram, in words."""
    favor_ngram: Literal["shorter", "longer"] = "shorter"
    """shorter: p(n) ~ 1/n as the paper; longer: the reverse."""
    pairs: PairAlgorithm = "strict"
    """Sentence pairs, by what becomes of a sentence that is alone. strict: joins the chunk before it, is split at a
    clause, or has no order; google: has no order; albert_pytorch: takes the next one in, or is dropped; none: all
    examples have one segment, masked-language-model only."""
    pack_short_documents: bool = False
    """Join short neighbouring documents, so that examples are longer."""
    whole_words: Literal["pieces", "none", "jieba"] = "pieces"
    """Units of masking. pieces: words as the tokenizer marks them (Chinese: characters); none: every token, as
    albert_pytorch; jieba: Chinese words (pip install jieba)."""
    format: TextFormat = "auto"
    """lines: one sentence per line, blank line between documents; prose: the same with sentence splitting;
    jsonl: one document per line; auto looks at each file."""
    text_key: str = "text"
    """Key of the text in JSONL."""
    encoding: str = "utf-8"
    """Encoding of the input files; any that keeps ASCII bytes as they are."""
    min_document_tokens: int = Field(default=4, ge=1)
    """Shorter documents are rejected."""
    eval_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of the documents, by hash of their text, that is held out for evaluation (one of a small corpus)."""
    dedup: Literal["none", "exact", "near"] = "none"
    """Drop repeated documents: the same text, or nearly the same (MinHash of word shingles)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Source of all randomness."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_encoding(self.encoding)
        limit = self.max_seq_length - 3
        if self.max_predictions_per_seq is not None and self.max_predictions_per_seq > limit:
            raise ValueError(
                f"--max-predictions-per-seq ({self.max_predictions_per_seq}) must be at most "
                f"--max-seq-length - 3 ({limit})"
            )
        return self

    @property
    def max_predictions(self) -> int:
        """Most predictions of one example, with the default filled in."""
        if self.max_predictions_per_seq is not None:
            return self.max_predictions_per_seq
        return math.ceil(self.masked_lm_prob * self.max_seq_length)
