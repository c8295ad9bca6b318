"""Classification, regression and tagging metrics in numpy, equal to scikit-learn's, scipy's and seqeval's.

A score that is undefined (one class only, constant numbers) is 0.0, as scikit-learn has it, so that a
collapsed model gets a number that can be compared and written as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[Any]


def accuracy(predicted: Labels, gold: Labels) -> float:
    """Share of equal entries."""
    return float((predicted == gold).mean())


def majority_accuracy(gold: Labels) -> float:
    """Accuracy of always answering the most frequent class: what any model has to beat."""
    return float(np.unique(gold, return_counts=True)[1].max() / len(gold))


def confusion(predicted: Labels, gold: Labels, num_labels: int) -> NDArray[np.int64]:
    """Counts [gold, predicted] of class indices."""
    flat = np.asarray(gold, dtype=np.int64) * num_labels + np.asarray(predicted, dtype=np.int64)
    return np.bincount(flat, minlength=num_labels * num_labels).reshape(num_labels, num_labels)


def f1(predicted: Labels, gold: Labels, positive: int = 1) -> float:
    """F1 of one class, 2 TP / (2 TP + FP + FN)."""
    hits = int(((predicted == positive) & (gold == positive)).sum())
    total = int((predicted == positive).sum() + (gold == positive).sum())
    return 2 * hits / total if total else 0.0


def macro_f1(predicted: Labels, gold: Labels) -> float:
    """Unweighted mean of the F1 of every class that occurs in either."""
    classes = np.union1d(predicted, gold)
    return float(np.mean([f1(predicted, gold, positive) for positive in classes]))


def matthews(predicted: Labels, gold: Labels, num_labels: int) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004)."""
    table = confusion(predicted, gold, num_labels).astype(np.float64)
    total, hits = table.sum(), np.trace(table)
    golds, guesses = table.sum(axis=1), table.sum(axis=0)
    covariance = hits * total - golds @ guesses
    norm = np.sqrt(total**2 - guesses @ guesses) * np.sqrt(total**2 - golds @ golds)
    return float(np.clip(covariance / norm, -1.0, 1.0)) if norm else 0.0


def pearson(predicted: NDArray[Any], gold: NDArray[Any]) -> float:
    """Pearson correlation; 0 where either is constant."""
    x = np.asarray(predicted, dtype=np.float64) - np.mean(predicted, dtype=np.float64)
    y = np.asarray(gold, dtype=np.float64) - np.mean(gold, dtype=np.float64)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.clip(x @ y / norm, -1.0, 1.0)) if norm else 0.0


def spearman(predicted: NDArray[Any], gold: NDArray[Any]) -> float:
    """Pearson correlation of ranks; ties share their mean rank."""
    return pearson(_ranks(np.asarray(predicted)), _ranks(np.asarray(gold)))


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last + 1) / 2)[inverse]


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of BIO, IOB1 or BIOES tags, by the rules of conlleval."""
    found: set[tuple[str, int, int]] = set()
    start, kind = 0, ""
    previous = "O"
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        continues = kind and name == kind and prefix in {"I", "E"} and previous not in {"E", "S"}
        if not continues:
            if kind:
                found.add((kind, start, index))
            start, kind = index, name if prefix != "O" else ""
        previous = prefix
    return found


def entity_scores(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities over all sentences."""
    hits = num_predicted = num_gold = 0
    for guess_tags, gold_tags in zip(predicted, gold, strict=True):
        guesses, golds = entities(guess_tags), entities(gold_tags)
        hits += len(guesses & golds)
        num_predicted += len(guesses)
        num_gold += len(golds)
    return {
        "entity_precision": hits / num_predicted if num_predicted else 0.0,
        "entity_recall": hits / num_gold if num_gold else 0.0,
        "entity_f1": 2 * hits / (num_predicted + num_gold) if num_predicted + num_gold else 0.0,
    }


def classification_scores(predicted: Labels, gold: Labels, num_labels: int) -> dict[str, float]:
    """All scores of a classification; `f1` is that of class 1 and only given for two classes."""
    scores = {
        "accuracy": accuracy(predicted, gold),
        "majority_accuracy": majority_accuracy(gold),
        "macro_f1": macro_f1(predicted, gold),
        "matthews": matthews(predicted, gold, num_labels),
    }
    return {**scores, "f1": f1(predicted, gold)} if num_labels == 2 else scores


def regression_scores(predicted: NDArray[Any], gold: NDArray[Any]) -> dict[str, float]:
    """Both correlations and the mean squared error."""
    error = np.asarray(predicted, dtype=np.float64) - np.asarray(gold, dtype=np.float64)
    return {
        "pearson": pearson(predicted, gold),
        "spearman": spearman(predicted, gold),
        "mean_squared_error": float(np.mean(error**2)),
    }
