"""Runs one rank as a child: its place among the ranks, its log, its signals, and a record of how it ended.

Started by DeepSpeed's launcher, mpirun or srun as `python -m launcher.rank --job WORD`. DeepSpeed's
launcher hides the exit codes of the ranks and kills the others 30 s after the first failure, which is
not enough to commit a checkpoint; so the record goes into a file, and DeepSpeed only hears that all is
well.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from albert.errors import ConfigError, run_command
from albert.processes import die_with_parent
from launcher.job import Job
from launcher.outcome import RankEnd
from launcher.process import catches, child_setup, signals_held, start_time
from launcher.records import read_signals, write_record

_POLL_S = 1.0
_PLACES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
"""Variables that say where a rank stands: DeepSpeed's, OpenMPI's, Slurm's. The first whole set counts."""


def rank_place(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK, from the variables of whoever started this rank.

    Raises:
        ConfigError: nobody has said which rank this is.
    """
    for names in _PLACES:
        values = [environment.get(name, "") for name in names]
        if all(value.isdigit() for value in values):
            return dict(zip(_PLACES[0], values, strict=True))
    raise ConfigError(
        "launcher.rank: neither RANK nor OMPI_COMM_WORLD_RANK nor SLURM_PROCID is set; start ranks with "
        "python -m launcher"
    )


def run_rank(job: Job, environment: Mapping[str, str]) -> RankEnd:
    """Start the rank, pass signals on to it, wait for it.

    Args:
        job: what to run.
        environment: of this process.
    """
    place = rank_place(environment)
    rank = int(place["RANK"])
    with signals_held() as held:
        child = _start(job, rank, {**threads(environment), **environment, **dict(job.environment), **place})
        pump = _follow(child, job, rank)
        pids = {"pid": os.getpid(), "started": start_time(os.getpid())}
        child_pids = {"child": child.pid, "child_started": start_time(child.pid)}
        if job.status_directory is not None:
            write_record(job.status_directory, rank, "started", {**pids, **child_pids})
        sent = _pass_signals_on(child, job, held)
    if pump is not None:
        pump.join(timeout=5)
    end = RankEnd(rank, socket.gethostname(), child.returncode, time.time(), tuple(sent))
    if job.status_directory is not None:
        fields = {"host": end.host, "code": end.code, "at": end.at, "sent": sent}
        write_record(job.status_directory, rank, "ended", fields)
    return end


def _pass_signals_on(child: subprocess.Popen[bytes], job: Job, held: set[signal.Signals]) -> list[int]:
    """Give the rank every signal that comes, until it ends; returns them."""
    sent: list[int] = []
    num_seen = 0
    while child.poll() is None:
        received = signal.sigtimedwait(held, _POLL_S) if job.polls_signals else signal.sigwaitinfo(held)
        numbers = [received.si_signo] if received and received.si_signo != signal.SIGCHLD else []
        if job.polls_signals and job.status_directory is not None:
            asked = read_signals(job.status_directory)
            numbers += asked[num_seen:] if signal.SIGKILL not in asked else [int(signal.SIGKILL)]
            num_seen = len(asked)
        for number in numbers:
            if number == signal.SIGINT and not catches(child.pid, signal.SIGTERM):
                # Still starting: an interrupt in the middle of an import ends with any exit code, SIGTERM with one.
                number = signal.SIGTERM  # noqa: PLW2901
            child.send_signal(number)
            sent.append(int(number))
    stops = held - {signal.SIGCHLD}
    if -child.returncode in stops:
        # Slurm signals a rank and its parent at once: the same signal may be waiting here.
        received = signal.sigtimedwait(stops, _POLL_S)
        sent += [received.si_signo] if received else []
    return sent


def threads(environment: Mapping[str, str]) -> dict[str, str]:
    """OMP_NUM_THREADS: this host's cores, divided among its ranks."""
    names = ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
    num_ranks = next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), 1)
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_ranks))}


def _start(job: Job, rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    is_shown = rank == 0 and job.log_directory is None
    output = None if is_shown else subprocess.PIPE
    return subprocess.Popen(
        job.command(),
        env=environment,
        stdout=output,
        stderr=None if is_shown else subprocess.STDOUT,
        preexec_fn=child_setup(),  # noqa: PLW1509 - this process has no threads yet
    )


def _follow(child: subprocess.Popen[bytes], job: Job, rank: int) -> threading.Thread | None:
    """Copy what the rank prints to its log, or with `[rank N]` before each line to the terminal."""
    if child.stdout is None:
        return None
    log = None
    if job.log_directory is not None:
        Path(job.log_directory).mkdir(parents=True, exist_ok=True)
        log = (Path(job.log_directory) / f"rank-{rank}.log").open("ab", buffering=0)
    shown = sys.stdout.buffer if rank == 0 else sys.stderr.buffer if log is None else None
    prefix = f"[rank {rank}] ".encode() if rank else b""
    pump = threading.Thread(target=_copy, args=(child.stdout, log, shown, prefix), daemon=True)
    pump.start()
    return pump


def _copy(source: IO[bytes], log: IO[bytes] | None, shown: IO[bytes] | None, prefix: bytes) -> None:
    for line in source:
        if log is not None:
            log.write(line)
        if shown is not None:
            shown.write(line if line.startswith(prefix) else prefix + line)
            shown.flush()


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.rank",
        description="Run one rank of a job. Started by the launcher, not by hand.",
    )
    parser.add_argument("--job", required=True, help="what to run, as one word that the launcher made")
    job = Job.decode(parser.parse_args().job)
    die_with_parent(os.getppid())
    end = run_rank(job, os.environ)
    if job.status_directory is None:
        sys.exit(end.code if end.code >= 0 else 128 - end.code)


def main() -> None:
    """Entry point of `python -m launcher.rank`."""
    sys.exit(run_command(_main))


if __name__ == "__main__":
    main()
