"""The training of one run: go on or start, train, leave the engine with the best weights and OUTPUT/model on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from albert.config import LogConfig
from albert.deepspeed_config import complete_placement, read_placement
from albert.distributed import World
from albert.durable_files import write_file_durably
from albert.engine import Engine
from albert.errors import PreemptedError
from albert.finetune.artefacts import RESULTS_NAME, update_results
from albert.finetune.collapse import collapse_warning
from albert.finetune.loop import FineTuner
from albert.finetune.preparation import Prepared
from albert.finetune.resume import TuningCheckpoints, finished_results, identify
from albert.finetune.settings import FinetuneSettings
from albert.finetune.task_card import TaskCard
from albert.model_config import model_config_bytes
from albert.monitoring import Monitor
from albert.precision import default_precision
from albert.pretrained import check_replaceable, load_pretrained, save_pretrained
from albert.stopping import StopRequest
from albert.watchdog import Watchdog

MODEL_NAME = "model"
_SHOWN_METRICS = {
    "train": ("loss", "learning_rate", "examples_per_s"),
    "eval": (
        "accuracy", "majority_accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman",
        "exact_match", "entity_f1",
    ),
}  # fmt: skip


def build_engine(model: torch.nn.Module, settings: FinetuneSettings, world: World) -> Engine:
    """The pretrainer's engine with AdamW."""
    precision = settings.precision
    if precision == "auto":
        precision = default_precision(world.device)
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


def train(
    prepared: Prepared,
    settings: FinetuneSettings,
    engine: Engine,
    output: Path,
    stop: StopRequest,
    watchdog: Watchdog,
) -> dict[str, Any]:
    """Train, or go on, or do nothing where this very training is finished; the engine gets the best weights.

    Returns:
        What results.json says of the training; it is written before the checkpoints are removed.

    Raises:
        PreemptedError: a signal stopped the training.
        ConfigError: the directory holds another training, finished or interrupted.
        UnsafeError: OUTPUT/model holds files that are not the model's.
    """
    identity = identify(prepared, settings)
    finished = finished_results(output, identity)
    if finished:
        engine.load_weights(load_pretrained(output / MODEL_NAME)[1])
        return dict(finished["training"])
    check_replaceable(output / MODEL_NAME)  # on all ranks, so that none waits for another
    began_at = time.perf_counter()
    world = engine.world
    checkpoints = TuningCheckpoints(output, identity, _model_files(prepared), engine, world)
    resumed = checkpoints.resume()
    if world.is_main:
        (output / RESULTS_NAME).unlink(missing_ok=True)  # of an evaluation of another model
    first_step = resumed[0].step if resumed else 0
    monitor = _open_monitor(prepared, settings, output, first_step) if world.is_main else None
    with monitor or contextlib.nullcontext():
        tuner = FineTuner(
            settings, engine, train=prepared.data["train"], dev=prepared.data.get("dev"), monitor=monitor, stop=stop,
            checkpoints=checkpoints, watchdog=watchdog,
        )  # fmt: skip
        if resumed:
            tuner.go_on_from(*resumed)
        warning = _fit(prepared, tuner, output)
    watchdog.enter("save", tuner.progress.step)
    if resumed:  # on other ranks, other weights may have been saved meanwhile
        _save_model(prepared, tuner, output)
    engine.load_weights(tuner.best)
    seconds = round(time.perf_counter() - began_at, 3)
    result = {
        "fingerprint": identity.fingerprint,
        "identity": dataclasses.asdict(identity),
        "seconds": seconds,
        **_outcome(tuner, warning),
    }
    if world.is_main:
        update_results(output, {"training": result})
    checkpoints.remove()
    return result


def _fit(prepared: Prepared, tuner: FineTuner, output: Path) -> str | None:
    """Train to the end; returns a warning where the model has collapsed.

    Raises:
        PreemptedError: a signal stopped the training.
    """
    if not tuner.fit(lambda: _save_model(prepared, tuner, output)):
        raise PreemptedError(_interrupted(tuner))
    warning = collapse_warning(prepared, tuner.settings, tuner.progress)
    if warning and tuner.monitor:
        tuner.monitor.event(tuner.progress.step, warning)
    return warning


def _outcome(tuner: FineTuner, warning: str | None) -> dict[str, Any]:
    """What results.json says of a training that is finished."""
    progress = tuner.progress
    return {
        "settings": tuner.settings.model_dump(),
        "steps": progress.step,
        "best_step": progress.best_step,
        "best_score": progress.best_score,
        "stopped_early": progress.stopped_early,
        "collapsed": warning is not None,
        "history": progress.history,
    }


def _interrupted(tuner: FineTuner) -> str:
    reason = tuner.stop.signal_name or "a signal to another rank"
    step = tuner.progress.step
    state = "checkpoint committed" if step else "nothing was done yet"
    return f"step {step} of {tuner.num_steps} ({reason}), {state}; give the same command again to go on"


def _model_files(prepared: Prepared) -> dict[str, bytes]:
    path = prepared.tokenizer.path
    return {"config.json": model_config_bytes(prepared.config), path.name: path.read_bytes()}


def _open_monitor(prepared: Prepared, settings: FinetuneSettings, output: Path, first_step: int) -> Monitor:
    text = yaml.safe_dump({"task": prepared.task.name, **settings.model_dump()}, sort_keys=False)
    write_file_durably(output / "config.yaml", [text.encode()])
    num_steps = settings.num_steps(len(prepared.data["train"].lengths))
    log = LogConfig(
        interval_steps=settings.log_interval_steps,
        tensorboard=settings.tensorboard,
        progress=settings.progress,
    )
    monitor = Monitor(output, log, first_step, num_steps, shown=_SHOWN_METRICS)
    if first_step:
        monitor.event(first_step, "resumed")
    sizes = ", ".join(f"{name} {counts['examples']:,}" for name, counts in prepared.summary().items())
    monitor.print(
        f"fine-tuning {prepared.task.name} ({sizes} examples), {num_steps:,} steps from {prepared.source}"
    )
    return monitor


def _save_model(prepared: Prepared, tuner: FineTuner, output: Path) -> None:
    """OUTPUT/model: the best weights."""
    if not tuner.world.is_main:
        return
    columns = prepared.task.columns
    card = TaskCard(
        task=prepared.task.name,
        kind=prepared.task.kind,
        labels=prepared.labels,
        max_seq_length=prepared.max_seq_length,
        metric=tuner.settings.metric,
        score=tuner.progress.best_score,
        seed=tuner.settings.seed,
        options=dict(prepared.task.options),
        is_pair=columns.text_b is not None if columns else None,
    )
    files = {"task.json": card.encode()}
    save_pretrained(output / MODEL_NAME, prepared.config, tuner.best, prepared.tokenizer.path, files)
