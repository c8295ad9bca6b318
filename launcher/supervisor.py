"""Starts a local job again after it lost a rank, as Slurm's requeue does on a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from albert.errors import PeerLostError
from launcher.job import Job
from launcher.local import plan_local, run_local
from launcher.progress import committed_step
from launcher.slurm_job import requeue_refusal


def run_with_restarts(job: Job, num_ranks: int, max_restarts: int, run: Path | None) -> int:
    """Run a job; after a lost rank (76) start it again, which goes on from its last checkpoint.

    Args:
        job: what to run.
        num_ranks: on this machine.
        max_restarts: so many times; fewer if restarts bring no new checkpoint.
        run: directory with the checkpoints; None if there are none.

    Returns:
        The exit code of the last start.
    """
    history = []
    while True:
        code = run_local(plan_local(job, num_ranks, os.environ))
        history.append({"exit_code": code, "step": committed_step(run), "signals": []})
        if code != PeerLostError.exit_code or len(history) > max_restarts:
            return code
        refusal = requeue_refusal(history)
        if refusal is not None:
            sys.stderr.write(f"launcher: not started again: {refusal}\n")
            return code
        sys.stderr.write(f"launcher: restart {len(history)} of {max_restarts}\n")
