"""What a fine-tuning run leaves behind: predictions, submission files, results.json. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from albert.durable_files import write_file_durably
from albert.finetune.task_definition import Task

RESULTS_NAME = "results.json"


def predictions_path(output: Path, split: str) -> Path:
    """Where the predictions of a split are."""
    return output / f"predictions-{split}.jsonl"


def write_predictions(output: Path, split: str, predictions: Sequence[Mapping[str, Any]]) -> Path:
    """predictions-SPLIT.jsonl: one object per example, in the order of the file."""
    path = predictions_path(output, split)
    lines = (json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    write_file_durably(path, (line.encode() for line in lines))
    return path


def write_submission(
    output: Path, task: Task, predictions: Sequence[Mapping[str, Any]], test_file: Path
) -> Path | None:
    """The file that the benchmark's server takes: GLUE's TSV, CLUE's JSON lines, or SQuAD's JSON.

    Args:
        output: directory of the run.
        task: names the file and its form; None is returned where it has none.
        predictions: of the test file, in its order.
        test_file: where CLUE changed a test set, `test1.0.json` is the old one and any other name the new one.
    """
    if task.kind == "span":
        answers = {prediction["id"]: prediction["prediction"] for prediction in predictions}
        path, text = output / "answers.json", json.dumps(answers, ensure_ascii=False) + "\n"
    elif task.submission is None:
        return None
    else:
        form, name = task.submission
        path = output / name.replace("*", "10" if test_file.name == "test1.0.json" else "11")
        text = _glue_text(predictions) if form == "glue" else _clue_text(predictions)
    write_file_durably(path, [text.encode()])
    return path


def _glue_text(predictions: Sequence[Mapping[str, Any]]) -> str:
    rows = [f"{prediction['id']}\t{prediction['prediction']}" for prediction in predictions]
    return "\n".join(["index\tprediction", *rows]) + "\n"


def _clue_text(predictions: Sequence[Mapping[str, Any]]) -> str:
    """A label is a string; that of multiple choice is the number of the option, from 0."""
    rows = [
        {"id": int(p["id"]) if str(p["id"]).isdigit() else p["id"], "label": p["prediction"]}
        for p in predictions
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_results(output: Path) -> dict[str, Any]:
    """Content of results.json; empty where there is none, or one that is no JSON."""
    try:
        return dict(json.loads((output / RESULTS_NAME).read_bytes()))
    except (FileNotFoundError, ValueError):
        return {}


def update_results(output: Path, values: Mapping[str, Any]) -> Path:
    """Merge values into results.json, so that a later --do-test adds to what --do-train wrote."""
    path, old = output / RESULTS_NAME, read_results(output)
    merged = {**old, **values}
    for key in ("splits", "data"):
        merged[key] = {**old.get(key, {}), **values.get(key, {})}
    write_file_durably(path, [(json.dumps(merged, indent=2, ensure_ascii=False) + "\n").encode()])
    return path
