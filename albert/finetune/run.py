"""One fine-tuning run: train, keep the best weights, evaluate, write what was asked for."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from albert.distributed import World, barrier
from albert.engine import Engine
from albert.errors import DataError
from albert.finetune.artefacts import update_results, write_predictions, write_submission
from albert.finetune.loop import evaluate_rows
from albert.finetune.preparation import Prepared
from albert.finetune.request import Request
from albert.finetune.review import write_review
from albert.finetune.settings import FinetuneSettings
from albert.finetune.task_model import build_model, initialise
from albert.finetune.text_data import TextData
from albert.finetune.training import build_engine, train
from albert.stopping import StopRequest
from albert.watchdog import Watchdog


def run_once(
    prepared: Prepared,
    request: Request,
    settings: FinetuneSettings,
    output: Path,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
) -> dict[str, Any]:
    """Train and evaluate once; returns what results.json holds.

    Raises:
        PreemptedError: a signal stopped the training; its checkpoint is committed.
    """
    watchdog.enter("start", 0)
    if world.is_main:
        output.mkdir(parents=True, exist_ok=True)
    barrier()
    model = build_model(prepared.task, prepared.labels, prepared.config, settings.seed)
    fresh = initialise(
        model,
        prepared.weights,
        str(prepared.source),
        keeps_head=prepared.keeps_head,
        reinit_pooler=settings.reinit_pooler,
    )
    engine = build_engine(model, settings, world)
    results: dict[str, Any] = {
        "task": prepared.task.name,
        "kind": prepared.task.kind,
        "model": str(prepared.source),
        "labels": list(prepared.labels),
        "fresh_parameters": fresh,
        "max_seq_length": prepared.max_seq_length,
        "data": prepared.summary(),
        "environment": {
            "ranks": world.size,
            "device": str(world.device),
            "python": platform.python_version(),
        },
    }
    if request.do_train:
        results["training"] = train(prepared, settings, engine, output, stop, watchdog)
    num_steps = results["training"]["steps"] if request.do_train else 0
    on_batch = partial(watchdog.enter, "evaluate", num_steps)
    results["splits"] = _evaluate_splits(prepared, request, settings, engine, output, on_batch)
    if world.is_main:
        update_results(output, results)
    return results


def _evaluate_splits(
    prepared: Prepared,
    request: Request,
    settings: FinetuneSettings,
    engine: Engine,
    output: Path,
    on_batch: Callable[[], None],
) -> dict[str, dict[str, float]]:
    """Metrics and predictions of dev (--do-eval) and test (--do-test, --do-predict)."""
    results = {}
    wanted = [("dev", request.do_eval), ("test", request.do_test or request.do_predict)]
    for name, is_wanted in wanted:
        if not is_wanted:
            continue
        data = prepared.data[name]
        if name == "test" and request.do_test and not data.is_labelled:
            raise DataError(f"{data.split.path}: the file has no labels to test against; use --do-predict")
        rows = evaluate_rows(engine, data, settings.eval_batch_size, on_batch)
        if data.is_labelled:
            results[name] = data.scores(rows)
        if engine.world.is_main:
            _write_split(prepared, request, name, data.predictions(rows), output)
            if isinstance(data, TextData) and data.is_labelled and not data.is_regression:
                write_review(output, data, rows)
            if name in results:
                sys.stderr.write(format_scores(name, results[name]) + "\n")
    return results


def _write_split(
    prepared: Prepared, request: Request, name: str, predictions: list[dict[str, Any]], output: Path
) -> None:
    path = write_predictions(output, name, predictions)
    sys.stderr.write(f"{len(predictions):,} predictions written: {path}\n")
    if name == "test" and request.do_predict:
        submission = write_submission(output, prepared.task, predictions, prepared.data[name].split.path)
        if submission:
            sys.stderr.write(f"submission written: {submission}\n")


def format_scores(name: str, scores: Mapping[str, float]) -> str:
    """One line of metrics for people."""
    return f"{name}: " + "  ".join(f"{key} {value:.4f}" for key, value in scores.items())
