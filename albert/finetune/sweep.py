"""Several trainings of one task: seeds, learning rates, and the table that compares them."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from albert.distributed import World, min_over_ranks
from albert.durable_files import write_file_durably
from albert.finetune.artefacts import predictions_path
from albert.finetune.preparation import Prepared
from albert.finetune.request import Request
from albert.finetune.resume import finished_results, identify
from albert.finetune.run import run_once
from albert.finetune.settings import FinetuneSettings
from albert.stopping import StopRequest
from albert.watchdog import Watchdog

SWEEP_NAME = "sweep.json"


def run_sweep(
    prepared: Prepared,
    request: Request,
    settings: FinetuneSettings,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
) -> dict[str, Any]:
    """Train with every learning rate and seed; OUTPUT/lr-RATE/seed-N each holds a complete run.

    Returns:
        What sweep.json holds: every run, and mean and deviation by learning rate.

    Raises:
        ConfigError: a directory of the sweep holds another training.
    """
    output = Path(request.output)
    grid = {
        output / f"lr-{rate:g}" / f"seed-{seed}": settings.model_copy(
            update={"learning_rate": rate, "seed": seed}
        )
        for rate in request.learning_rates or (settings.learning_rate,)
        for seed in range(settings.seed, settings.seed + request.num_seeds)
    }
    # All of them before the first one is trained: another training in one directory refuses the sweep.
    finished = {path: _finished_run(prepared, request, changed, path) for path, changed in grid.items()}
    runs: list[dict[str, Any]] = []
    for directory, changed in grid.items():
        results = finished[directory]
        results = results or run_once(prepared, request, changed, directory, world, stop, watchdog)
        runs.append(_run_entry(changed.learning_rate, changed.seed, directory, results))
        gc.collect()  # the engine's buffers, before the next one is built
    summary = {
        "task": prepared.task.name,
        "metric": settings.metric,
        "model": str(prepared.source),
        "runs": runs,
        "by_learning_rate": summarise(runs, settings.metric),
    }
    if world.is_main:
        write_file_durably(output / SWEEP_NAME, [(json.dumps(summary, indent=2) + "\n").encode()])
        table = markdown_table(summary)
        write_file_durably(output / "sweep.md", [table.encode()])
        sys.stderr.write(f"\n{table}\nwritten: {output / SWEEP_NAME}, sweep.md\n")
    return summary


def _finished_run(
    prepared: Prepared, request: Request, settings: FinetuneSettings, directory: Path
) -> dict[str, Any] | None:
    """Results of a run that an earlier call of the same command finished; None if it has to be done."""
    results = finished_results(directory, identify(prepared, settings))
    splits = results["splits"] if results else {}
    has_scores = "dev" in splits and ("test" in splits or not request.do_test)
    has_answers = predictions_path(directory, "test").is_file() or not request.do_predict
    return results if min_over_ranks(int(has_scores and has_answers)) else None


def _run_entry(rate: float, seed: int, directory: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "learning_rate": rate,
        "seed": seed,
        "directory": str(directory),
        "collapsed": results["training"]["collapsed"],
        "splits": results["splits"],
    }


def summarise(runs: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Mean, sample deviation and best of the metric on every split, by learning rate, best dev mean first."""
    rows = []
    for rate in dict.fromkeys(run["learning_rate"] for run in runs):
        chosen = [run for run in runs if run["learning_rate"] == rate]
        row: dict[str, Any] = {
            "learning_rate": rate,
            "num_seeds": len(chosen),
            "num_collapsed": sum(run["collapsed"] for run in chosen),
        }
        for split in chosen[0]["splits"]:
            values = [run["splits"][split][metric] for run in chosen]
            row[split] = {
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "best": max(values),
            }
        rows.append(row)
    return sorted(rows, key=lambda row: -row["dev"]["mean"])


def markdown_table(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    rows = summary["by_learning_rate"]
    splits = [split for split in ("dev", "test") if split in rows[0]]
    head = ["learning rate", "seeds", "collapsed", *(f"{split} mean ± deviation (best)" for split in splits)]
    lines = [f"{summary['task']}: {summary['metric']}, from {summary['model']}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row['learning_rate']:g}", str(row["num_seeds"]), str(row["num_collapsed"])]
        for split in splits:
            score = row[split]
            cells.append(f"{score['mean']:.4f} ± {score['deviation']:.4f} ({score['best']:.4f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
