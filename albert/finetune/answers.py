"""Exact match and F1 of answer texts, as the official scripts of SQuAD 1.1/2.0 and CMRC2018 define them.

One difference: CMRC's script cuts non-Chinese runs with NLTK's Penn Treebank tokenizer; here they are
numbers, words and single marks, which needs no download and differs for English contractions only.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CMRC_MARKS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』") | {"……"}
_CHINESE = re.compile(r"[\u4e00-\u9fa5]")
_OTHER_TOKENS = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")


def answer_scores(predicted: Sequence[str], gold: Sequence[Sequence[str]], language: str) -> dict[str, float]:
    """Mean over the questions of the best score against any gold answer, in percent as is usual.

    Args:
        predicted: answer of every question; empty for no answer.
        gold: answers of every question; none for an unanswerable one (SQuAD 2.0).
        language: `en` for SQuAD's definitions, `zh` for CMRC2018's.
    """
    exact, overlap = (cmrc_exact, cmrc_f1) if language == "zh" else (squad_exact, squad_f1)
    normalise = (lambda text: text) if language == "zh" else normalise_english
    scores: dict[str, list[float]] = {"exact_match": [], "f1": []}
    for guess, answers in zip(predicted, gold, strict=True):
        # The official script of SQuAD 2.0: without an answer that survives normalisation the gold is empty.
        golds = [answer for answer in answers if normalise(answer)] or [""]
        scores["exact_match"].append(max(exact(guess, answer) for answer in golds))
        scores["f1"].append(max(overlap(guess, answer) for answer in golds))
    result = {name: 100 * sum(values) / len(values) for name, values in scores.items()}
    answerable = [bool(answers) for answers in gold]
    if not all(answerable):
        result |= _by_answerability(scores, answerable)
    return result


def _by_answerability(scores: dict[str, list[float]], answerable: list[bool]) -> dict[str, float]:
    """The scores of questions with and without an answer apart."""
    result = {}
    for prefix, wanted in (("has_answer", True), ("no_answer", False)):
        for name, values in scores.items():
            chosen = [value for value, has in zip(values, answerable, strict=True) if has == wanted]
            if chosen:
                result[f"{prefix}_{name}"] = 100 * sum(chosen) / len(chosen)
    return result


def normalise_english(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and surplus spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact(predicted: str, gold: str) -> float:
    """1 where both are equal after normalisation."""
    return float(normalise_english(predicted) == normalise_english(gold))


def squad_f1(predicted: str, gold: str) -> float:
    """F1 of the bags of words."""
    guess, answer = normalise_english(predicted).split(), normalise_english(gold).split()
    if not guess or not answer:
        return float(guess == answer)
    shared = sum((Counter(guess) & Counter(answer)).values())
    return 2 * shared / (len(guess) + len(answer))


def cmrc_exact(predicted: str, gold: str) -> float:
    """1 where both are equal in lower case without the listed marks."""
    return float(_without_marks(predicted) == _without_marks(gold))


def cmrc_f1(predicted: str, gold: str) -> float:
    """F1 of the longest common run of Chinese characters and other words."""
    guess, answer = cmrc_tokens(predicted), cmrc_tokens(gold)
    run = _longest_common_run(guess, answer)
    return 2 * run / (len(guess) + len(answer)) if run else 0.0


def _without_marks(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _CMRC_MARKS)


def cmrc_tokens(text: str) -> list[str]:
    """Chinese characters one by one, everything else in words; the listed marks are dropped."""
    tokens: list[str] = []
    other = ""
    tail: Callable[[str], list[str]] = _OTHER_TOKENS.findall
    for character in _without_marks(text):
        if _CHINESE.match(character):
            tokens += [*tail(other), character]
            other = ""
        else:
            other += character
    return tokens + tail(other)


def _longest_common_run(first: list[str], second: list[str]) -> int:
    """Length of the longest common contiguous run."""
    best = 0
    previous = [0] * (len(second) + 1)
    for token in first:
        current = [0] * (len(second) + 1)
        for index, other in enumerate(second):
            if token == other:
                current[index + 1] = previous[index] + 1
                best = max(best, current[index + 1])
        previous = current
    return best
