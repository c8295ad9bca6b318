"""Metrics against scikit-learn, scipy and the official definitions on random cases."""

import re
import string
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from albert.finetune import metrics
from albert.finetune.answers import answer_scores, cmrc_exact, cmrc_f1, squad_exact, squad_f1

CASES = 1000


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def _classes(rng, num_labels):
    size = int(rng.integers(2, 60))
    gold = rng.integers(0, num_labels, size)
    agree = rng.random(size) < rng.random()
    return np.where(agree, gold, rng.integers(0, num_labels, size)), gold


def test_classification_equals_scikit_learn(rng):
    for case in range(CASES):
        num_labels = 2 if case % 2 else int(rng.integers(2, 8))
        predicted, gold = _classes(rng, num_labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {
                "accuracy": sk.accuracy_score(gold, predicted),
                "macro_f1": sk.f1_score(gold, predicted, average="macro", zero_division=0),
                "matthews": sk.matthews_corrcoef(gold, predicted),
                "f1": sk.f1_score(gold, predicted, pos_label=1, labels=[1], average="macro", zero_division=0),
            }
        scores = metrics.classification_scores(predicted, gold, num_labels)
        assert scores["majority_accuracy"] == np.bincount(gold).max() / len(gold)
        assert ("f1" in scores) == (num_labels == 2)
        for name in set(expected) & set(scores):
            assert scores[name] == pytest.approx(expected[name], abs=1e-12), (case, name)
        table = sk.confusion_matrix(gold, predicted, labels=range(num_labels))
        np.testing.assert_array_equal(metrics.confusion(predicted, gold, num_labels), table)


def test_correlations_equal_scipy(rng):
    for case in range(CASES):
        size = int(rng.integers(3, 50))
        gold = np.round(rng.random(size) * 5, int(rng.integers(0, 3)))
        predicted = gold * rng.normal() + rng.normal(size=size) * rng.random()
        predicted = np.round(predicted, int(rng.integers(0, 4)))
        if np.ptp(gold) == 0 or np.ptp(predicted) == 0:
            assert metrics.pearson(predicted, gold) == 0.0
            continue
        scores = metrics.regression_scores(predicted, gold)
        assert scores["pearson"] == pytest.approx(stats.pearsonr(predicted, gold)[0], abs=1e-9), case
        assert scores["spearman"] == pytest.approx(stats.spearmanr(predicted, gold)[0], abs=1e-9), case
        assert scores["mean_squared_error"] == pytest.approx(sk.mean_squared_error(gold, predicted))


_WORDS = [
    "the",
    "a",
    "Cat",
    "cat.",
    "dog",
    "an",
    "an-te",
    "The,",
    "9.5",
    "U.S.",
    "",
    "don't",
    "x",
    "y z",
    "É",
]
_CHINESE = [
    *"北京大学在中国",
    "，",
    "。",
    "2008年",
    "NBA",
    "iPhone 4s",
    "-",
    "《",
    "》",
    " ",
    "3.14",
    "a_b",
    "……",
]


def _text(rng, words, separator):
    return separator.join(rng.choice(words, int(rng.integers(0, 7))))


def _squad_words(text):
    """The definition of SQuAD's script: lower case, no punctuation, no articles, split at spaces."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _squad_f1(predicted, gold):
    """With one side empty: 1 if both are; else harmonic mean of precision and recall of the bags."""
    if not predicted or not gold:
        return float(predicted == gold)
    rest, shared = list(gold), 0
    for word in predicted:
        if word in rest:
            rest.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def test_squad_scores_equal_the_official_definition(rng):
    for _ in range(CASES):
        predicted, gold = _text(rng, _WORDS, " "), _text(rng, _WORDS, " ")
        words = _squad_words(predicted), _squad_words(gold)
        assert squad_exact(predicted, gold) == (words[0] == words[1])
        assert squad_f1(predicted, gold) == pytest.approx(_squad_f1(*words), abs=1e-12)


def test_squad_takes_the_best_of_several_answers_and_knows_unanswerable_questions():
    scores = answer_scores(["the cat", "", "dog"], [["dog", "a Cat!"], [], []], "en")
    assert scores == {
        "exact_match": pytest.approx(200 / 3),
        "f1": pytest.approx(200 / 3),
        "has_answer_exact_match": 100.0,
        "has_answer_f1": 100.0,
        "no_answer_exact_match": 50.0,
        "no_answer_f1": 50.0,
    }


_MARKS = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"


def _cmrc_segments(text):
    """The definition: listed marks dropped, every Chinese character one segment, other runs cut into words."""
    plain = "".join(c for c in text.lower().strip() if c not in _MARKS)
    return re.findall(r"[\u4e00-\u9fa5]|\d+(?:[.,]\d+)*|[^\W\u4e00-\u9fa5]+|[^\w\s]", plain)


def _common_run(first, second):
    runs = [
        size
        for size in range(len(first), 0, -1)
        for i in range(len(first) - size + 1)
        if any(first[i : i + size] == second[j : j + size] for j in range(len(second) - size + 1))
    ]
    return max(runs, default=0)


def test_cmrc_scores_equal_the_official_definition(rng):
    for _ in range(CASES):
        predicted, gold = _text(rng, _CHINESE, ""), _text(rng, _CHINESE, "")
        first, second = _cmrc_segments(predicted), _cmrc_segments(gold)
        run = _common_run(first, second)
        expected = 0.0
        if run:
            precision, recall = run / len(first), run / len(second)
            expected = 2 * precision * recall / (precision + recall)
        assert cmrc_f1(predicted, gold) == pytest.approx(expected, abs=1e-12), (predicted, gold)
        strip = str.maketrans("", "", _MARKS)
        plain = [text.lower().strip().translate(strip) for text in (predicted, gold)]
        assert cmrc_exact(predicted, gold) == (plain[0] == plain[1])


def test_cmrc_examples_by_hand():
    assert cmrc_f1("北京大学", "在北京大学。") == pytest.approx(2 * 4 / (4 + 5))
    assert cmrc_exact("《北京》", "北京") == 1.0
    assert answer_scores(["北京"], [["上海", "北京"]], "zh") == {"exact_match": 100.0, "f1": 100.0}


def test_entities_are_read_back_from_random_tags(rng):
    for _ in range(CASES):
        tags, expected, position = [], set(), 0
        while position < 12:
            kind = ["O", "PER", "LOC"][int(rng.integers(3))]
            size = 1 if kind == "O" else int(rng.integers(1, 4))
            if kind == "O":
                tags.append("O")
            else:
                tags += [f"B-{kind}", *[f"I-{kind}"] * (size - 1)]
                expected.add((kind, position, position + size))
            position += size
        assert metrics.entities(tags) == expected


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["I-PER", "I-PER", "O"], {("PER", 0, 2)}),
        (["B-PER", "I-LOC"], {("PER", 0, 1), ("LOC", 1, 2)}),
        (["B-PER", "E-PER", "S-PER"], {("PER", 0, 2), ("PER", 2, 3)}),
        (["O"], set()),
    ],
)
def test_entities_of_other_schemes(tags, expected):
    assert metrics.entities(tags) == expected


def test_entity_scores_by_hand():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "B-LOC"]]
    assert metrics.entity_scores(predicted, gold) == {
        "entity_precision": pytest.approx(2 / 3),
        "entity_recall": pytest.approx(2 / 3),
        "entity_f1": pytest.approx(2 / 3),
    }
