"""One fine-tuning run: train, keep the best weights, evaluate, write what was asked for."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from albert.config import LogConfig
from albert.deepspeed_config import complete_placement, read_placement
from albert.distributed import World, barrier
from albert.durable_files import write_file_durably
from albert.engine import Engine
from albert.errors import DataError, PreemptedError
from albert.finetune.artefacts import update_results, write_predictions, write_submission
from albert.finetune.collapse import collapse_warning
from albert.finetune.loop import FineTuner, Progress, evaluate_rows, gather_weights
from albert.finetune.preparation import Prepared
from albert.finetune.request import Request
from albert.finetune.review import write_review
from albert.finetune.settings import FinetuneSettings
from albert.finetune.task_card import TaskCard
from albert.finetune.task_model import build_model, initialise
from albert.finetune.text_data import TextData
from albert.monitoring import Monitor
from albert.pretrained import save_pretrained
from albert.stopping import StopRequest

MODEL_NAME = "model"
SHOWN_METRICS = {
    "train": ("loss", "learning_rate", "examples_per_s"),
    "eval": (
        "accuracy", "majority_accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman",
        "exact_match", "entity_f1",
    ),
}  # fmt: skip


def run_once(
    prepared: Prepared,
    request: Request,
    settings: FinetuneSettings,
    output: Path,
    world: World,
    stop: StopRequest,
) -> dict[str, Any]:
    """Train and evaluate once; returns what results.json holds.

    Raises:
        PreemptedError: a signal stopped the training.
    """
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
        results |= _train(prepared, settings, engine, output, world, stop)
    results["splits"] = _evaluate_splits(prepared, request, settings, engine, output, world)
    if world.is_main:
        update_results(output, results)
    return results


def build_engine(model: torch.nn.Module, settings: FinetuneSettings, world: World) -> Engine:
    """The pretrainer's engine with AdamW."""
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if world.device.type == "cuda" else "fp32"
    micro, accumulation = settings.micro_batches(world.size)
    placement = complete_placement(
        read_placement(settings.deepspeed),
        precision=precision,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        world_size=world.size,
        max_grad_norm=settings.max_grad_norm,
    )
    return Engine(model, settings.optimizer_config(), placement, world)


def _train(
    prepared: Prepared,
    settings: FinetuneSettings,
    engine: Engine,
    output: Path,
    world: World,
    stop: StopRequest,
) -> dict[str, Any]:
    """Train, leave the engine with the best weights and OUTPUT/model on disk."""
    monitor = _open_monitor(prepared, settings, output) if world.is_main else None
    best: dict[str, Tensor] = {}
    began_at = time.perf_counter()
    with monitor or contextlib.nullcontext():
        tuner = FineTuner(
            settings, engine, world,
            train=prepared.data["train"], dev=prepared.data.get("dev"), monitor=monitor, stop=stop,
        )  # fmt: skip

        def keep(progress: Progress) -> None:
            best.clear()
            best.update(gather_weights(engine))
            if world.is_main:
                _save_model(prepared, settings, progress, best, output)

        is_finished = tuner.fit(keep)
        if not is_finished:
            raise PreemptedError(_interrupted(tuner, stop, output))
        progress = tuner.progress
        warning = collapse_warning(prepared, settings, progress)
        if warning and monitor:
            monitor.event(progress.step, warning)
    engine.load_weights(best)
    if progress.step == 0 or not best:
        return {}
    return {
        "training": {
            "settings": settings.model_dump(),
            "steps": progress.step,
            "seconds": round(time.perf_counter() - began_at, 3),
            "best_step": progress.best_step,
            "best_score": progress.best_score if progress.history else None,
            "stopped_early": progress.stopped_early,
            "collapsed": warning is not None,
            "history": progress.history,
        }
    }


def _interrupted(tuner: FineTuner, stop: StopRequest, output: Path) -> str:
    kept = (
        f"the best model so far is in {output / MODEL_NAME}"
        if tuner.progress.best_step
        else "no model was kept"
    )
    return (
        f"{stop.signal_name or 'a signal to another rank'} at step {tuner.progress.step} of {tuner.num_steps}; "
        f"{kept}; the same command trains from the beginning"
    )


def _open_monitor(prepared: Prepared, settings: FinetuneSettings, output: Path) -> Monitor:
    text = yaml.safe_dump({"task": prepared.task.name, **settings.model_dump()}, sort_keys=False)
    write_file_durably(output / "config.yaml", [text.encode()])
    num_steps = settings.num_steps(len(prepared.data["train"].lengths))
    log = LogConfig(
        interval_steps=settings.log_interval_steps,
        tensorboard=settings.tensorboard,
        progress=settings.progress,
    )
    monitor = Monitor(output, log, 0, num_steps, shown=SHOWN_METRICS)
    sizes = ", ".join(f"{name} {counts['examples']:,}" for name, counts in prepared.summary().items())
    monitor.print(
        f"fine-tuning {prepared.task.name} ({sizes} examples), {num_steps:,} steps from {prepared.source}"
    )
    return monitor


def _save_model(
    prepared: Prepared,
    settings: FinetuneSettings,
    progress: Progress,
    weights: Mapping[str, Tensor],
    output: Path,
) -> None:
    card = TaskCard(
        task=prepared.task.name,
        kind=prepared.task.kind,
        labels=prepared.labels,
        max_seq_length=prepared.max_seq_length,
        metric=settings.metric,
        score=progress.best_score if progress.history else None,
        seed=settings.seed,
    )
    save_pretrained(
        output / MODEL_NAME, prepared.config, weights, prepared.tokenizer.path, {"task.json": card.encode()}
    )


def _evaluate_splits(
    prepared: Prepared,
    request: Request,
    settings: FinetuneSettings,
    engine: Engine,
    output: Path,
    world: World,
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
        rows = evaluate_rows(engine, data, world, settings.eval_batch_size)
        if data.is_labelled:
            results[name] = data.scores(rows)
        if world.is_main:
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
        submission = write_submission(output, prepared.task, predictions)
        if submission:
            sys.stderr.write(f"submission written: {submission}\n")


def format_scores(name: str, scores: Mapping[str, float]) -> str:
    """One line of metrics for people."""
    return f"{name}: " + "  ".join(f"{key} {value:.4f}" for key, value in scores.items())
