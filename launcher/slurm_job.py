"""Inside a Slurm job: starts the ranks with srun, watches them, and decides whether the job is requeued.

The batch script execs this program, so that it gets the signals that Slurm sends to the batch shell. A job that was
stopped with its checkpoint committed (75) or that lost a rank (76) is requeued and goes on; after
`MAX_FAILURES` allocations in a row without a new checkpoint it is not, so that a broken job ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert.errors import ConfigError, PeerLostError, PreemptedError
from launcher.allocation import Allocation, job_fields, read_allocation, run_scontrol
from launcher.job import PROGRAMS, Job
from launcher.local import python_path
from launcher.outcome import Outcome, RankEnd
from launcher.process import child_setup, signals_held
from launcher.progress import committed_step, run_directory
from launcher.records import read_records
from launcher.slurm import LOG_ROOT, write_job_file
from launcher.watch import RankWatch

MAX_FAILURES = 3
"""So many allocations in a row without a new checkpoint end the job."""

_HISTORY = "history.jsonl"
_SETTLE_S = 5.0  # a network file system may show a record this late
_REQUEUE_S = 60.0


@dataclass(frozen=True)
class SlurmSettings:
    """What the cluster file says about starting ranks."""

    srun_options: tuple[str, ...] = ()
    rank_prefix: tuple[str, ...] = ()
    mpi: str = "pmi2"
    log_root: str = LOG_ROOT


class SrunReach:
    """Ranks on other hosts, reached through srun, which passes SIGUSR1 on to all of them."""

    def __init__(self, srun: subprocess.Popen[bytes], directory: Path, allocation: Allocation) -> None:
        self._srun = srun
        self._directory = directory
        self._allocation = allocation
        self._told = 0

    def pass_on(self, asked: Sequence[int]) -> None:
        """One SIGUSR1 for every signal, as soon as all ranks are there; srun drops them before that."""
        if len(read_records(self._directory, "started")) < self._allocation.num_tasks:
            return
        while self._told < len(asked):
            self._srun.send_signal(signal.SIGUSR1)
            self._told += 1

    def kill(self) -> set[int]:
        """End the job step; slurmstepd kills the ranks with everything they started."""
        ended = read_records(self._directory, "ended")
        step = f"{self._allocation.job_id}.0"
        subprocess.run(["scancel", "--signal=KILL", step], check=False, capture_output=True)
        return set(range(self._allocation.num_tasks)) - set(ended)


def run_slurm_job(program: str, arguments: tuple[str, ...], settings: SlurmSettings) -> int:
    """Run one allocation of a job; returns the exit code, unless the job is requeued, which kills this process."""
    allocation = read_allocation(os.environ)
    directory = Path(settings.log_root) / f"{allocation.job_name}-{allocation.job_id}"
    directory.mkdir(parents=True, exist_ok=True)
    _say(
        f"job {allocation.job_id} restart {allocation.restart_count}: {allocation.num_tasks} ranks on "
        f"{', '.join(allocation.hosts)}"
    )
    write_job_file(directory, allocation.job_id, program, arguments)
    if program == "data":
        return _run_data(arguments, allocation, settings)
    run = run_directory(program, arguments)
    outcome, ends, asked = _run_ranks(program, arguments, allocation, settings, directory)
    entry = {
        "restart": allocation.restart_count,
        "exit_code": outcome.exit_code,
        "cause": outcome.line,
        "step": committed_step(run),
        "hosts": allocation.hosts,
        "signals": sorted({*asked, *(number for end in ends for number in end.sent)}),
        "at": time.time(),
    }
    history = _append(directory / _HISTORY, entry)
    if outcome.line is not None:
        _say(outcome.line)
    reason = requeue_refusal(history)
    if reason is None:
        return _requeue(allocation, outcome.exit_code)
    _say(f"ends with exit code {outcome.exit_code}: {reason}")
    return outcome.exit_code


def _run_ranks(
    program: str,
    arguments: tuple[str, ...],
    allocation: Allocation,
    settings: SlurmSettings,
    directory: Path,
) -> tuple[Outcome, list[RankEnd], list[int]]:
    here = directory / f"restart-{allocation.restart_count}"
    here.mkdir(exist_ok=True)
    job = Job(
        PROGRAMS[program],
        arguments,
        tuple(rank_environment(allocation, os.environ).items()),
        status_directory=str(here.resolve()),
        log_directory=str(here.resolve()),
    )
    with signals_held() as held:
        srun = subprocess.Popen(
            srun_command(job, allocation, settings),
            env={**os.environ, "PYTHONPATH": python_path(os.environ)},
            start_new_session=True,
            preexec_fn=child_setup(),  # noqa: PLW1509 - no threads here
        )
        reach = SrunReach(srun, here, allocation)
        watch = RankWatch(here, allocation.num_tasks, held, reach)
        outcome = watch.wait(srun, _SETTLE_S)
    return outcome, watch.ends(), watch.asked


def srun_command(job: Job, allocation: Allocation, settings: SlurmSettings) -> list[str]:
    """One task per rank; a rank that fails does not end the others, which may be committing a checkpoint."""
    python = "python3" if settings.rank_prefix else sys.executable
    return [
        "srun",
        f"--ntasks={allocation.num_tasks}",
        f"--cpus-per-task={allocation.cpus_per_task}",
        "--kill-on-bad-exit=0",
        "--wait=0",
        *settings.srun_options,
        *settings.rank_prefix,
        *(python, "-m", "launcher.rank", "--job", job.encode()),
    ]


def rank_environment(allocation: Allocation, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of every rank: rendezvous, threads, a place for compiled extensions on its own host."""
    rendezvous = allocation.rendezvous
    added = {"MASTER_ADDR": rendezvous.address, "MASTER_PORT": str(rendezvous.port)}
    defaults = {
        "OMP_NUM_THREADS": str(allocation.cpus_per_task),
        "TORCH_EXTENSIONS_DIR": f"{environment.get('TMPDIR', '/tmp')}"  # noqa: S108 - a name of its own
        f"/albert-extensions-{allocation.job_id}-{allocation.restart_count}",
    }
    return added | {name: value for name, value in defaults.items() if name not in environment}


def _run_data(arguments: tuple[str, ...], allocation: Allocation, settings: SlurmSettings) -> int:
    """MPI ranks of data preparation; they need no watching, because a build that was killed goes on."""
    is_mpi = "--mpi" in arguments
    command = [
        "srun",
        f"--ntasks={allocation.num_tasks if is_mpi else 1}",
        f"--cpus-per-task={allocation.cpus_per_task}",
        f"--mpi={settings.mpi if is_mpi else 'none'}",
        "--kill-on-bad-exit=1",
        *settings.srun_options,
        *settings.rank_prefix,
        *("python3" if settings.rank_prefix else sys.executable, "-u", "-m", PROGRAMS["data"]),
        *arguments,
    ]
    with signals_held() as held:
        srun = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": python_path(os.environ)},
            start_new_session=True,
            preexec_fn=child_setup(),  # noqa: PLW1509 - no threads here
        )
        while srun.poll() is None:
            number = signal.sigwait(held)
            if number != signal.SIGCHLD:
                srun.terminate()
                return _requeue(allocation, PreemptedError.exit_code)
    return srun.returncode if srun.returncode >= 0 else 128 - srun.returncode


def requeue_refusal(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a job is not requeued after its last allocation; None if it is.

    Args:
        history: one entry per allocation, oldest first, with exit_code, step and signals.
    """
    last = history[-1]
    if last["exit_code"] not in (PreemptedError.exit_code, PeerLostError.exit_code):
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


def _requeue(allocation: Allocation, exit_code: int) -> int:
    """Have Slurm start the job again, unless somebody cancelled it; Slurm then kills this process."""
    state = job_fields(allocation.job_id).get("JobState", "")
    if state != "RUNNING":
        _say(f"not requeued from here: Slurm says {state}")
        return exit_code
    _say("requeued; goes on from the last committed checkpoint")
    try:
        run_scontrol("requeue", str(allocation.job_id))
    except ConfigError as error:
        _say(str(error))
        return exit_code
    time.sleep(_REQUEUE_S)
    return exit_code


def _say(text: str) -> None:
    sys.stdout.write(f"launcher: {text}\n")
    sys.stdout.flush()
