"""Starts a local job again after it lost a rank, as Slurm's requeue does on a cluster."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from albert.errors import AlbertError, PeerLostError, PreemptedError
from launcher.job import Job
from launcher.local import plan_local, run_local
from launcher.process import signals_held
from launcher.progress import committed_step
from launcher.slurm_job import requeue_refusal

MAX_DELAY_S = 60.0


def run_with_restarts(
    job: Job,
    num_ranks: int,
    max_restarts: int,
    run: Path | None,
    fewer_ranks: Callable[[int], int] = lambda num_ranks: num_ranks,
) -> int:
    """Run a job; after a lost rank (76) start it again, which goes on from its last checkpoint.

    Args:
        job: what to run.
        num_ranks: on this machine.
        max_restarts: so many times; fewer if restarts bring no new checkpoint.
        run: directory with the checkpoints; None if there are none.
        fewer_ranks: from the number of ranks of the start that failed to that of the next.

    Returns:
        The exit code of the last start.
    """
    history: list[dict[str, Any]] = []
    while True:
        code = run_local(plan_local(job, num_ranks, os.environ))
        history.append({"exit_code": code, "step": committed_step(run), "signals": []})
        if code != PeerLostError.exit_code or len(history) > max_restarts:
            return code
        refusal = requeue_refusal(history)
        if refusal is not None:
            sys.stderr.write(f"launcher: not started again: {refusal}\n")
            return code
        num_ranks = fewer_ranks(num_ranks)
        delay = delay_s(history)
        sys.stderr.write(
            f"launcher: restart {len(history)} of {max_restarts}, on {num_ranks} ranks in {delay:g} s\n"
        )
        if _is_stopped_within(delay):
            return PreemptedError.exit_code


def delay_s(history: Sequence[Mapping[str, Any]]) -> float:
    """Seconds before the next start: 1, doubled for every start in a row that brought no checkpoint.

    Args:
        history: one entry per start, oldest first, with `step` of its newest checkpoint.
    """
    last = history[-1]["step"]
    in_vain = sum(entry["step"] == last for entry in history) - 1
    return float(min(MAX_DELAY_S, 2**in_vain))


def fewer_ranks_chooser(check: Callable[[int], None], min_ranks: int) -> Callable[[int], int]:
    """A rule that leaves one rank out, or as many more as it takes to divide the batch.

    Args:
        check: raises an `AlbertError` for a number of ranks that the job cannot use.
        min_ranks: never fewer; where no number is left, the number stays as it is.
    """

    def choose(num_ranks: int) -> int:
        for fewer in range(num_ranks - 1, min_ranks - 1, -1):
            try:
                check(fewer)
            except AlbertError:
                continue
            return fewer
        return num_ranks

    return choose


def _is_stopped_within(seconds: float) -> bool:
    """Wait; True as soon as a signal asks to stop. Nothing runs, so nothing is lost."""
    with signals_held() as held:
        received = signal.sigtimedwait(held - {signal.SIGCHLD}, seconds)
    return received is not None
