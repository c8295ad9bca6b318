"""Ids equal those of Google's SentencePiece code and of Hugging Face, on real-looking and on hostile text.

Transformers 5 builds AlbertTokenizer on another library than ALBERT did (user symbols are cut out before spaces are
marked, scores are summed in double precision, a capital sigma is lowered letter by letter, `1999,` stays whole), so
the SentencePiece reference is google-research/albert `tokenization.py` step by step, on the sentencepiece library.
"""

from __future__ import annotations

import io
import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece

from albert.tokenization import SentencePieceTokenizer, WordPieceTokenizer, load_tokenizer
from data_prep.tokenizer import train_tokenizer
from tests.corpora import CHINESE, english_documents, wordpiece_vocabulary, write_english

NUMBERS = """In 1999, and in 2010, the 5, 10,000, and 100,000 voters of 1999, paid $5,000, or 7,7,7, each.
On July 4, 1776, 56 men signed; by 1999,2000, and 2010, none of the 10, or of the 1,000, were left.
Costs: 5, 10, 15, and 1999, units (in 2010, prices), see p. 10,f. and table 5,6 of 1999,.
"""
BITS = [
    *("1999,", "10,000,", "5,", "00,", "²,", "①,", "٣,", "१२,", "，", "3，4", "🄁", ",", "0", "9"),
    *("``", "''", "`'", "'", "(", ")", '"', "-", ".", "–", "£", "€", "…", "—", "<", "##ing", "[CLS", "SEP]"),
    *("\u2581", " ", "  ", "\t", "\n", "\r", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u3000"),
    *("\u200b", "\u200d", "\ufeff", "\u2028", "\u2029", "\u00ad", "\0", "\ufffd", "\U000e0041"),
    *("é", "É", "e\u0301\u0323", "\u0301", "ΑΣ", "Σ", "ς", "İ", "I", "ß", "ẞ", "ﬁ", "½", "㎏", "Ⅳ", "ǅ"),
    *("가", "각", "中", "国", "天", "𠀀", "😀", "👩\u200d👧", "ไทย", "لا", "ﷺ", "क्षि"),
    *("word", "The", "class", "running", "don't", "U.S.", "a", "x" * 120),
]


def hostile_texts(count: int) -> list[str]:
    """Texts of random pieces of trouble, a few of them long, the same in every run."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 14) for _ in range(count)] + [2000, 3000]
    return ["".join(draw.choice(BITS) + draw.choice(("", "", " ")) for _ in range(n)) for n in lengths]


def every_character() -> list[str]:
    """A text around each assigned character below U+3400, the marks and forms up to U+FFFF, and some emoji."""
    codes = [*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10000), *range(0x1F000, 0x1F700)]
    assigned = [chr(code) for code in codes if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")]
    return [f"a{char}b {char} the{char} 1{char}, 2{char}5, {char}(x)" for char in assigned]


@pytest.fixture(scope="module")
def numbers_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with pieces such as `▁1999,`, with and without a boundary mark, as ALBERT's own has 141."""
    text = [sentence.lower() for document in english_documents()[:20] for sentence in document]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([*text, *NUMBERS.lower().split("\n") * 40]),
        model_writer=model,
        vocab_size=700,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        user_defined_symbols=["(", ")", '"', "-", ".", "–", "£", "€"],
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("numbers") / "spiece.model"
    path.write_bytes(_with_number_pieces(model.getvalue()))
    return path


def _with_number_pieces(model: bytes) -> bytes:
    """Turn the last pieces into `▁1999,` and the like: a trained model need not have kept them."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    have = {piece.piece for piece in proto.pieces}
    wanted = ["\u25811999,", "\u25815,", "\u258110,", "000,", "00,", "1,", "\u25812010,", "٣,", ",0"]
    missing = [piece for piece in wanted if piece not in have]
    for target, piece in zip(list(proto.pieces)[-len(missing) :], missing, strict=True):
        target.piece, target.score = piece, -5.0
    return proto.SerializeToString()


def google_ids(processor: sentencepiece.SentencePieceProcessor, text: str, cased: bool) -> list[int]:
    """google-research/albert tokenization.py: preprocess_text, encode_pieces, PieceToId.

    Cased means do_lower_case=False and keep_accents=True of transformers 4's AlbertTokenizer.
    """
    text = " ".join(text.strip().split()).replace("``", '"').replace("''", '"')
    if not cased:
        text = unicodedata.normalize("NFKD", text)
        text = "".join(char for char in text if not unicodedata.combining(char)).lower()
    pieces = []
    for piece in processor.encode(text, out_type=str):
        if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
            inner = processor.encode(piece[:-1].replace("\u2581", ""), out_type=str)
            if piece[0] != "\u2581" and inner[0][0] == "\u2581":
                inner = inner[1:] if len(inner[0]) == 1 else [inner[0][1:], *inner[1:]]
            pieces += [*inner, piece[-1]]
        else:
            pieces.append(piece)
    return [processor.piece_to_id(piece) for piece in pieces]


@pytest.fixture(scope="module")
def cased_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cased model of this project's own training, with number pieces."""
    directory = tmp_path_factory.mktemp("cased")
    corpus = write_english(directory / "text.txt")
    path = train_tokenizer([str(corpus)], directory / "tokenizer", 1000, cased=True)
    path.write_bytes(_with_number_pieces(path.read_bytes()))
    return path


@pytest.mark.parametrize("cased", [False, True])
def test_sentencepiece_equals_googles_code(request, cased):
    model = request.getfixturevalue("cased_model" if cased else "numbers_model")
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.lower_case, tokenizer.strip_accents) == (not cased, not cased)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    real = [" ".join(document) for document in english_documents()]
    texts = [*real, *NUMBERS.split("\n"), NUMBERS, CHINESE, *hostile_texts(3000), *every_character()]
    expected = [google_ids(processor, text, cased) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    ids, lengths = tokenizer.encode_flat(texts)
    assert ids.tolist() == [i for row in expected for i in row]
    assert lengths.tolist() == [len(row) for row in expected]


def test_a_number_is_cut_from_its_comma_behind_the_model(numbers_model):
    """`000,` becomes the pieces of `000` without a boundary mark; nothing before or behind it is split anew."""
    tokenizer = load_tokenizer(numbers_model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(numbers_model))
    whole = processor.encode("in 1999, we", out_type=str)
    assert "\u25811999," in whole
    ids = tokenizer.encode_batch(["in 1999, we"])[0]
    number = processor.encode("1999", out_type=str)
    cut = [part for piece in whole for part in ([*number, ","] if piece == "\u25811999," else [piece])]
    assert tokenizer.pieces(ids) == cut


def test_one_text_alone_has_the_ids_it_has_in_a_batch(numbers_model):
    tokenizer = load_tokenizer(numbers_model)
    texts = hostile_texts(300)
    assert [tokenizer.encode_batch([text])[0] for text in texts] == tokenizer.encode_batch(texts)


def test_wordpiece_equals_hugging_face(tmp_path):
    from transformers import BertTokenizer

    tokenizer = load_tokenizer(wordpiece_vocabulary(tmp_path / "vocab.txt"))
    assert isinstance(tokenizer, WordPieceTokenizer)
    reference = BertTokenizer(str(tokenizer.path))
    real = [" ".join(document) for document in english_documents()]
    texts = [*real, *NUMBERS.split("\n"), *CHINESE.split("\n"), *hostile_texts(3000), *every_character()]
    assert tokenizer.encode_batch(texts) == reference(texts, add_special_tokens=False)["input_ids"]
