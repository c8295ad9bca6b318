"""Traces of a few training steps, for Perfetto (ui.perfetto.dev) and TensorBoard's profiler."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from albert.distributed import World

DIRECTORY_NAME = "profile"
_SKIPPED_STEPS, _WARM_UP_STEPS = 3, 1
_SHOWN_OPERATIONS = 12


@contextlib.contextmanager
def step_profiler(run_directory: Path, world: World, num_steps: int) -> Iterator[Callable[[], None]]:
    """Trace some steps of this rank, once the first few are over.

    Yields what is to be called after every step. Writes `RUN/profile/rank-00000.trace.json` when the last of the
    steps is done, and rank 0 prints where their time went.

    Args:
        run_directory: of the run.
        world: the ranks.
        num_steps: to trace; 0 for none.
    """
    if not num_steps:
        yield lambda: None
        return
    path = run_directory / DIRECTORY_NAME / f"rank-{world.rank:05d}.trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cuda = world.device.type == "cuda"

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        if world.is_main:
            key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
            text = profiler.key_averages().table(sort_by=key, row_limit=_SHOWN_OPERATIONS)
            sys.stderr.write(f"{text}\ntrace of {num_steps} steps written: {path}\n")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    plan = schedule(wait=_SKIPPED_STEPS, warmup=_WARM_UP_STEPS, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
