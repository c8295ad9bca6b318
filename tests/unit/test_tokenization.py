"""Ids, pieces and words; that ids equal the originals' is mostly in test_tokenizer_parity.py."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from albert.errors import ConfigError, DataError, MissingInputError, UnsafeError
from albert.tokenization import (
    SentencePieceTokenizer,
    WordPieceTokenizer,
    load_tokenizer,
    normalise_texts,
)
from data_prep.cli import main
from data_prep.tokenizer import train_tokenizer
from tests.corpora import CHINESE, english_documents, english_tokenizer, wordpiece_vocabulary, write_english

ODD_TEXTS = [
    "",
    " ",
    "Ünïcödé ½ ﬁ",
    "İstanbul ΑΣΣ",
    "a\tb\u3000c",
    "``quoted''",
    "x" * 300,
    "e\u0301\u0301",
    "𠀀 😀 ok",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return english_tokenizer(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="module")
def spm(model: Path) -> SentencePieceTokenizer:
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> WordPieceTokenizer:
    tokenizer = load_tokenizer(wordpiece_vocabulary(tmp_path_factory.mktemp("wp") / "vocab.txt"))
    assert isinstance(tokenizer, WordPieceTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return [sentence for document in english_documents() for sentence in document]


def test_sentencepiece_equals_hugging_face_where_that_keeps_to_the_model(spm, model, sentences):
    """Transformers 5 puts a boundary mark behind every user symbol and does not split `1999,`: left out here."""
    from transformers import AlbertTokenizer

    reference = AlbertTokenizer.from_pretrained(str(model.parent))
    texts = [re.sub(r"[()\"\-.–£€]|''|``|\d+,", " ", text) for text in sentences]
    assert spm.encode_batch(texts) == reference(texts, add_special_tokens=False)["input_ids"]


def test_wordpiece_equals_hugging_face(wordpiece, sentences):
    from transformers import BertTokenizer

    reference = BertTokenizer(str(wordpiece.path))
    texts = [*sentences, *CHINESE.split("\n"), *ODD_TEXTS, "un[SE", "中文abc混合 unaffable walking"]
    assert wordpiece.encode_batch(texts) == reference(texts, add_special_tokens=False)["input_ids"]


def test_encode_flat_is_encode_batch_laid_end_to_end(spm, wordpiece, sentences):
    for tokenizer, texts in ((spm, sentences * 5), (wordpiece, CHINESE.split("\n"))):
        ids, lengths = tokenizer.encode_flat(texts)
        batch = tokenizer.encode_batch(texts)
        assert ids.dtype == np.uint16
        assert lengths.tolist() == [len(row) for row in batch]
        assert ids.tolist() == [i for row in batch for i in row]
    ids, lengths = spm.encode_flat([])
    assert (ids.size, lengths.size) == (0, 0)


def test_text_never_yields_a_special_token(spm, wordpiece):
    text = "[CLS] [SEP] [MASK] <pad> [PAD] [UNK] <unk> [unused1]"
    for tokenizer in (spm, wordpiece):
        special = set(tokenizer.special_ids()) - {tokenizer.unk_id}
        assert not special & set(tokenizer.encode_batch([text])[0])
    assert wordpiece.vocab_size == len(wordpiece.path.read_text().split("\n")) - 1


def test_special_ids_are_in_alberts_order(spm):
    assert spm.special_ids() == (0, 1, 2, 3, 4)
    assert spm.pieces(range(6)) == ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "("]


def test_normalisation_is_the_same_for_a_text_alone_and_in_a_batch():
    texts = [*ODD_TEXTS, "line\nbreak", "plain ascii"]
    alone = [normalise_texts([text], True, True)[0] for text in texts]
    assert normalise_texts(texts, True, True) == alone
    assert normalise_texts(["Ünï ``A'' ΑΣ"], True, True) == ['uni "a" ας']
    assert normalise_texts(["É"], False, False) == ["É"]


def test_sentencepiece_words_begin_at_marks_punctuation_and_characters_without_spaces(tmp_path):
    corpus = tmp_path / "zh.txt"
    corpus.write_text((CHINESE + "hello worlds, walking (slowly).\n") * 20)
    tokenizer = load_tokenizer(train_tokenizer([str(corpus)], tmp_path / "tok", 140))
    ids = tokenizer.encode_batch(["walking worlds, 天下"])[0]
    table = tokenizer.word_start_table()
    for piece, start in zip(tokenizer.pieces(ids), table[ids], strict=True):
        expected = piece[0] == "\u2581" or piece == "," or "\u4e00" <= piece[0] <= "\u9fff"
        assert bool(start) == expected, piece
    assert not table[[0, 2, 3, 4]].any()
    assert table[tokenizer.unk_id]


def test_wordpiece_words_begin_without_hashes(wordpiece):
    ids = wordpiece.encode_batch(["unaffable 天下 walking!"])[0]
    assert wordpiece.pieces(ids) == ["un", "##aff", "##able", "天", "下", "walk", "##ing", "!"]
    assert wordpiece.word_start_table()[ids].tolist() == [True, False, False, True, True, True, False, True]


def test_ordinary_ids_are_what_text_can_yield(spm, wordpiece):
    assert spm.ordinary_ids().tolist() == list(range(5, spm.vocab_size))
    pieces = wordpiece.pieces(wordpiece.ordinary_ids().tolist())
    assert not any(piece.startswith("[") and len(piece) > 1 for piece in pieces)
    assert not any(re.match("##[\u4e00-\u9fff]", piece) for piece in pieces)
    assert "##able" in pieces
    assert "天" in pieces


def test_decode_reads_back(spm, wordpiece):
    assert spm.decode(spm.encode_batch(["Hello World, in (1999)."])[0]) == "hello world, in (1999)."
    ids = [wordpiece.cls_id, *wordpiece.encode_batch(["unaffable world 天下大势"])[0], wordpiece.sep_id]
    assert wordpiece.decode(ids) == "unaffable world 天下大势"


def test_case_follows_the_vocabulary(tmp_path, spm, wordpiece):
    assert (spm.lower_case, spm.strip_accents, wordpiece.lower_case) == (True, True, True)
    corpus = write_english(tmp_path / "text.txt")
    cased = load_tokenizer(train_tokenizer([str(corpus)], tmp_path / "cased", 1000, cased=True))
    assert (cased.lower_case, cased.strip_accents) == (False, False)
    assert any(piece != piece.lower() for piece in cased.pieces(cased.encode_batch(["The Class"])[0]))
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the"]))
    assert load_tokenizer(vocabulary).encode_batch(["The the"]) == [[5, 6]]


def test_a_tokenizer_is_found_in_directories(model, spm, wordpiece, tmp_path):
    assert load_tokenizer(model.parent).sha256 == spm.sha256
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_bytes(wordpiece.path.read_bytes())
    assert load_tokenizer(tmp_path).kind == "wordpiece"


def test_training_gives_the_same_bytes_twice(tmp_path):
    corpus = write_english(tmp_path / "text.txt")
    first, second = (train_tokenizer([str(corpus)], tmp_path / name, 700) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.model", None, MissingInputError, "no such tokenizer"),
        ("bad.model", b"not a model at all", DataError, "not a SentencePiece model"),
        ("vocab.txt", b"a\nb\n", DataError, r"lacks \[PAD\]"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", DataError, "'a' stands on two lines"),
        ("vocab.txt", b"\xff\xfe", DataError, "not UTF-8"),
        ("tokenizer.json", b"{}", DataError, "SentencePiece .model or a WordPiece vocabulary"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_tokenizer(tmp_path / name)


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"holds neither spiece.model nor vocab.txt"):
        load_tokenizer(tmp_path)


def test_ids_outside_the_vocabulary_are_named(spm):
    with pytest.raises(DataError, match="do not fit a vocabulary of 2000"):
        spm.pieces([5, 2000])


def test_training_refuses_what_cannot_work(tmp_path):
    corpus = write_english(tmp_path / "text.txt")
    with pytest.raises(
        ConfigError, match=r"--vocab-size 900000: too large for this text, which yields at most \d+"
    ):
        train_tokenizer([str(corpus)], tmp_path / "t", 900_000)
    with pytest.raises(
        ConfigError,
        match=r"--vocab-size 20: too small for the characters of this text, which need \d+ pieces; ask",
    ):
        train_tokenizer([str(corpus)], tmp_path / "t", 20)
    assert not (tmp_path / "t").exists()
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(MissingInputError, match="holds no text"):
        train_tokenizer([str(tmp_path / "empty.txt")], tmp_path / "t", 100)
    train_tokenizer([str(corpus)], tmp_path / "t", 500)
    with pytest.raises(UnsafeError, match="exists; remove it"):
        train_tokenizer([str(corpus)], tmp_path / "t", 500)


def test_the_number_of_pieces_that_the_characters_need_is_enough(tmp_path):
    corpus = write_english(tmp_path / "text.txt")
    with pytest.raises(ConfigError) as caught:
        train_tokenizer([str(corpus)], tmp_path / "t", 20)
    needed = int(str(caught.value).split("which need ")[1].split()[0])
    with pytest.raises(ConfigError, match=f"too small .* which need {needed} pieces"):
        train_tokenizer([str(corpus)], tmp_path / "t", needed - 1)
    assert load_tokenizer(train_tokenizer([str(corpus)], tmp_path / "t", needed)).vocab_size == needed


def test_a_vocabulary_that_is_fitted_takes_what_the_text_yields(tmp_path):
    (tmp_path / "small.txt").write_text(
        "\n".join(f"{word} goes there." for word in ODD_TEXTS[:3] * 9) + CHINESE
    )
    small = load_tokenizer(
        train_tokenizer([str(tmp_path / "small.txt")], tmp_path / "s", 4000, fits_text=True)
    )
    assert 100 < small.vocab_size < 1000
    assert small.unk_id not in small.encode_batch(["天下大势，分久必合"])[0]
    corpus = write_english(tmp_path / "text.txt")
    exact, fitted = (
        load_tokenizer(train_tokenizer([str(corpus)], tmp_path / name, 500, fits_text=fits))
        for name, fits in (("exact", False), ("fitted", True))
    )
    assert exact.vocab_size == 500
    assert exact.pieces(range(500)) == fitted.pieces(range(500))


def test_rare_characters_are_left_out_where_not_all_fit(tmp_path):
    common = "天地玄黄宇宙洪荒"
    rare = "".join(map(chr, range(0x4F00, 0x4F00 + 60)))
    (tmp_path / "zh.txt").write_text("\n".join([common * 50] * 20 + [rare]) + "\n")
    files = [str(tmp_path / "zh.txt")]
    with pytest.raises(ConfigError, match="too small for the characters of this text"):
        train_tokenizer(files, tmp_path / "t", 40)
    tokenizer = load_tokenizer(train_tokenizer(files, tmp_path / "t", 40, fits_text=True))
    assert tokenizer.vocab_size <= 40
    assert tokenizer.unk_id not in tokenizer.encode_batch([common])[0]
    assert tokenizer.unk_id in tokenizer.encode_batch([rare])[0]
    message = (
        "--vocab-size 15: too small even for the characters that make up 98 % of this text; ask for more"
    )
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(files, tmp_path / "u", 15, fits_text=True)
    with pytest.raises(ConfigError, match=r"--character-coverage 0\.5: must be from 0\.98 to 1"):
        train_tokenizer(files, tmp_path / "u", 40, character_coverage=0.5)


@pytest.mark.parametrize(
    ("name", "data", "advice"),
    [
        (
            "a.jsonl",
            b'{"body": "Some words."}\n' * 4,
            "4 of 4 documents have no text under --text-key text: give the right",
        ),
        (
            "a.txt",
            CHINESE.encode("gb18030"),
            "2 of 2 documents are not in --encoding utf-8: give the right one",
        ),
    ],
)
def test_where_nothing_can_be_read_the_option_is_named(tmp_path, name, data, advice):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MissingInputError) as caught:
        train_tokenizer([str(tmp_path / name)], tmp_path / "t", 100)
    assert f"holds no text to learn from; {advice}" in str(caught.value)


def test_the_command_reads_what_build_reads(tmp_path, monkeypatch, capsys):
    (tmp_path / "zh.txt").write_bytes(CHINESE.encode("gb18030"))
    rows = "".join(json.dumps({"body": line}) + "\n" for line in CHINESE.split("\n"))
    (tmp_path / "zh.jsonl").write_text(rows)
    for name, options in (("zh.txt", ["--encoding", "gb18030"]), ("zh.jsonl", ["--text-key", "body"])):
        words = [
            "--input",
            str(tmp_path / name),
            "--output",
            str(tmp_path / "t"),
            "--vocab-size",
            "900",
            "--fit",
        ]
        monkeypatch.setattr(sys, "argv", ["data_prep", "tokenizer", *words, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        size = load_tokenizer(tmp_path / "t").vocab_size
        assert 100 < size < 900
        assert capsys.readouterr().out == f"{tmp_path}/t/spiece.model: {size} pieces\n"
        (tmp_path / "t/spiece.model").unlink()
    monkeypatch.setattr(sys, "argv", ["data_prep", "tokenizer", *words, "--encoding", "utf-16"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 78
    assert "utf-16 does not keep ASCII bytes" in capsys.readouterr().err
