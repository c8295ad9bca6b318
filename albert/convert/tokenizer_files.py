"""Tokenizer files from which `AutoTokenizer` gives the same ids as this project.

SentencePiece models need a tokenizer.json of our own: the library's conversion of a bare spiece.model takes
user-defined symbols such as `(` out of the text before the spaces are marked, and keeps the pieces `1999,` that
ALBERT never uses. That changed the ids of 36 % of 8,215 paragraphs of English speeches; with this file 2 differ,
where SentencePiece's single-precision sum decides between equal or nearly equal splits (`ff|f`, `f|ff`); 5 of
25,037 lines of technical documentation and none of 21,796 lines of Chinese. A word's last capital sigma also
differs, where a model has Greek pieces: the library lowers letter by letter.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from albert.durable_files import write_file_durably
from albert.pretrained import copy_tokenizer
from albert.tokenization import (
    SentencePieceTokenizer,
    Tokenizer,
    ends_in_number_comma,
    load_tokenizer,
)

_NEVER = 100.0
"""Taken from the score of a piece that shall not be used; scores are log probabilities, at least about -20."""


def write_tokenizer_files(source: Path, directory: Path, max_length: int) -> None:
    """Write the tokenizer, tokenizer_config.json and, for SentencePiece, tokenizer.json."""
    copy = copy_tokenizer(source, directory)
    tokenizer = load_tokenizer(copy)
    if isinstance(tokenizer, SentencePieceTokenizer):
        _write_json(directory / "tokenizer.json", _sentencepiece_json(tokenizer))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(tokenizer, max_length))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    write_file_durably(path, [text.encode()])


def _tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    is_sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    config: dict[str, Any] = {
        "tokenizer_class": "AlbertTokenizer" if is_sentencepiece else "BertTokenizer",
        "do_lower_case": tokenizer.lower_case,  # type: ignore[attr-defined]
        "model_max_length": max_length,
        # AlbertTokenizer of transformers 5 leaves the types of a pair out unless told otherwise.
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, tokenizer.pieces(tokenizer.special_ids()), strict=True)),
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        config["keep_accents"] = not tokenizer.strip_accents
    else:
        config["tokenize_chinese_chars"] = True
    return config


def _sentencepiece_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The model as a tokenizer.json of the `tokenizers` library."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.path.read_bytes())
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(tokenizer, i) for i in sorted(tokenizer.special_ids())],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(tokenizer, proto)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]},
        "post_processor": _post_processor(tokenizer),
        "decoder": spaces,
        "model": {
            "type": "Unigram",
            "unk_id": tokenizer.unk_id,
            "byte_fallback": False,
            "vocab": [[piece.piece, _score(piece)] for piece in proto.pieces],
        },
    }


def _score(piece: Any) -> float:
    """The piece's score; so low for `1999,`, which ALBERT cuts behind the model, that no split takes it."""
    return float(piece.score) - (_NEVER if ends_in_number_comma(piece.piece) else 0.0)


def _added_token(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": tokenizer.pieces([token_id])[0], "special": True, **flags}


def _normalizers(tokenizer: SentencePieceTokenizer, proto: Any) -> list[dict[str, Any]]:
    """Quotes, accents, case, and the character map of the SentencePiece model."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": quote}, "content": '"'} for quote in ("``", "''")
    ]
    if tokenizer.strip_accents:
        steps += [{"type": "NFKD"}, {"type": "StripAccents"}]
    if tokenizer.lower_case:
        steps += [{"type": "Lowercase"}]
    if characters := proto.normalizer_spec.precompiled_charsmap:
        encoded = base64.b64encode(characters).decode("ascii")
        steps += [{"type": "Precompiled", "precompiled_charsmap": encoded}]
    return steps


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any]:
    """`[CLS] A [SEP]` of type 0 and `B [SEP]` of type 1."""
    ids = {"cls": tokenizer.cls_id, "sep": tokenizer.sep_id}
    names = {key: tokenizer.pieces([value])[0] for key, value in ids.items()}

    def special(key: str, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": names[key], "type_id": type_id}}

    def text(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    single = [special("cls", 0), text("A", 0), special("sep", 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), special("sep", 1)],
        "special_tokens": {
            names[key]: {"id": names[key], "ids": [ids[key]], "tokens": [names[key]]} for key in ids
        },
    }
