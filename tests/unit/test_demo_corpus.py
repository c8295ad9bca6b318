"""The demo's text and task: prose from the standard library, and a task that can be learned from words alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from albert.errors import DataError, MissingInputError, UnsafeError
from data_prep.demo_corpus import clean_sentences, split_pairs, tampered_pairs, write_demo_corpus
from tests.corpora import CHINESE


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    write_demo_corpus(directory)
    return directory


def rows(demo: Path, split: str) -> list[list[str]]:
    text = (demo / "pairs" / f"{split}.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]


def test_the_corpus_is_prose_by_documents(demo):
    text = (demo / "corpus.txt").read_text(encoding="utf-8")
    documents = [document.splitlines() for document in text.split("\n\n")]
    sentences = [sentence for document in documents for sentence in document if sentence]
    assert len(text) > 1_500_000
    assert len(documents) > 300
    assert min(map(len, documents)) >= 4
    assert len(set(sentences)) == len(sentences)
    assert not any(mark in text for mark in (">>>", "::=", "``", ":func:", "\t"))
    assert sum(len(re.findall("[A-Za-z ]", s)) for s in sentences) > 0.93 * sum(map(len, sentences))


def test_pairs_are_balanced_and_splits_share_nothing(demo):
    seen: dict[str, set[str]] = {}
    for split in ("train", "dev", "test"):
        table = rows(demo, split)
        assert all(len(row) == 3 for row in table)
        assert sum(row[2] == "1" for row in table) * 2 == len(table)
        seen[split] = {"\t".join(sorted(row[:2])) for row in table}
        assert len(seen[split]) * 2 == len(table)
    assert not seen["train"] & seen["dev"]
    assert not seen["train"] & seen["test"]
    assert len(rows(demo, "train")) > 3000
    assert min(len(rows(demo, "dev")), len(rows(demo, "test"))) > 300


def test_the_task_can_be_learned_beyond_the_majority_class(demo):
    """A bag of words for each text reaches 70 % where the majority class has 50 %."""
    pytest.importorskip("sklearn")
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = rows(demo, "train"), rows(demo, "test")
    words = CountVectorizer(min_df=3).fit([text for row in train for text in row[:2]])

    def features(table):
        return hstack([words.transform([row[i] for row in table]) for i in (0, 1)]).tocsr()

    model = LogisticRegression(C=0.3, max_iter=300).fit(features(train), [row[2] for row in train])
    assert model.score(features(test), [row[2] for row in test]) > 0.7


def test_cleaning_leaves_code_and_markup_out():
    text = "Return the :func:`name` of *this* thing.  It is short.\n\n>>> code\n\n  - A ``list`` item is kept here."
    text += "\n\nx = 1"
    assert clean_sentences(text) == [
        "Return the name of this thing.",
        "A list item is kept here.",
    ]


def test_the_users_own_text_takes_its_place(tmp_path):
    documents = [
        [f"Text {i} has words. It goes on here with more. And on. And it ends at last."] for i in range(60)
    ]
    (tmp_path / "own.txt").write_text("\n\n".join("\n".join(document) for document in documents))
    message = write_demo_corpus(tmp_path / "out", tmp_path / "own.txt")
    assert "60 documents, 240 sentences" in message
    assert len(rows(tmp_path / "out", "train")) == 2 * 2 * 48
    written = {sentence for document in documents for sentence in re.findall(r"[A-Z].*?\.", document[0])}
    for split in ("train", "dev", "test"):
        for first, second, label in rows(tmp_path / "out", split):
            kept, changed = (first, second) if label == "1" else (second, first)
            assert kept in written
            original = "It goes on here with more." if len(changed.split()) == 6 else "And it ends at last."
            differing = sum(a != b for a, b in zip(changed.split(), original.split(), strict=True))
            assert 0 <= differing <= 2
    assert "Text 5 has words." in written


def test_a_text_without_spaces_is_tampered_with_by_characters():
    documents = [["北京大学在北京。", "它建立很早了。"]] * 2
    for ((kept, changed),) in tampered_pairs(documents):
        assert kept == "北京大学在北京。"
        assert len(changed) == 7
        assert 1 <= sum(a != b for a, b in zip(changed, "它建立很早了。", strict=True)) <= 3


def test_pairs_do_not_depend_on_anything_but_the_documents():
    documents = [[(f"a{i}", f"b{i}"), (f"c{i}", f"d{i}")] for i in range(50)]
    assert split_pairs(documents) == split_pairs(documents)
    assert {name: len(table) for name, table in split_pairs(documents).items()} == {
        "train": 160,
        "dev": 20,
        "test": 20,
    }


def test_what_cannot_be_done_is_said(demo, tmp_path):
    with pytest.raises(UnsafeError, match=r"corpus.txt: exists; remove it"):
        write_demo_corpus(demo)
    with pytest.raises(MissingInputError, match=r"--input .*none.txt: no such file"):
        write_demo_corpus(tmp_path / "out", tmp_path / "none.txt")
    (tmp_path / "few.txt").write_text("One. Two. Three. Four words here. Five.\n")
    with pytest.raises(
        DataError,
        match="1 documents of at least 4 sentences, none counted twice; the demo needs 40; put a blank line",
    ):
        write_demo_corpus(tmp_path / "out", tmp_path / "few.txt")
    (tmp_path / "few.txt").write_text("\n\n".join(["One here.\nTwo here.\nThree here.\nFour here."] * 60))
    with pytest.raises(DataError, match="1 documents of at least 4 sentences, none counted twice"):
        write_demo_corpus(tmp_path / "out", tmp_path / "few.txt")
    (tmp_path / "few.txt").write_text("\n\n".join("A\n" * (4 + i) for i in range(60)))
    with pytest.raises(
        DataError, match="task needs neighbouring sentences that differ; give text that varies"
    ):
        write_demo_corpus(tmp_path / "out", tmp_path / "few.txt")
    (tmp_path / "few.txt").write_bytes(CHINESE.encode("gb18030"))
    with pytest.raises(DataError, match="the demo needs 40; convert it to UTF-8"):
        write_demo_corpus(tmp_path / "out", tmp_path / "few.txt")
    (tmp_path / "few.txt").write_bytes(CHINESE.encode("utf-16"))
    with pytest.raises(DataError, match=r"few.txt: is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8"):
        write_demo_corpus(tmp_path / "out", tmp_path / "few.txt")
    assert not (tmp_path / "out").exists()
