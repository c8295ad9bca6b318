"""Readers of the tasks' own forms: SQuAD JSON, RACE, C3, CoNLL columns. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from albert.errors import DataError, MissingInputError
from albert.finetune.examples import ChoiceExample, Example, SpanExample, TagExample
from albert.finetune.rows import BadRow, read_lines, read_rows

Reader = Callable[[Path, str], tuple[list[Example], list[BadRow]]]
_LETTERS = "ABCDEFGH"


def _load_json(path: Path) -> Any:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise MissingInputError(f"{path}: the file is empty")
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{json.dumps(value, ensure_ascii=False)[:40]}, which is no text")
    return value


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} at {error}"


def read_squad(path: Path, split: str) -> tuple[list[Example], list[BadRow]]:
    """SQuAD's JSON, also CMRC2018's; rows are counted over the questions."""
    raw = _load_json(path)
    examples: list[Example] = []
    bad: list[BadRow] = []
    try:
        paragraphs = [paragraph for article in raw["data"] for paragraph in article["paragraphs"]]
        questions = [
            (paragraph, question) for paragraph in paragraphs for question in paragraph.get("qas", [])
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no list of 'data' with 'paragraphs'; this is not SQuAD's JSON") from error
    for number, (paragraph, question) in enumerate(questions, start=1):
        try:
            examples.append(_span_example(_text(paragraph["context"]), question, split))
        except (KeyError, TypeError, ValueError) as error:
            bad.append(BadRow(number, _reason(error)))
    return examples, bad


def _span_example(context: str, question: dict[str, Any], split: str) -> SpanExample:
    is_labelled = "answers" in question
    if not is_labelled and split != "test":
        raise ValueError("a question without 'answers'")
    answers = tuple((_text(a["text"]), int(a["answer_start"])) for a in question.get("answers", []))
    impossible = bool(question.get("is_impossible", is_labelled and not answers))
    guid = str(question["id"]).strip()
    return SpanExample(guid, _text(question["question"]), context, answers, impossible, is_labelled)


def read_race(path: Path, split: str) -> tuple[list[Example], list[BadRow]]:
    """RACE: a folder of JSON files (also in `middle` and `high`), or one object per line."""
    bad: list[BadRow] = []
    passages: list[tuple[str, Any]] = []
    if path.is_dir():
        files = sorted(path.rglob("*.txt")) or sorted(path.rglob("*.json"))
        passages = [(file.stem, _load_json(file)) for file in files]
    else:
        for row in read_rows(path):
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                passages.append((str(row.number), row.fields))
    if not passages and not bad:
        raise MissingInputError(f"{path}: no RACE passage there")
    examples: list[Example] = []
    for number, (name, passage) in enumerate(passages, start=1):
        try:
            examples += _passage_examples(name, passage, split)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            bad.append(BadRow(number, _reason(error)))
    return examples, bad


def _passage_examples(name: str, passage: Any, split: str) -> list[ChoiceExample]:
    examples = []
    answers = passage.get("answers") or [None] * len(passage["questions"])
    triples = zip(passage["questions"], passage["options"], answers, strict=True)
    for index, (question, options, answer) in enumerate(triples):
        label = _LETTERS.index(answer) if answer is not None else None
        _check_choice(label, options, split)
        guid = f"{passage.get('id', name)}-{index}"
        texts = tuple(_text(option) for option in options)
        examples.append(ChoiceExample(guid, _text(passage["article"]), _text(question), texts, label))
    return examples


def read_c3(path: Path, split: str) -> tuple[list[Example], list[BadRow]]:
    """C3: an array of [[sentences], [{question, choice, answer}], id]; CLUE's test questions have an id too.

    The data set comes in two files per split, m-SPLIT.json (texts) and d-SPLIT.json (dialogues); both are read.
    """
    examples: list[Example] = []
    bad: list[BadRow] = []
    dialogues = path.with_name(f"d-{path.name[2:]}")
    for file in [path, dialogues] if path.name.startswith("m-") and dialogues.exists() else [path]:
        entries = _load_json(file)
        if not isinstance(entries, list):
            raise DataError(f"{file}: not an array; this is not C3's JSON")
        where = "" if file == path else f"{file.name}: "
        for number, entry in enumerate(entries, start=1):
            try:
                examples += _c3_examples(entry, split)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                bad.append(BadRow(number, where + _reason(error)))
    return examples, bad


def _c3_examples(entry: Any, split: str) -> list[ChoiceExample]:
    sentences, questions, name = entry
    context = "\n".join(sentences)
    examples = []
    for index, question in enumerate(questions):
        options = tuple(_text(option) for option in question["choice"])
        label = options.index(question["answer"]) if question.get("answer") else None
        _check_choice(label, options, split)
        guid = str(question.get("id", f"{name}-{index}"))
        examples.append(ChoiceExample(guid, context, _text(question["question"]), options, label))
    return examples


def _check_choice(label: int | None, options: Any, split: str) -> None:
    if label is None and split != "test":
        raise ValueError("a question without an answer")
    if len(options) < 2 or (label is not None and label >= len(options)):
        raise ValueError(f"{len(options)} options, answer {label}")


def read_conll(path: Path, split: str) -> tuple[list[Example], list[BadRow]]:
    """One word per line, first column the word, last column the tag, blank lines between sentences."""
    examples: list[Example] = []
    bad: list[BadRow] = []
    words: list[str] = []
    tags: list[str] = []

    def close_sentence() -> None:
        if words:
            is_labelled = len(tags) == len(words)
            examples.append(
                TagExample(str(len(examples)), tuple(words), tuple(tags) if is_labelled else None)
            )
        words.clear()
        tags.clear()

    for number, line in read_lines(path):
        if isinstance(line, BadRow):
            bad.append(line)
            continue
        cells = line.split()
        if not cells or cells[0] == "-DOCSTART-":
            close_sentence()
            continue
        if len(cells) == 1 and split != "test":
            bad.append(BadRow(number, f"word '{cells[0]}' has no tag"))
            continue
        words.append(cells[0])
        if len(cells) > 1:
            tags.append(cells[-1])
    close_sentence()
    return examples, bad


READERS: dict[str, Reader] = {
    "squad": read_squad,
    "race": read_race,
    "c3": read_c3,
    "conll": read_conll,
}
