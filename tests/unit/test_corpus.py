"""Reading: every format and every kind of dirt has a policy, and every document is accounted for."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from albert.errors import ConfigError, DataError, MissingInputError
from data_prep import cleaning, corpus, plan
from data_prep.corpus import detect_format, read_documents
from data_prep.files import read_head
from data_prep.plan import Part, Source, find_sources, plan_tasks
from data_prep.settings import BuildSettings
from tests.corpora import CHINESE, english_documents, write_english

LINES = "One two three.\nFour five six.\n\nSeven eight nine.\n"


def read(path: Path, text_format: str = "lines", **options) -> tuple[list[list[str]], Counter[str]]:
    """All documents of a file, and the counts."""
    counts: Counter[str] = Counter()
    source = Source(str(path), text_format, path.stat().st_size)
    documents = []
    for batch in read_documents(Part(source, 0, source.bytes), BuildSettings(**options), counts):
        documents += [batch.sentences[a:b] for a, b in zip(batch.ends[:-1], batch.ends[1:], strict=True)]
    return documents, +counts


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_lines_are_sentences_and_blank_lines_end_documents(tmp_path):
    documents, counts = read(write(tmp_path / "a.txt", LINES))
    assert documents == [["One two three.", "Four five six."], ["Seven eight nine."]]
    assert counts == {"documents_in": 2}


@pytest.mark.parametrize("line_end", ["\r\n", "\r", "\x85", "\u2028", "\x0b"])
def test_line_ends_of_every_kind(tmp_path, line_end):
    documents, counts = read(write(tmp_path / "a.txt", LINES.replace("\n", line_end)))
    assert documents == [["One two three.", "Four five six."], ["Seven eight nine."]]
    assert counts["line_ends_normalised"] == 4


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress), (".zst", zstandard.compress)],
)
def test_compressed_files(tmp_path, suffix, compress):
    data = compress("\n\n".join("\n".join(d) for d in english_documents()).encode())
    documents, _ = read(write(tmp_path / f"a.txt{suffix}", data))
    assert documents == [list(document) for document in english_documents()]
    broken = write(tmp_path / f"b.txt{suffix}", data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"b.txt{suffix}: damaged {suffix} file"):
        read(broken)
    with pytest.raises(DataError, match=f"cannot be read as {suffix}"):
        read_head(write(tmp_path / f"c.txt{suffix}", b"plain text"))


def test_jsonl(tmp_path):
    rows = [
        json.dumps({"text": "First one. Second one!\n\nThird one?"}),
        "not json",
        json.dumps({"body": "no text"}),
        json.dumps({"text": ""}),
        json.dumps(["text"]),
        json.dumps({"text": "a\ud800b ok\u0000"}),
    ]
    documents, counts = read(write(tmp_path / "a.jsonl", "\n".join(rows)), "jsonl")
    assert documents == [["First one.", "Second one!", "Third one?"], ["ab ok"]]
    assert counts["documents_in"] == 6
    assert (counts["rejected.no_text_in_json"], counts["rejected.empty"]) == (3, 1)
    documents, _ = read(write(tmp_path / "b.jsonl", rows[2]), "jsonl", text_key="body")
    assert documents == [["no text"]]


def test_invalid_bytes_cost_a_character_or_the_document(tmp_path):
    good = ("A sentence that is long enough to lose one character. " * 10).encode()
    data = good + b"\xff\n\n" + b"\xff\xfe\xfd bad\n\n" + good + "ü".encode()
    documents, counts = read(write(tmp_path / "a.txt", data))
    assert len(documents) == 2
    assert not any("\ufffd" in sentence for document in documents for sentence in document)
    assert counts["documents_in"] == 3
    assert counts["rejected.invalid_encoding"] == 1
    assert counts["invalid_characters_removed"] == 1


def test_controls_marks_and_byte_order_marks_are_removed_and_counted(tmp_path):
    documents, counts = read(write(tmp_path / "a.txt", "\ufeffA\x00b\x1b\u200b c\u202e d\u200de\n"))
    assert documents == [["Ab c d\u200de"]]
    assert counts["control_characters_removed"] == 4


def test_the_quick_test_for_dirt_agrees_with_cleaning():
    """Every character of the first two planes: cleaning changes none that the quick test calls clean."""
    for code in [*range(0xD800), *range(0xE000, 0x20000)]:
        text = f"a{chr(code)}b"
        if not cleaning.is_suspect(text):
            assert cleaning.clean_text(text, Counter()) == text, hex(code)
            assert chr(code) != "\ufffd"


def test_other_encodings(tmp_path):
    documents, _ = read(write(tmp_path / "a.txt", CHINESE.encode("gb18030")), encoding="gb18030")
    assert documents == [part.split("\n") for part in CHINESE.strip().split("\n\n")]
    with pytest.raises(DataError, match=r"is UTF-16; convert it first: iconv"):
        find_sources([str(write(tmp_path / "b.txt", LINES.encode("utf-16")))], (), BuildSettings())


@pytest.mark.parametrize("text", [LINES * 20, CHINESE * 9, "".join(CHINESE.split()) * 40])
@pytest.mark.parametrize(("encoding", "kind"), [("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")])
def test_utf16_without_a_mark_is_refused(tmp_path, text, encoding, kind):
    path = write(tmp_path / "two words.txt", text.encode(encoding))
    if "\n" not in text:
        kind = "UTF-16LE"  # nothing tells the order of the bytes
    with pytest.raises(DataError) as caught:
        find_sources([str(path)], (), BuildSettings())
    assert str(caught.value) == (
        f"{path}: is UTF-16 or no text (it holds many NUL bytes); convert it first: "
        f"iconv -f {kind} -t UTF-8 '{path}'"
    )


def test_records_that_nul_bytes_separate_are_read(tmp_path):
    records = [f"Record {number} holds été and {'x' * (number % 7)}." for number in range(200)]
    (source,) = find_sources(
        [str(write(tmp_path / "a.txt", "\0".join(records).encode()))], (), BuildSettings()
    )
    assert source.bytes == len("\0".join(records).encode())


def test_stray_nul_bytes_are_no_utf16(tmp_path):
    for data in (b"A\x00b " * 7, b"a line\n" * 3000 + b"\x00" * 40):
        assert find_sources([str(write(tmp_path / "a.txt", data))], (), BuildSettings())


def test_unknown_encodings_are_refused():
    with pytest.raises(ValueError, match="no encoding 'klingon' is known"):
        BuildSettings(encoding="klingon")
    with pytest.raises(ValueError, match="utf-16 does not keep ASCII bytes"):
        BuildSettings(encoding="utf-16")


def test_long_lines_are_cut(tmp_path):
    limit = cleaning.MAX_LINE_CHARACTERS
    documents, counts = read(write(tmp_path / "a.txt", "word " * limit + "\n" + "x" * (2 * limit + 5)))
    assert max(len(sentence) for sentence in documents[0]) <= limit
    assert "".join(documents[0]).replace(" ", "") == "word" * limit + "x" * (2 * limit + 5)
    assert counts["long_lines_cut"] >= 6


def test_long_documents_are_cut_and_nothing_is_lost(tmp_path):
    lines = [f"This is line number {i} of a document without an end." for i in range(120_000)]
    documents, counts = read(write(tmp_path / "a.txt", "\n".join(lines)))
    assert len(documents) == counts["documents_in"] == counts["long_documents_cut"] + 1 > 1
    assert [sentence for document in documents for sentence in document] == lines


def test_a_json_line_without_end_is_rejected(tmp_path):
    line = '{"text": "' + "x" * (3 * corpus.MAX_DOCUMENT_BYTES) + '"}\n{"text": "Fine."}\n'
    documents, counts = read(write(tmp_path / "a.jsonl", line), "jsonl")
    assert documents == [["Fine."]]
    assert (counts["documents_in"], counts["rejected.line_too_long"]) == (2, 1)


def test_sentence_splitting():
    text = (
        'Mr. Smith met Dr. Jones, e.g. in Paris. He said: "Go home!" Then J. R. left. It cost 3.5 dollars? Yes.\n'
        "他说：“你好！”然后走了。真的吗？是的！好。\n"
        "This line is broken\nin the middle."
    )
    assert cleaning.split_sentences(text).split("\n") == [
        "Mr. Smith met Dr. Jones, e.g. in Paris.",
        'He said: "Go home!"',
        "Then J. R. left.",
        "It cost 3.5 dollars?",
        "Yes.",
        "他说：“你好！”",
        "然后走了。",
        "真的吗？",
        "是的！",
        "好。",
        "This line is broken in the middle.",
    ]


def test_formats_are_detected(tmp_path):
    paragraphs = "\n".join(" ".join(document) for document in english_documents())
    for name, text, expected in (
        ("a.txt", LINES * 50, "lines"),
        ("b.txt", paragraphs, "prose"),
        ("c.txt", '{"text": "x"}\n' * 9, "jsonl"),
        ("d.jsonl", "", "jsonl"),
        ("e.txt", "", "lines"),
        ("f.txt", CHINESE, "prose"),
    ):
        path = write(tmp_path / name, text)
        assert detect_format(path, read_head(path), BuildSettings()) == expected, name


@pytest.mark.parametrize("size", [700, 5_000, 60_000])
def test_tasks_cover_every_byte_once_and_end_where_documents_end(tmp_path, monkeypatch, size):
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", size)
    monkeypatch.setattr(plan, "_TASKS_WANTED", 10**9)
    path = write_english(tmp_path / "a.txt")
    sources = find_sources([str(path)], (), BuildSettings(format="lines"))
    tasks = plan_tasks(sources, BuildSettings(format="lines"))
    parts = [part for task in tasks for part in task.parts]
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == path.stat().st_size
    documents: list[list[str]] = []
    for part in parts:
        for batch in read_documents(part, BuildSettings(), Counter()):
            documents += [batch.sentences[a:b] for a, b in zip(batch.ends[:-1], batch.ends[1:], strict=True)]
    assert documents == [list(document) for document in english_documents()]


def test_small_files_share_a_task_and_weight_zero_leaves_a_file_out(tmp_path):
    names = [str(write(tmp_path / f"{i}.txt", LINES)) for i in range(5)]
    sources = find_sources(names, [f"{tmp_path}/4*=0", "*=2"], BuildSettings())
    assert [source.weight for source in sources] == [2, 2, 2, 2, 0]
    (task,) = plan_tasks(sources, BuildSettings())
    assert [Path(part.source.path).name for part in task.parts] == ["0.txt", "1.txt", "2.txt", "3.txt"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["x"], "--weight 'x' is not of the form PATTERN=WEIGHT"),
        (["*=much"], "not of the form"),
        (["*=-1"], "not of the form"),
        (["*=nan"], "not of the form"),
        (["other*=2"], r"--weight other\*: matches none of the input files"),
    ],
)
def test_bad_weights_are_named(tmp_path, weights, message):
    path = write(tmp_path / "a.txt", LINES)
    with pytest.raises(ConfigError, match=message):
        find_sources([str(path)], weights, BuildSettings())


def test_missing_inputs_are_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"--input .*none.txt: no such file"):
        find_sources([str(tmp_path / "none.txt")], (), BuildSettings())
    with pytest.raises(MissingInputError, match="is a directory; name its files"):
        find_sources([str(tmp_path)], (), BuildSettings())


HOSTILE = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [b"\n\n", b"\r\r", b"\x00", "\u2028\u2029\x85".encode(), b"\xed\xa0\x80", "\u202e".encode() * 50]
    ),
)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(HOSTILE, max_size=12), text_format=st.sampled_from(["lines", "prose", "jsonl"]))
def test_hostile_bytes_lose_no_document(tmp_path_factory, pieces, text_format):
    """Documents in = out + rejected, no empty sentence, nothing that a tokenizer cannot take."""
    path = write(tmp_path_factory.getbasetemp() / "hostile.txt", b"".join(pieces))
    documents, counts = read(path, text_format)
    rejected = sum(count for key, count in counts.items() if key.startswith("rejected."))
    assert counts["documents_in"] == len(documents) + rejected
    for document in documents:
        assert document
        for sentence in document:
            assert sentence.strip() == sentence != ""
            sentence.encode("utf-8")
            assert "\n" not in sentence


def test_duplicates_are_found():
    from data_prep.dedup import repeated_documents, signature
    from data_prep.worker import document_hash

    documents = [list(document) for document in english_documents()[:20]]
    near = [*documents[3][:-1], documents[3][-1] + " Indeed."]
    half = documents[5][: len(documents[5]) // 2] + documents[6]
    texts = [*documents, documents[2], near, half, ["天下大势，分久必合，合久必分。"]]
    for is_near, expected in ((False, [20]), (True, [20, 21])):
        rows = np.array([signature(text, document_hash(text), is_near) for text in texts])
        assert np.flatnonzero(repeated_documents(rows.T)).tolist() == expected
