"""Inside a Slurm job: checks the nodes, runs the ranks, and decides whether the job is requeued.

The batch script execs this program, so that it gets the signals that Slurm sends to the batch shell. A job that was
stopped with its checkpoint committed (75), that lost a rank (76) or that found a bad node is requeued and goes on;
after `MAX_FAILURES` allocations in a row without a new checkpoint it is not, so that a broken job ends.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from albert.errors import PeerLostError, PreemptedError
from launcher.allocation import Allocation, read_allocation
from launcher.job import PROGRAMS
from launcher.progress import committed_step, run_directory
from launcher.requeue import requeue, say
from launcher.slurm import write_job_file
from launcher.slurm_data import run_data
from launcher.slurm_preflight import preflight_arguments, run_preflight
from launcher.slurm_ranks import Attempt, SlurmSettings, last_error, run_ranks

MAX_FAILURES = 3
"""So many allocations in a row without a new checkpoint end the job."""

_HISTORY = "history.jsonl"


def run_slurm_job(program: str, arguments: tuple[str, ...], settings: SlurmSettings) -> int:
    """Run one allocation of a job; returns the exit code, unless the job is requeued, which kills this process."""
    allocation = read_allocation(os.environ)
    directory = Path(settings.log_root) / allocation.log_name
    directory.mkdir(parents=True, exist_ok=True)
    say(
        f"job {allocation.job_id} restart {allocation.restart_count}: {allocation.num_tasks} ranks on "
        f"{', '.join(allocation.hosts)}"
    )
    write_job_file(directory, allocation.log_id, program, arguments)
    if program == "data":
        return run_data(arguments, allocation, settings)
    attempt, cause, excluded = _check_and_run(program, arguments, allocation, settings, directory)
    entry = {
        "restart": allocation.restart_count,
        "exit_code": attempt.outcome.exit_code,
        "cause": cause,
        "step": committed_step(run_directory(program, arguments)),
        "hosts": allocation.hosts,
        "excluded": excluded,
        "signals": sorted({*attempt.asked, *(number for end in attempt.ends for number in end.sent)}),
        "at": time.time(),
    }
    history = _append(directory / _HISTORY, entry)
    if cause is not None:
        say(cause)
    reason = requeue_refusal(history)
    if reason is None:
        return requeue(allocation, attempt.outcome.exit_code, excluded)
    say(f"ends with exit code {attempt.outcome.exit_code}: {reason}")
    return attempt.outcome.exit_code


def _check_and_run(
    program: str,
    arguments: tuple[str, ...],
    allocation: Allocation,
    settings: SlurmSettings,
    directory: Path,
) -> tuple[Attempt, str | None, tuple[str, ...]]:
    """Preflight, then the ranks; returns how they ended, why, and nodes that should not be used again."""
    here = directory / f"restart-{allocation.restart_count}"
    words = preflight_arguments(program, arguments) if settings.preflight else None
    if words is not None:
        result = run_preflight(words, allocation, settings, here / "preflight")
        if not result.passed:
            return result.attempt, result.cause, result.bad_nodes
    step = 0 if words is None else 1
    attempt = run_ranks(PROGRAMS[program], arguments, allocation, settings, here, step)
    error = last_error(here, attempt.ends)
    cause = attempt.outcome.line
    return attempt, f"{cause}: {error}" if cause and error else cause, ()


def requeue_refusal(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a job is not requeued after its last allocation; None if it is.

    Args:
        history: one entry per allocation, oldest first, with exit_code, step, signals and maybe excluded nodes.
    """
    last = history[-1]
    if last["exit_code"] not in (PreemptedError.exit_code, PeerLostError.exit_code) and not last.get(
        "excluded"
    ):
        return "done" if last["exit_code"] == 0 else "starting again would not help"
    if last["exit_code"] == PreemptedError.exit_code and not last["signals"]:
        return "the run was told to stop at this step"
    before = [entry["step"] for entry in history[-1 - MAX_FAILURES : -1]]
    if len(before) == MAX_FAILURES and before[0] >= last["step"]:
        return f"no new checkpoint since step {last['step']} in {MAX_FAILURES} restarts"
    return None


def _append(path: Path, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add an entry to the history of a job and return all of it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
