"""Data files of the tasks: what is tolerated, what is refused and with which words."""

import json
import re

import pytest

from albert.errors import ConfigError, DataError, MissingInputError
from albert.finetune.reading import collect_labels, find_file, read_split
from albert.finetune.tasks import TASKS, find_task


def _read(tmp_path, task, name, content, split="dev", **options):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    return read_split(find_task(task), tmp_path, split, **options)


def _rows(split):
    return [(e.guid, e.text_a, e.text_b, e.label) for e in split.examples]


PAIRS = [("0", "你好吗", "你好么", "1"), ("1", '他说"好"', "不好", "0")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dev.tsv", '你好吗\t你好么\t1\n他说"好"\t不好\t0\n'),
        ("dev.txt", '\ufeff你好吗\t你好么\t1\r\n他说"好"\t不好\t0\r\n\r\n'),
        ("dev.tsv", 'text_a\ttext_b\tlabel\n你好吗\t你好么\t1\n他说"好"\t不好\t0'),
        ("dev.tsv", 'label\tquestion2\tquestion1\n1\t你好么\t你好吗\n0\t不好\t他说"好"\n'),
        ("dev.csv", '你好吗,你好么,1\n"他说""好""",不好,0\n'),
        ("dev.csv", '\ufeffsentence1,sentence2,label\n你好吗,你好么,1\n"他说""好""",不好,0\n'),
        (
            "dev.jsonl",
            '{"sentence1": "你好吗", "sentence2": "你好么", "label": "1"}\n'
            '{"sentence1": "他说\\"好\\"", "sentence2": "不好", "label": 0}\n',
        ),
        (
            "dev.json",
            json.dumps([{"text_a": a, "text_b": b, "label": label} for _, a, b, label in PAIRS], indent=1),
        ),
    ],
)
def test_forms_of_a_pair_file(tmp_path, name, content):
    assert _rows(_read(tmp_path, "lcqmc", name, content)) == PAIRS


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path):
    split = _read(tmp_path, "lcqmc", "dev.tsv", "a\u2028b\tc\x85d\t1\ne\tf\t0\n")
    assert [e.text_a for e in split.examples] == ["a\u2028b", "e"]


@pytest.mark.parametrize("content", ["a\tb\nc\td\n", "a\tb\t-1\nc\td\t-1\n", "text_a\ttext_b\na\tb\nc\td\n"])
def test_only_a_test_file_may_be_without_labels(tmp_path, content):
    split = _read(tmp_path, "afqmc", "test.txt", content, split="test")
    assert [(e.text_a, e.label) for e in split.examples] == [("a", None), ("c", None)]
    with pytest.raises(DataError, match="label"):
        _read(tmp_path, "afqmc", "dev.txt", content, split="dev")


def test_a_test_file_with_some_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"test.tsv: 1 examples have a label and 1 have none .* example 2"):
        _read(tmp_path, "lcqmc", "test.tsv", "a\tb\t1\nc\td\n", split="test")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a\tb\t1\nc\td\t2\n", r"dev.tsv: 1 bad of 2 rows: row 2: label '2' is not one of 0, 1;"),
        ("a\tb\t1\nc\n", r"row 2: 1 columns, no sentence2 in column 2"),
        ("a\tb\t1\nc\td\n", r"row 2: 2 columns, no label in column 3"),
        ("a\tb\t1\n \tb\t0\n", r"row 2: sentence1 is empty"),
        (b"a\tb\t1\n\xff\tb\t0\n", r"row 2: byte 0 is not UTF-8"),
        ("".join(f"a\tb\t{n}\n" for n in range(9)), r"7 bad of 9 rows: row 3.*row 7.*and 2 more"),
    ],
)
def test_bad_rows_are_named_by_number_and_reason(tmp_path, content, match):
    with pytest.raises(DataError, match=match) as caught:
        _read(tmp_path, "lcqmc", "dev.tsv", content)
    assert caught.value.exit_code == 65
    assert "--skip-bad-rows" in str(caught.value)
    split = _read(tmp_path, "lcqmc", "dev.tsv", content, skip_bad_rows=True)
    assert len(split.examples) >= 1
    assert split.skipped["bad"] >= 1


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("dev.jsonl", '{"sentence1": "a", "sentence2": "b"}\n', r"row 1: key label or .* is missing"),
        ("dev.jsonl", '{"sentence1": "a"\n', "row 1: not JSON"),
        ("dev.jsonl", "7\n", "row 1: not a JSON object"),
        ("dev.json", "[1, 2", r"dev.json: not JSON .*one object per line or one array"),
        ("dev.csv", 'a,"b,1\n', "dev.csv: line .*CSV quoting"),
        ("dev.csv", b"a,\xff,1\n", "line 1 is not UTF-8"),
        ("dev.tsv", "text_a\ttext_b\tlabel\n", "no usable row; header only"),
    ],
)
def test_other_refusals(tmp_path, name, content, match):
    with pytest.raises(DataError, match=match):
        _read(tmp_path, "lcqmc", name, content)


def test_missing_and_empty_files(tmp_path):
    lcqmc = find_task("lcqmc")
    with pytest.raises(MissingInputError, match=r"--data-dir .*nowhere: no such directory"):
        find_file(lcqmc, tmp_path / "nowhere", "dev")
    (tmp_path / "train.tsv").write_text("a\tb\t1\n")
    with pytest.raises(MissingInputError, match=r"no dev file of lcqmc; wanted .*dev.tsv.*; found train.tsv"):
        find_file(lcqmc, tmp_path, "dev")
    with pytest.raises(MissingInputError, match=r"dev.tsv: the file is empty") as caught:
        _read(tmp_path, "lcqmc", "dev.tsv", "\n \n")
    assert caught.value.exit_code == 66


def test_unknown_task_lists_the_known():
    with pytest.raises(ConfigError, match=r"--task 'lcqcm' is not known; tasks are .*lcqmc.*custom"):
        find_task("lcqcm")


def test_glue_forms(tmp_path):
    cola = _read(tmp_path, "cola", "dev.tsv", "gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tRode sailors.\n")
    assert _rows(cola) == [("0", "The sailors rode.", None, "1"), ("1", "Rode sailors.", None, "0")]
    test = _read(tmp_path, "cola", "test.tsv", "index\tsentence\n0\tBill.\n1\tJo.\n", split="test")
    assert _rows(test) == [("0", "Bill.", None, None), ("1", "Jo.", None, None)]
    mrpc = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said "no.\t"No" he said\n'
    assert _rows(_read(tmp_path, "mrpc", "dev.tsv", mrpc)) == [("0", 'He said "no.', '"No" he said', "1")]
    stsb = "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\ta\tb\t2.500\n1\tnews\tc\td\tx\n"
    with pytest.raises(DataError, match="row 3: label 'x' is not a number"):
        _read(tmp_path, "sts-b", "dev.tsv", stsb)
    mnli = "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\t-\n1\tc\td\tneutral\n"
    split = _read(tmp_path, "mnli", "dev_matched.tsv", mnli)
    assert (_rows(split), split.skipped) == ([("1", "c", "d", "neutral")], {"without an agreed label": 1})
    with pytest.raises(DataError, match="first row is no header with the columns sentence1, sentence2"):
        _read(tmp_path, "rte", "dev.tsv", "a\tb\tentailment\n")


def test_clue_forms(tmp_path):
    csl = {"id": 3, "abst": "摘要", "keyword": ["词", "语"], "label": "1"}
    assert _rows(_read(tmp_path, "csl", "dev.json", json.dumps(csl))) == [("3", "词 语", "摘要", "1")]
    target = {"span1_text": "小明", "span1_index": 0, "span2_text": "他", "span2_index": 5}
    wsc = {"target": target, "text": "小明走了，他很累", "label": "true", "idx": 0}
    assert [e.text_a for e in _read(tmp_path, "wsc", "dev.json", json.dumps(wsc)).examples] == [
        "_小明_走了，[他]很累"
    ]
    tnews = {"sentence": "标题", "label": "108", "label_desc": "news_edu"}
    assert _rows(_read(tmp_path, "tnews", "dev.json", json.dumps(tnews))) == [("0", "标题", None, "108")]
    with pytest.raises(DataError, match="row 1: key 'target' is missing or of another form"):
        _read(tmp_path, "wsc", "dev.json", json.dumps({"text": "x", "label": "true"}))


def test_squad_forms(tmp_path):
    def document(**question):
        return json.dumps({"data": [{"paragraphs": [{"context": "Rome is old.", "qas": [question]}]}]})

    answered = document(id=" q ", question="What?", answers=[{"text": "Rome", "answer_start": 0}])
    example = _read(tmp_path, "squad", "dev-v1.1.json", answered).examples[0]
    assert (example.guid, example.answers, example.is_impossible) == ("q", (("Rome", 0),), False)
    impossible = document(id="q", question="What?", answers=[], is_impossible=True)
    assert _read(tmp_path, "squad2", "dev-v2.0.json", impossible).examples[0].is_impossible
    with pytest.raises(DataError, match=r"row 1: .*without 'answers'"):
        _read(tmp_path, "squad", "dev-v1.1.json", document(id="q", question="What?"))
    with pytest.raises(DataError, match="this is not SQuAD's JSON"):
        _read(tmp_path, "squad", "dev-v1.1.json", "{}")
    assert (
        not _read(tmp_path, "squad", "test.json", document(id="q", question="?"), split="test")
        .examples[0]
        .is_labelled
    )


def test_choice_forms(tmp_path):
    passage = {
        "article": "A.",
        "questions": ["Q _ ?"],
        "options": [["a", "b", "c", "d"]],
        "answers": ["C"],
        "id": "x",
    }
    race = _read(tmp_path, "race", "dev.jsonl", json.dumps(passage)).examples[0]
    assert (race.guid, race.label, race.options) == ("x-0", 2, ("a", "b", "c", "d"))
    (tmp_path / "train" / "high").mkdir(parents=True)
    (tmp_path / "train" / "high" / "1.txt").write_text(json.dumps(passage))
    assert len(read_split(find_task("race"), tmp_path, "train").examples) == 1
    c3 = [[["句一", "句二"], [{"question": "问", "choice": ["甲", "乙"], "answer": "乙"}], "7-1"]]
    example = _read(tmp_path, "c3", "dev.json", json.dumps(c3)).examples[0]
    assert (example.context, example.label, example.guid) == ("句一\n句二", 1, "7-1-0")
    test = [[["句"], [{"question": "问", "choice": ["甲", "乙"], "id": number}], "7-1"] for number in (4, 5)]
    (tmp_path / "test1.0.json").write_text("[]")
    (tmp_path / "test1.1.json").write_text(json.dumps(test))
    examples = read_split(find_task("c3"), tmp_path, "test").examples
    assert [(example.guid, example.label) for example in examples] == [("4", None), ("5", None)]
    (tmp_path / "m-train.json").write_text(json.dumps(c3))
    (tmp_path / "d-train.json").write_text(json.dumps([[["句三"], c3[0][1], "2-5"]]))
    assert [e.guid for e in read_split(find_task("c3"), tmp_path, "train").examples] == ["7-1-0", "2-5-0"]
    (tmp_path / "d-train.json").write_text("[1]")
    with pytest.raises(DataError, match=r"1 bad of 2 rows: row 1: d-train.json: TypeError at cannot unpack"):
        read_split(find_task("c3"), tmp_path, "train")
    c3[0][1][0]["answer"] = "丙"
    with pytest.raises(DataError, match="row 1: ValueError"):
        _read(tmp_path, "c3", "dev.json", json.dumps(c3))


def test_conll_form(tmp_path):
    text = "-DOCSTART- -X- O O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter B-PER\n"
    examples = _read(tmp_path, "conll-ner", "dev.txt", text).examples
    assert [(e.words, e.tags) for e in examples] == [
        (("EU", "rejects"), ("B-ORG", "O")),
        (("Peter",), ("B-PER",)),
    ]
    with pytest.raises(DataError, match="row 2: word 'b' has no tag"):
        _read(tmp_path, "conll-ner", "dev.txt", "a O\nb\n")
    assert collect_labels(examples) == ("O", "B-ORG", "B-PER")


def test_labels_are_collected_in_a_stable_order(tmp_path):
    split = _read(tmp_path, "lcqmc", "dev.tsv", "a\tb\t10\nc\td\t9\n", labels=("9", "10"))
    assert collect_labels(split.examples) == ("9", "10")


def test_every_task_of_the_table_is_whole():
    for name, task in TASKS.items():
        assert task.name == name
        assert (task.recipe.epochs is None) != (task.recipe.steps is None), name
        assert set(task.files) == {"train", "dev", "test"}
        assert (task.columns is not None) == (task.form == "rows"), name
        assert task.kind != "classification" or task.labels, name


@pytest.mark.parametrize(
    ("task", "name", "content"),
    [
        ("msra-ner", "test.txt", "a O\n\nb\n"),
        ("c3", "test.json", '[[["s"], [{"question": "q", "choice": ["a", "b"], "answer": "a"},'
         ' {"question": "q", "choice": ["a", "b"]}], 1]]'),
    ],
)  # fmt: skip
def test_half_labelled_files_are_refused(tmp_path, task, name, content):
    (tmp_path / name).write_text(content)
    message = "1 examples have a label and 1 have none (the first is example 2); label all of them or none"
    with pytest.raises(DataError, match=re.escape(message)):
        read_split(find_task(task), tmp_path, "test")


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("squad", "train-v1.1.json", b'{"data": [{"paragraphs": [null]}]}', "this is not SQuAD's JSON"),
        ("squad", "train-v1.1.json", b'{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "row 1: KeyError at 'context'"),
        ("c3", "train.json", b"true", "not an array; this is not C3's JSON"),
        ("c3", "train.json", b'[[["s"], [{"question": 5, "choice": ["a", "b"], "answer": "a"}], 1]]',
         "row 1: ValueError at 5, which is no text"),
        ("race", "train.jsonl", b'{"article', "row 1: not JSON (Unterminated string starting at)"),
        ("race", "train.jsonl", b'{"article": "\xc9"}', "row 1: byte 13 is not UTF-8"),
        ("race", "train.jsonl", b'{"article": 1, "questions": ["q"], "options": [["a", "b"]], "answers": ["A"]}',
         "row 1: ValueError at 1, which is no text"),
        ("msra-ner", "train.txt", b"a O\nb\x80 O\n", "row 2: byte 1 is not UTF-8"),
    ],
)  # fmt: skip
def test_files_of_other_forms_are_refused_in_one_line(tmp_path, task, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_split(find_task(task), tmp_path, "train")
    assert message in str(caught.value)
