"""Has Slurm start a job again, without the nodes that are known to be bad."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from albert.errors import ConfigError
from launcher.allocation import Allocation, job_fields, run_scontrol
from launcher.process import signals_held

_Result = TypeVar("_Result")
PAUSES_S = (5.0, 15.0, 30.0, 60.0)
"""Between attempts to reach Slurm's controller, which may be restarted just now; without it a run would end here."""

_KILLED_WITHIN_S = 60.0
_TOLD_WITHIN_S = 20.0


def requeue(allocation: Allocation, exit_code: int, bad_nodes: Sequence[str] = ()) -> int:
    """Requeue the job, unless somebody cancelled it; Slurm then kills this process.

    Args:
        allocation: of the job.
        exit_code: returned where the job is not requeued.
        bad_nodes: left out from now on.
    """
    fields = patiently(lambda: job_fields(allocation.job_id))
    state = fields.get("JobState", "")
    if state != "RUNNING":
        say(f"Slurm ends or requeues this job itself ({state})")
        return exit_code
    try:
        if bad_nodes:
            _requeue_without(allocation, excluded_nodes(fields, bad_nodes))
            return exit_code
        say("requeued; goes on from the last committed checkpoint")
        patiently(lambda: run_scontrol("requeue", str(allocation.job_id)))
    except ConfigError as error:
        say(str(error))
        return exit_code
    time.sleep(_KILLED_WITHIN_S)
    return exit_code


def excluded_nodes(fields: dict[str, str], bad_nodes: Sequence[str]) -> str:
    """What the job excludes already, and the bad nodes."""
    before = fields.get("ExcNodeList", "(null)")
    return ",".join(([] if before == "(null)" else [before]) + list(bad_nodes))


def _requeue_without(allocation: Allocation, nodes: str) -> None:
    """Slurm takes the list of excluded nodes from pending jobs only, so this process has to outlive its own job.

    Slurm ends a requeued job with SIGTERM, and with SIGKILL some time later; between the two the job is pending. A
    scontrol that was started before the SIGTERM would be ended by it.
    """
    say(f"requeued without {nodes}")
    with signals_held() as held:
        patiently(lambda: run_scontrol("requeue", str(allocation.job_id)))
        signal.sigtimedwait(held - {signal.SIGCHLD}, _TOLD_WITHIN_S)
        run_scontrol("update", f"JobId={allocation.job_id}", f"ExcNodeList={nodes}")


def patiently(command: Callable[[], _Result]) -> _Result:
    """Result of a command of Slurm, tried again if it fails.

    Raises:
        ConfigError: it failed every time.
    """
    for pause_s in PAUSES_S:
        try:
            return command()
        except ConfigError as error:
            say(f"{error}; tried again in {pause_s:.0f} s")
            time.sleep(pause_s)
    return command()


def say(text: str) -> None:
    """A line of the job's log."""
    sys.stdout.write(f"launcher: {text}\n")
    sys.stdout.flush()
