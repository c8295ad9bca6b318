"""Training time that kills leave over: a supervised run whose ranks are killed at random, against its own bound.

    python -m benchmarks.effective_time [--minutes 10] [--mtbf 120] [--ledger kills.jsonl]

Two ranks (hidden 384, 6 layers, 128 tokens, ZeRO-1) run under `launcher local --restarts`. First without kills, for
the mean time of a step and the cost of a save; then a random rank gets SIGKILL at exponentially distributed times.
Useful time is the number of steps kept, times that of a step; its share of the wall-clock time is compared with what
the measured costs allow (Daly 2006, with no failure inside a restart): restart cost R, save cost s, T seconds between
saves and mean time M from a restart to the next failure give T / ((exp((T + s) / M) - 1) (M + R)). R is the mean time
from a kill to the first new step. M is that of the kills that happened: in minutes their number is a matter of luck.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from albert.manifest import write_manifest
from albert.monitoring import METRICS_NAME, read_metrics
from benchmarks.figure import print_figure
from benchmarks.loader import write_dataset
from benchmarks.small_run import SMALL_MODEL, run_overrides

_LENGTH, _MICRO_BATCH, _RANKS = 128, 4, 2
_CALIBRATION_STEPS = 150
_TAIL_BYTES = 8192
_SAVE_PHASE = (0, 1, 2)
"""Steps after a multiple of the interval in which a save may cost time: it begins after the first and is written
beside the others."""


def _start(directory: Path, run: str, num_steps: int, interval_steps: int) -> subprocess.Popen[bytes]:
    overrides = run_overrides(
        directory,
        run,
        num_steps=num_steps,
        global_batch_size=_RANKS * _MICRO_BATCH,
        micro_batch_size=_MICRO_BATCH,
    )
    overrides += [
        *SMALL_MODEL, "train.precision=fp32", "log.interval_steps=1", "log.tensorboard=false", "data.num_workers=0",
        f"checkpoint.interval_steps={interval_steps}", "log.ledger=true",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "launcher", "local", "-n", str(_RANKS), "--restarts", "1000"]
    with (directory / f"{run}.log").open("wb") as log:
        return subprocess.Popen(
            [*launcher, "pretrain", "--config", "base", *overrides], stdout=log, stderr=subprocess.STDOUT
        )


def _rank_pids(run: Path) -> Iterator[tuple[int, int]]:
    """(rank, pid) of the run's processes, found by command line and environment."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"albert.pretrain" in words and f"train.output_dir={run}".encode() in words:
                variables = dict(
                    word.partition(b"=")[::2] for word in (entry / "environ").read_bytes().split(b"\0")
                )
                yield int(variables[b"RANK"]), int(entry.name)


def _lines(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run, "train") if (run / METRICS_NAME).is_file() else []


def _last_line(run: Path) -> dict[str, Any] | None:
    """The newest step, read from the end: what watches the run must not cost what is measured."""
    path = run / METRICS_NAME
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = [json.loads(line) for line in file.read().splitlines()[1:] if line.endswith(b"}")]
    return next((line for line in reversed(lines) if line["kind"] == "train"), None)


def _step_times(run: Path) -> list[float]:
    lines = _lines(run)
    return [after["time"] - before["time"] for before, after in itertools.pairwise(lines)]


def _kill_until_done(
    launched: subprocess.Popen[bytes], run: Path, mtbf_s: float, generator: random.Random
) -> tuple[list[dict[str, Any]], list[float]]:
    """Kill ranks of a run until it is done; returns the kills, and the seconds until each was made up by a step."""
    kills: list[dict[str, Any]] = []
    restarts: list[float] = []
    next_kill = time.time() + generator.expovariate(1 / mtbf_s)
    is_down = False
    while launched.poll() is None:
        time.sleep(0.1)
        last = _last_line(run)
        if is_down and last and last["time"] > kills[-1]["time"] + 0.5:
            restarts.append(last["time"] - kills[-1]["time"])
            is_down = False
        if time.time() < next_kill or is_down or not last:
            continue
        ranks = list(_rank_pids(run))
        if ranks:
            rank, pid = generator.choice(ranks)
            os.kill(pid, signal.SIGKILL)
            kills.append({"time": time.time(), "rank": rank, "step": last["step"]})
            is_down = True
            next_kill = time.time() + generator.expovariate(1 / mtbf_s)
    return kills, restarts


def _costs_s(run: Path, interval_steps: int) -> tuple[float, float]:
    """Mean time of a step without a save, and what a save adds to the steps around it."""
    times = _step_times(run)[interval_steps:]
    mean = statistics.mean(
        value
        for step, value in enumerate(times, interval_steps + 2)
        if step % interval_steps not in _SAVE_PHASE
    )
    return mean, max(0.0, interval_steps * (statistics.mean(times) - mean))


def _bound(interval_s: float, save_s: float, restart_s: float, uptime_s: float) -> float:
    return interval_s / (math.expm1((interval_s + save_s) / uptime_s) * (uptime_s + restart_s))


def main() -> None:
    """Measure and print the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, without what kills cost")
    parser.add_argument("--mtbf", type=float, default=120.0, help="mean seconds between kills")
    parser.add_argument("--interval", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", type=Path, help="write every kill to this file, as JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_manifest(directory, write_dataset(directory, 4096, _LENGTH))
        if _start(directory, "calm", _CALIBRATION_STEPS, options.interval).wait():
            sys.exit((directory / "calm.log").read_text())
        step_s, save_s = _costs_s(directory / "calm", options.interval)
        num_steps = max(_CALIBRATION_STEPS, round(60 * options.minutes / step_s))
        launched = _start(directory, "killed", num_steps, options.interval)
        kills, restarts = _kill_until_done(
            launched, directory / "killed", options.mtbf, random.Random(options.seed)
        )
        if launched.returncode:
            sys.exit((directory / "killed.log").read_text())
        lines = _lines(directory / "killed")
    if options.ledger:
        options.ledger.write_text("".join(json.dumps(kill) + "\n" for kill in kills))
    wall_s = lines[-1]["time"] - lines[0]["time"]
    share = (len(lines) - 1) * step_s / wall_s
    if not restarts:
        sys.exit("effective_time: no kill happened; give more --minutes or a shorter --mtbf")
    restart_s = statistics.mean(restarts)
    uptime_s = (wall_s - sum(restarts)) / len(kills)
    bound = _bound(options.interval * step_s, save_s, restart_s, uptime_s)
    print_figure(
        "effective_time_over_bound", [share / bound], "ratio", bar=0.95, share=round(share, 4),
        bound=round(bound, 4), mtbf_s=options.mtbf, uptime_s=round(uptime_s, 1), kills=len(kills),
        restart_s=round(restart_s, 2), save_s=round(save_s, 3), step_s=round(step_s, 4),
        interval_steps=options.interval, steps=num_steps,
    )  # fmt: skip


if __name__ == "__main__":
    main()
