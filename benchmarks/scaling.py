"""Scaling of the whole trainer's step over ranks of this machine, weak and strong, under `launcher local`.

    python -m benchmarks.scaling [--ranks 1 2 4] [--model small] [--length 128] [--micro-batch 8] [--rounds 3]
    python -m benchmarks.scaling --ranks 1 2 4 8 --model base --length 512 --micro-batch 64     on GPUs, bf16

Real runs with ZeRO-1 and one thread per rank; each reports its tokens per second in metrics.jsonl, of which the first
half (start, compilation) is left out. Weak scaling: every rank keeps its micro-batch, so the batch grows with the
ranks. Strong scaling: the batch stays that of the most ranks, and fewer ranks accumulate over more micro-batches.
Efficiency is the speed of W ranks over W times that of one rank in the same round. Two lines, weak and strong; the
value is that of the most ranks that have a core (or a GPU) each. More ranks than that share cores: their speed is
printed, an efficiency is not, since it would say nothing about the trainer. Nor does any where other work took cores
meanwhile: `cores_used_by_others` says how many.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from albert.manifest import write_manifest
from albert.monitoring import read_metrics
from albert.precision import default_precision
from benchmarks.figure import print_figure
from benchmarks.loader import write_dataset
from benchmarks.small_run import SMALL_MODEL, run_overrides

_MODELS = ("small", "base", "large", "xlarge", "xxlarge")

Case = tuple[int, int]
"""Ranks, and micro-batches that each of them accumulates over in a step."""


def cases(ranks: list[int]) -> dict[str, dict[int, Case]]:
    """What is run for each number of ranks; the most ranks are the same run in both kinds of scaling.

    Args:
        ranks: ascending, from 1 on; each divides the last.
    """
    return {
        "weak": {size: (size, 1) for size in ranks},
        "strong": {size: (size, ranks[-1] // size) for size in ranks},
    }


def num_places() -> int:
    """Ranks that can have a GPU each, or without GPUs a core each."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def efficiencies(speeds: dict[int, list[float]], size: int) -> list[float]:
    """For each round, the speed of `size` ranks over `size` times that of one."""
    return [many / (size * one) for many, one in zip(speeds[size], speeds[1], strict=True)]


def _tokens_per_s(directory: Path, run: str, case: Case, options: argparse.Namespace) -> float:
    """Speed of the second half of a run."""
    ranks, accumulation = case
    overrides = run_overrides(
        directory, run, num_steps=2 * options.steps, micro_batch_size=options.micro_batch,
        global_batch_size=ranks * accumulation * options.micro_batch,
    )  # fmt: skip
    overrides += [
        f"log.interval_steps={options.steps}", "log.tensorboard=false", f"train.precision={options.precision}",
        "deepspeed.config=zero1",
    ]  # fmt: skip
    recipe = options.model
    if options.model == "small":
        recipe, overrides = "base", overrides + SMALL_MODEL
    if not torch.cuda.is_available():
        overrides.append("data.num_workers=0")  # loader processes would take the cores of the ranks
    launcher = [sys.executable, "-m", "launcher", "local", "-n", str(ranks)]
    result = subprocess.run(
        [*launcher, "pretrain", "--config", recipe, *overrides],
        check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"scaling: {ranks} ranks ended with {result.returncode}:\n{result.stderr}")
    return float(read_metrics(directory / run, "train")[-1]["tokens_per_s"])


def _measure(options: argparse.Namespace) -> dict[Case, list[float]]:
    """Tokens per second of every case, one value per round, in rotated order."""
    order = list(
        dict.fromkeys(case for by_size in cases(options.ranks).values() for case in by_size.values())
    )
    speeds: dict[Case, list[float]] = {case: [] for case in order}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        num_examples = 2 * options.steps * options.ranks[-1] * options.micro_batch
        write_manifest(directory, write_dataset(directory, num_examples, options.length))
        for round_index in range(options.rounds):
            for ranks, accumulation in order:
                run = f"run-{round_index}-{ranks}-{accumulation}"
                speeds[ranks, accumulation].append(
                    _tokens_per_s(directory, run, (ranks, accumulation), options)
                )
            order = order[1:] + order[:1]
    return speeds


def _row(speeds: dict[int, list[float]], size: int, places: int) -> dict[str, Any]:
    """What is said about one number of ranks."""
    row: dict[str, Any] = {"tokens_per_s": round(statistics.median(speeds[size]))}
    if size > places:
        return {**row, "efficiency": None, "no_result": f"{size} ranks on {places} cores or GPUs"}
    values = efficiencies(speeds, size)
    spread = [round(min(values), 3), round(max(values), 3)]
    return {**row, "efficiency": round(statistics.median(values), 3), "spread": spread}


def _cpu_s() -> tuple[float, float]:
    """Processor seconds so far: of the whole machine, and of this process with its ended children."""
    ticks = Path("/proc/stat").read_text().split()[1:4]  # user, nice, system
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), own_s


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="1 is always measured")
    parser.add_argument("--model", choices=_MODELS, default="small", help="hidden 384, 6 layers, or a recipe")
    parser.add_argument("--length", type=int, default=128, help="tokens of every sequence")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences per rank and forward pass")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on GPUs, else fp32")
    parser.add_argument("--steps", type=int, default=10, help="that are measured, after as many to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.ranks = sorted({1, *options.ranks})
    if options.ranks[0] < 1 or any(options.ranks[-1] % size for size in options.ranks):
        parser.error(f"--ranks {options.ranks}: each must be at least 1 and divide the largest")
    if len(options.ranks) == 1 or options.ranks[1] > num_places():
        parser.error(
            f"--ranks {options.ranks}: an efficiency needs more than one rank with a core or GPU each, "
            f"here are {num_places()}; choose other numbers of ranks or another machine"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.precision = options.precision or default_precision(device)
    return options


def main() -> None:
    """Measure and print the figures."""
    options = _options()
    places = num_places()
    (all_before_s, own_before_s), begin = _cpu_s(), time.perf_counter()
    speeds_of_case = _measure(options)
    (all_s, own_s), wall_s = _cpu_s(), time.perf_counter() - begin
    others = (all_s - all_before_s - own_s + own_before_s) / wall_s
    for kind, case_of_size in cases(options.ranks).items():
        speeds = {size: speeds_of_case[case] for size, case in case_of_size.items()}
        largest = max(size for size in options.ranks if size <= places)
        print_figure(
            f"{kind}_scaling_efficiency", efficiencies(speeds, largest), f"of 1 rank, by {largest} ranks",
            ranks={str(size): _row(speeds, size, places) for size in options.ranks}, model=options.model,
            tokens=options.length, micro_batch_size=options.micro_batch,
            accumulation={str(size): accumulation for size, (_, accumulation) in case_of_size.items()},
            device="cuda" if torch.cuda.is_available() else "cpu", places=places, placement="zero1",
            precision=options.precision, steps=options.steps, cores_used_by_others=round(others, 2),
        )  # fmt: skip


if __name__ == "__main__":
    main()
