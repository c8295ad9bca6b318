"""The build: same bytes again, every document accounted for, errors before anything is written."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from albert.errors import AlbertError, ConfigError, DataError, MissingInputError, UnsafeError
from albert.manifest import Manifest, read_manifest
from albert.masking import MaskingPolicy
from albert.shards import ShardReader
from albert.tokenization import load_tokenizer
from data_prep import plan, worker
from data_prep.audit import audit_dataset, ngram_law
from data_prep.audit_html import write_html
from data_prep.audit_report import most_predicted, report_lines, warnings
from data_prep.build import BuildRequest, build
from data_prep.cli import _main
from data_prep.settings import BuildSettings
from data_prep.show import show_examples
from data_prep.verify import verify_dataset
from tests.corpora import (
    CHINESE,
    english_documents,
    english_tokenizer,
    fingerprint,
    wordpiece_vocabulary,
    write_english,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with english.txt and a tokenizer."""
    directory = tmp_path_factory.mktemp("build")
    english_tokenizer(directory)
    write_english(directory / "english.txt")
    return directory


def request(place: Path, output: Path, **options) -> BuildRequest:
    settings = BuildSettings(**{"max_seq_length": 128, "eval_fraction": 0.1, **options})
    return BuildRequest((str(place / "english.txt"),), str(place / "tokenizer"), str(output), settings)


def make(place: Path, output: Path, **options) -> Manifest:
    manifest = build(request(place, output, **options))
    assert manifest is not None
    return manifest


@pytest.fixture(scope="module")
def dataset(place: Path) -> Path:
    make(place, place / "dataset", dupe_factor=2)
    return place / "dataset"


def segments_of(directory: Path, split: str) -> list[tuple[list[int], list[int]]]:
    """Both segments of every example, as they follow each other in the text."""
    manifest = read_manifest(directory)
    shards = manifest.split(split)
    reader = ShardReader(directory, shards, manifest.tokenizer.vocab_size)
    found = []
    for s, shard in enumerate(shards):
        for b in range(len(shard.blocks)):
            block = reader.read_block(s, b)
            ids, begin = block.original_ids(), 0
            for i, length in enumerate(block.lengths.tolist()):
                row = ids[begin : begin + length].tolist()
                begin += length
                cut = int(block.segment_a_lengths[i])
                first, second = row[1 : cut - 1], row[cut:-1]
                found.append((second, first) if block.sentence_order_labels[i] == 1 else (first, second))
    reader.close()
    return found


def test_every_example_is_two_stretches_of_one_document_in_their_order(place, dataset):
    tokenizer = load_tokenizer(dataset)
    documents = [
        "," + ",".join(map(str, tokenizer.encode_flat(d)[0].tolist())) + "," for d in english_documents()
    ]
    for first, second in segments_of(dataset, "train") + segments_of(dataset, "eval"):
        head, tail = (f",{','.join(map(str, part))}," if part else "" for part in (first, second))
        at = [document.find(head) for document in documents]
        assert any(
            a >= 0 and (not tail or document.rfind(tail) > a)
            for a, document in zip(at, documents, strict=True)
        )


def test_examples_have_the_form_of_bert(dataset):
    manifest = read_manifest(dataset)
    shards = manifest.split("train")
    tokenizer = load_tokenizer(dataset)
    policy = MaskingPolicy.of_tokenizer(tokenizer, max_predictions_per_seq=20)
    reader = ShardReader(dataset, shards, manifest.tokenizer.vocab_size)
    table = tokenizer.word_start_table()
    for s, shard in enumerate(shards):
        for b in range(len(shard.blocks)):
            block = reader.read_block(s, b)
            ids, lengths = block.original_ids(), block.lengths.astype(int)
            offsets = np.cumsum(lengths) - lengths
            assert lengths.max() <= 128
            assert (ids[offsets] == tokenizer.cls_id).all()
            for at in (offsets + block.segment_a_lengths - 1, offsets + lengths - 1):
                assert (ids[at] == tokenizer.sep_id).all()
            special = np.isin(ids, [tokenizer.cls_id, tokenizer.sep_id])
            starts = block.word_start_bits().astype(bool)
            assert not starts[special].any()
            after = np.flatnonzero(special[:-1]) + 1
            assert starts[after[~special[after]]].all()
            other = np.setdiff1d(np.flatnonzero(~special), after)
            np.testing.assert_array_equal(starts[other], table[ids[other]])
            assert (block.num_masked <= policy.budgets(lengths)).all()
            assert (block.masked_lm_labels > 4).mean() > 0.98


def test_counts_add_up(dataset):
    manifest = read_manifest(dataset)
    totals = manifest.totals
    rejected = sum(value for key, value in totals.items() if key.startswith("rejected."))
    assert totals["documents_in"] == len(english_documents())
    assert totals["documents_in"] == totals["train.documents"] + totals["eval.documents"] + rejected
    for split in ("train", "eval"):
        shards = manifest.split(split)
        assert totals[f"{split}.examples"] == sum(shard.examples for shard in shards)
        assert totals[f"{split}.tokens"] == sum(shard.tokens for shard in shards)
        kinds = ("pairs_in_order", "pairs_swapped", "single_segments")
        assert totals[f"{split}.examples"] == sum(totals.get(f"{split}.{kind}", 0) for kind in kinds)


def test_held_out_documents_are_never_trained_on(place, tmp_path):
    """Each document repeats a name of its own; the names of the two splits have none in common."""
    letters = "bcdfghjklmnp"
    names = [f"{a}{b}{c}" for a in letters for b in "aeiou" for c in letters]
    text = "\n\n".join("\n".join(f"The {name} of it was here." for _ in range(6)) for name in names)
    (tmp_path / "names.txt").write_text(text)
    base = request(place, tmp_path / "out", max_seq_length=64)
    manifest = build(replace(base, inputs=(str(tmp_path / "names.txt"),)))
    tokenizer = load_tokenizer(tmp_path / "out")
    seen = {}
    for split in ("train", "eval"):
        texts = [tokenizer.decode(first + second) for first, second in segments_of(tmp_path / "out", split)]
        seen[split] = {name for text in texts for name in re.findall(r"the (\w+) of", text)} & set(names)
    assert not seen["train"] & seen["eval"]
    assert len(seen["train"]) + len(seen["eval"]) > 0.95 * len(names)
    # 10 % of 720 documents, within 4 standard deviations.
    assert abs(manifest.totals["eval.documents"] - 72) < 4 * 8.05


def test_many_short_documents_leave_none_of_the_splits_empty(place, tmp_path):
    """With a share that holds out nothing by itself; a few short documents are all needed for training."""
    for number, held_out in ((20, 1), (19, 0)):
        text = "\n\n".join(f"The {number} of them were number {i} of all." for i in range(number))
        (tmp_path / "short.txt").write_text(text)
        base = request(place, tmp_path / str(number), max_seq_length=64, eval_fraction=1e-9)
        totals = build(replace(base, inputs=(str(tmp_path / "short.txt"),))).totals
        assert (totals["train.documents"], totals.get("eval.documents", 0)) == (number - held_out, held_out)


def test_copies_differ(place, dataset, tmp_path):
    one = make(place, tmp_path / "one")
    assert read_manifest(dataset).totals["train.examples"] == pytest.approx(
        2 * one.totals["train.examples"], rel=0.2
    )
    assert read_manifest(dataset).totals["train.documents"] == one.totals["train.documents"]
    block_ids = []
    manifest = read_manifest(dataset)
    reader = ShardReader(dataset, manifest.split("train"), 2000)
    for b in range(len(manifest.split("train")[0].blocks)):
        block = reader.read_block(0, b)
        ends = np.cumsum(block.lengths.astype(int))
        block_ids += [tuple(row.tolist()) for row in np.split(block.input_ids, ends[:-1])]
    assert len(set(block_ids)) > 0.99 * len(block_ids)


def test_the_same_command_gives_the_same_bytes(place, dataset, tmp_path):
    make(place, tmp_path / "again", dupe_factor=2)
    assert fingerprint(tmp_path / "again") == fingerprint(dataset)
    make(place, tmp_path / "other", dupe_factor=2, seed=1)
    assert fingerprint(tmp_path / "other") != fingerprint(dataset)


@pytest.mark.parametrize(
    ("pairs", "digest"),
    [
        ("strict", "c4382ee31a05fa79"),
        ("google", "2d59ebaa7f106da4"),
        ("albert_pytorch", "e81148bec2977877"),
        ("none", "1feb4047a89462f6"),
    ],
)
def test_the_bytes_of_a_dataset_are_pinned(tmp_path, pairs, digest):
    """What changes these changes every dataset that is built; it has to be meant."""
    corpus = tmp_path / "zh.txt"
    corpus.write_text("\n".join(f"第{i}回\n{CHINESE}" for i in range(40)), encoding="utf-8")
    vocabulary = wordpiece_vocabulary(tmp_path / "vocab.txt")
    settings = BuildSettings(max_seq_length=64, dupe_factor=2, eval_fraction=0.1, pairs=pairs)
    manifest = build(BuildRequest((str(corpus),), str(vocabulary), str(tmp_path / "out"), settings))
    shards = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode())
    assert shards.hexdigest()[:16] == digest


def test_a_finished_dataset_is_left_alone(place, dataset):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    make(place, dataset, dupe_factor=2)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before
    with pytest.raises(ConfigError, match="holds a dataset made with seed=0, this command says 5"):
        make(place, dataset, dupe_factor=2, seed=5)


def test_an_interrupted_build_goes_on_and_ends_with_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", 20_000)
    make(place, tmp_path / "whole")
    wanted = fingerprint(tmp_path / "whole")
    real = worker.Worker.run
    runs: list[int] = []

    def stop_at_third(self, task):
        if len(runs) % 4 == 3:
            runs.append(-1)
            raise KeyboardInterrupt
        runs.append(task.index)
        return real(self, task)

    monkeypatch.setattr(worker.Worker, "run", stop_at_third)
    output = tmp_path / "interrupted"
    for _ in range(20):
        try:
            make(place, output)
            break
        except KeyboardInterrupt:
            (output / "train-00099.tar.tmp-1").write_bytes(b"left by a kill")
            with pytest.raises(
                ConfigError, match=r"made with seed=0, this command says 3; use the same settings"
            ):
                make(place, output, seed=3)
    assert fingerprint(output) == wanted
    finished = [index for index in runs if index >= 0]
    assert len(finished) == len(set(finished)) > 6
    assert not (output / ".build").exists()


def test_a_shard_that_vanished_is_made_again(place, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MIN_TASK_BYTES", 20_000)
    make(place, tmp_path / "whole")
    real = worker.Worker.run

    def stop_late(self, task):
        if task.index == 4:
            raise KeyboardInterrupt
        return real(self, task)

    monkeypatch.setattr(worker.Worker, "run", stop_late)
    with pytest.raises(KeyboardInterrupt):
        make(place, tmp_path / "b")
    (tmp_path / "b" / "train-00002.tar").unlink()
    (tmp_path / "b" / ".build" / "task-00003.json").write_text("{")
    monkeypatch.setattr(worker.Worker, "run", real)
    make(place, tmp_path / "b")
    assert fingerprint(tmp_path / "b") == fingerprint(tmp_path / "whole")


def test_an_input_that_changed_meanwhile_is_named(place, tmp_path, monkeypatch):
    real = worker.Worker.run

    def stop(self, task):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.Worker, "run", stop)
    corpus = tmp_path / "english.txt"
    corpus.write_bytes((place / "english.txt").read_bytes())
    asked = replace(request(place, tmp_path / "out"), inputs=(str(corpus),))
    with pytest.raises(KeyboardInterrupt):
        build(asked)
    monkeypatch.setattr(worker.Worker, "run", real)
    os.utime(corpus, ns=(1, 1))
    with pytest.raises(ConfigError, match=r"english.txt: was changed after the build in .*out began"):
        build(asked)


def test_two_builds_in_one_directory_are_refused(place, tmp_path, monkeypatch):
    real = worker.Worker.run

    def build_inside(self, task):
        with pytest.raises(UnsafeError, match="another build is writing there"):
            make(place, tmp_path / "out")
        return real(self, task)

    monkeypatch.setattr(worker.Worker, "run", build_inside)
    make(place, tmp_path / "out")


def test_a_small_corpus_always_holds_something_out(place, tmp_path):
    manifest = make(place, tmp_path / "out", eval_fraction=1e-9)
    assert manifest.totals["eval.documents"] == 1
    assert manifest.split("eval")
    manifest = make(place, tmp_path / "none", eval_fraction=0)
    assert manifest.split("eval") == ()


def test_weights_repeat_and_leave_out_documents(place, tmp_path):
    base = request(place, tmp_path / "a", eval_fraction=0)
    half = build(replace(base, weights=("*english*=2.5",)))
    once = make(place, tmp_path / "b", eval_fraction=0)
    ratio = half.totals["train.examples"] / once.totals["train.examples"]
    assert 2 < ratio < 3  # every document twice or three times, chosen by the hash of its text
    fewer = build(replace(base, output=str(tmp_path / "c"), weights=("*english*=0.5",)))
    assert fewer.totals["rejected.weight"] + fewer.totals["train.documents"] == once.totals["train.documents"]
    documents = once.totals["train.documents"]
    four_sigma = 4 * (0.25 / documents) ** 0.5
    assert fewer.totals["rejected.weight"] / documents == pytest.approx(0.5, abs=four_sigma)


def test_repeated_documents_are_dropped(place, tmp_path):
    text = (place / "english.txt").read_text()
    (tmp_path / "twice.txt").write_text(text + "\n" + text)
    (tmp_path / "blank.txt").write_text(" \n\n" * 500_000)  # a task of its own, without any document
    for kind in ("exact", "near"):
        base = request(place, tmp_path / kind, dedup=kind)
        manifest = build(replace(base, inputs=(str(tmp_path / "blank.txt"), str(tmp_path / "twice.txt"))))
        documents = len(english_documents())
        assert manifest.totals["documents_in"] == 2 * documents
        assert documents <= manifest.totals["rejected.repeated"] <= documents + 8
        assert not (tmp_path / kind / ".build").exists()


def test_chinese_words_of_jieba_match_the_inputs(tmp_path):
    pytest.importorskip("jieba")
    corpus = tmp_path / "zh.txt"
    corpus.write_text(CHINESE * 30, encoding="utf-8")
    vocabulary = wordpiece_vocabulary(tmp_path / "vocab.txt")
    settings = BuildSettings(max_seq_length=64, whole_words="jieba", eval_fraction=0)
    manifest = build(BuildRequest((str(corpus),), str(vocabulary), str(tmp_path / "out"), settings))
    reader = ShardReader(tmp_path / "out", manifest.shards, manifest.tokenizer.vocab_size)
    block = reader.read_block(0, 0)
    tokenizer = load_tokenizer(tmp_path / "out")
    pieces = tokenizer.pieces(block.original_ids().tolist())
    words, word = set(), ""
    for piece, start in zip(pieces, block.word_start_bits().tolist(), strict=True):
        if start or piece in ("[SEP]", "[CLS]"):
            words.add(word)
            word = ""
        word += piece
    assert {"天下", "中华人民共和国", "公园"} <= words
    assert not any(piece.startswith("##") for piece in pieces)
    assert not any(label.startswith("##") for label in tokenizer.pieces(block.masked_lm_labels.tolist()))


def test_token_masking_and_single_segments(place, tmp_path):
    manifest = make(place, tmp_path / "out", whole_words="none", pairs="none", pack_short_documents=True)
    reader = ShardReader(tmp_path / "out", manifest.split("train"), 2000)
    block = reader.read_block(0, 0)
    assert (block.sentence_order_labels == -100).all()
    assert (block.segment_a_lengths == block.lengths).all()
    assert block.word_start_bits().sum() == block.lengths.sum(dtype=int) - 2 * block.num_examples
    assert np.median(block.lengths) == 128


def test_verify_names_what_is_damaged(dataset, tmp_path):
    verify_dataset(dataset)
    copy = tmp_path / "copy"
    for damage, message in (
        (lambda: _flip(copy / "train-00000.tar", 1000), r"train-00000.tar: block 0: checksum mismatch"),
        ((copy / "eval-00000.tar").unlink, r"eval-00000.tar: shard is missing"),
        (
            lambda: _flip(copy / "tokenizer" / "spiece.model", 100),
            "is not the tokenizer that the manifest names",
        ),
        (lambda: shutil.rmtree(copy / "tokenizer"), "tokenizer is missing"),
    ):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(dataset, copy)
        damage()
        with pytest.raises(AlbertError, match=message):
            verify_dataset(copy)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_audit_measures_what_is_there(dataset, tmp_path):
    audit = audit_dataset(dataset)
    totals = read_manifest(dataset).totals
    assert (audit.examples, audit.tokens) == (totals["train.examples"], totals["train.tokens"])
    assert audit.masked == totals["train.masked_tokens"]
    assert (audit.special_masked, audit.over_budget, audit.copied_pairs) == (0, 0, 0)
    assert (audit.orders[0], audit.orders[1]) == (
        totals["train.pairs_in_order"],
        totals["train.pairs_swapped"],
    )
    assert audit.lengths.sum() == audit.examples
    assert audit.position_masked.sum() == audit.masked == audit.labels.sum()
    assert sum(audit.replaced.values()) == audit.masked
    assert ngram_law(audit)[2] < 5
    assert not [text for text in warnings(audit) if "defective" in text]
    assert any("law 54.5 27.3 18.2 %" in line for line in report_lines(audit))
    assert audit.position_expected.sum() == pytest.approx(audit.masked)
    assert audit.position_deviation < 0.15
    assert audit.frequencies.sum() == audit.position_tokens.sum()
    for _, of_predictions, of_text in most_predicted(audit):
        assert of_predictions == pytest.approx(of_text, rel=0.25)


def test_the_html_report_shows_examples_side_by_side(dataset, tmp_path):
    audit = audit_dataset(dataset)
    write_html(audit, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    image = re.search(r"data:image/png;base64,([^\"]+)", page)
    assert image
    assert base64.b64decode(image[1]).startswith(b"\x89PNG")
    assert page.count("<mark class=mask>[MASK]</mark>") > 5
    example = audit.samples[0]
    rows = re.search(
        rf"{re.escape(example.title)}</th></tr><tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", page
    )
    assert rows
    plain = [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in rows.groups()]
    for cell, pieces in ((plain[0], example.original), (plain[1], example.masked)):
        assert cell.replace(" ", "") == "".join(pieces).replace("\u2581", "")
    assert plain[2] == ", ".join(f"{i}:{example.original[i]}" for i in example.predicted)


def test_audit_warns_of_masks_that_prefer_some_positions(dataset):
    audit = audit_dataset(dataset)
    audit.position_masked[:60] //= 2
    assert any("% off an even spread over the positions" in text for text in warnings(audit))


def test_audit_warns_of_what_matters(place, tmp_path):
    short = tmp_path / "short.txt"
    sentences = [sentence for document in english_documents()[:30] for sentence in document]
    short.write_text("\n\n".join(sentences + sentences + ["一", "二 三 四 五 六"] * 300))
    base = request(place, tmp_path / "out", eval_fraction=0, max_predictions_per_seq=2)
    build(replace(base, inputs=(str(short),)))
    found = " ".join(warnings(audit_dataset(tmp_path / "out")))
    for text in ("unknown", "--pack-short-documents", "one segment", "repeat another", "eval split is empty"):
        assert text in found
    assert "were rejected" in found


def test_show_prints_original_masked_and_labels(dataset):
    shown = show_examples(dataset, "train", 3)
    assert len(shown) == 3
    assert all("original: [CLS]" in text and "[MASK]" in text and "labels:" in text for text in shown)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--input", "none.txt"], MissingInputError, "--input none.txt: no such file"),
        (["--tokenizer", "none"], MissingInputError, "none: no such tokenizer"),
        (
            ["--max-seq-length", "4"],
            ConfigError,
            "--max-seq-length 4: input should be greater than or equal to 8",
        ),
        (
            ["--max-predictions-per-seq", "126"],
            ConfigError,
            r"\(126\) must be at most --max-seq-length - 3 \(125\)",
        ),
        (["--masked-lm-prob", "1"], ConfigError, "--masked-lm-prob 1.0: input should be less than 1"),
        (["--encoding", "klingon"], ConfigError, "no encoding 'klingon' is known"),
        (["--workers", "0"], ConfigError, "--workers 0: must be at least 1"),
        (["--weight", "x"], ConfigError, "--weight 'x' is not of the form"),
        (["--output", "full"], UnsafeError, "--output full: exists and is not a dataset"),
        (
            ["--min-document-tokens", "100000"],
            MissingInputError,
            "yields no training example: .*'too_short': 71",
        ),
        (["--input", "utf16.txt"], DataError, "is UTF-16"),
    ],
)
def test_wrong_commands_say_so_and_write_nothing(place, tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    defaults = {
        "--input": str(place / "english.txt"),
        "--tokenizer": str(place / "tokenizer"),
        "--output": "out",
        "--max-seq-length": "128",
        "--workers": "1",
    }
    options = {**defaults, **dict([arguments])}
    with pytest.raises(error, match=message):
        _main(["build", *(part for pair in options.items() for part in pair)])
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_where_nothing_can_be_read_the_option_is_named(place, tmp_path):
    (tmp_path / "zh.txt").write_bytes(CHINESE.encode("gb18030"))
    (tmp_path / "rows.jsonl").write_text('{"text": "Some words."}\n' * 4)
    for name, options, advice in (
        ("zh.txt", {}, "2 of 2 documents are not in --encoding utf-8"),
        ("rows.jsonl", {"text_key": "body"}, "4 of 4 documents have no text under --text-key body"),
    ):
        base = request(place, tmp_path / "out", **options)
        with pytest.raises(MissingInputError, match=f"held out 0; {advice}: give the right one$"):
            build(replace(base, inputs=(str(tmp_path / name),)))
        assert not (tmp_path / "out").exists()


def test_a_missing_split_and_a_missing_dataset_are_named(place, tmp_path):
    make(place, tmp_path / "out", eval_fraction=0)
    with pytest.raises(MissingInputError, match="has no eval split; see --eval-fraction"):
        show_examples(tmp_path / "out", "eval", 1)
    for command in ("verify", "audit", "show"):
        with pytest.raises(MissingInputError, match="not a finished dataset"):
            _main([command, str(tmp_path)])


def test_commands_print_what_they_did(place, tmp_path, capsys):
    output = str(tmp_path / "out")
    _main(
        [
            "build",
            "--input",
            str(place / "english.txt"),
            "--tokenizer",
            str(place / "tokenizer"),
            "--output",
            output,
        ]
    )
    assert f"documents {len(english_documents())}" in capsys.readouterr().out
    for command, expected in (
        (["verify"], "every byte"),
        (["audit"], "n-grams drawn"),
        (["show"], "original:"),
    ):
        _main([*command, output])
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["show", "--examples"], ["audit", "--max-blocks"], ["verify", "--workers"]]
)
def test_numbers_below_one_are_refused(dataset, arguments):
    with pytest.raises(ConfigError, match=f"{arguments[1]} 0: must be at least 1"):
        _main([arguments[0], str(dataset), arguments[1], "0"])


def test_jieba_missing_is_said(place, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ConfigError, match="jieba is not installed; pip install jieba"):
        make(place, tmp_path / "out", whole_words="jieba")
    assert not (tmp_path / "out").exists()


def test_mpi_missing_is_said(monkeypatch):
    import sys

    from data_prep.parallel import mpi_communicator

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"MPI cannot be loaded .* `pip install mpi4py mpich` is enough"):
        mpi_communicator()


def test_settings_in_the_manifest_are_those_of_the_command(dataset):
    settings = json.loads((dataset / "manifest.json").read_text())["settings"]
    assert settings["max_predictions_per_seq"] == 20
    assert settings["inputs"][0]["file"] == "english.txt"
    assert settings["dupe_factor"] == 2
