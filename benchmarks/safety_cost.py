"""What watching, recording and checking cost in the steady state, as a share of the time of a step.

    python -m benchmarks.safety_cost [--rounds 3]

Watchdog with heartbeats, ledger, loss-spike detection, stop and commit agreement, replica check every 100 steps and
a background save every 1000 steps are timed one by one in this process; the step is forward and backward of `base`
on two sequences of 512 tokens, the smallest micro-batch in use. The figure is their sum over the time of that step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from albert.config import SpikeConfig
from albert.distributed import close_world, init_world
from albert.heads import AlbertForPreTraining
from albert.ledger import Ledger
from albert.loss_spikes import SpikeDetector
from albert.replicas import weights_checksum
from albert.sample_order import step_positions
from albert.step_log import count_batch
from albert.watchdog import STEP_PHASES, Watchdog
from benchmarks.figure import print_figure
from benchmarks.training_step import CASES, make_batch

_CALLS = 300
_IDLE_S = 5.0
_REPLICA_CHECK_STEPS, _SAVE_STEPS = 100, 1000


def _seconds(action: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - begin) / calls


def _idle_share(watchdog: Watchdog) -> float:
    """Processor time of the watching thread while nothing else happens, per second."""
    with watchdog:
        watchdog.enter("data", 0)
        begin = time.process_time()
        time.sleep(_IDLE_S)
        return (time.process_time() - begin) / _IDLE_S


def main() -> None:
    """Measure and print the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = init_world("cpu", timeout_s=600)
    case = CASES["base-2x512"]
    model = AlbertForPreTraining(case.config)
    examples = [(position, 1, 2, 3) for position in range(len(case.lengths))]
    batch = replace(make_batch(case), examples=examples)
    watchdog, detector = Watchdog(world, 10.0, 600.0), SpikeDetector(SpikeConfig(), [2.0] * 64)

    def step() -> None:
        output: Any = model(batch)
        (output.mlm_loss_sum + output.sop_loss_sum).backward()
        model.zero_grad(set_to_none=True)

    def watch() -> None:
        for phase in STEP_PHASES:
            watchdog.enter(phase, 1)

    def detect() -> None:
        detector.expect(1, 0, 2)
        detector.observe([(1.0, 1.0)])

    def snapshot() -> None:
        for parameter in model.parameters():
            for _ in range(3):  # weight and both moments
                parameter.detach().clone()

    shares = []
    with tempfile.TemporaryDirectory() as directory:
        ledger = Ledger(Path(directory), world, 0, 0)
        for _ in range(options.rounds):
            idle = _idle_share(watchdog := Watchdog(world, 10.0, 600.0))
            costs = {
                "watchdog": _seconds(watch, _CALLS),
                "count": _seconds(lambda: count_batch([batch]), _CALLS),
                "positions": _seconds(lambda: step_positions(0, 4096), _CALLS),
                "ledger": _seconds(lambda: ledger.record(1, [batch]), _CALLS),
                "spikes": _seconds(detect, _CALLS),
                "replicas": _seconds(lambda: weights_checksum(model), 5) / _REPLICA_CHECK_STEPS,
                "save": _seconds(snapshot, 3) / _SAVE_STEPS,
            }
            step_s = _seconds(step, 3)
            shares.append(sum(costs.values()) / step_s + idle)
    close_world()
    parts = {name: round(cost / step_s, 6) for name, cost in costs.items()}
    print_figure(
        "safety_cost_over_step", shares, "share of a step", bar=0.01, step_s=round(step_s, 3),
        heartbeats=round(idle, 6), **parts,
    )  # fmt: skip


if __name__ == "__main__":
    main()
