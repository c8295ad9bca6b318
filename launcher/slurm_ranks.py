"""Ranks of a Slurm job: started with srun, one task each, and watched through their records."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.allocation import Allocation
from launcher.job import Job
from launcher.local import python_path
from launcher.outcome import Outcome, RankEnd
from launcher.process import child_setup, signals_held
from launcher.records import read_records
from launcher.watch import RankWatch

LOG_ROOT = "slurm-logs"
"""Below the directory that a job is submitted from."""

_SETTLE_S = 5.0  # a network file system may show a record this late


@dataclass(frozen=True)
class SlurmSettings:
    """What the cluster file says about starting ranks."""

    srun_options: tuple[str, ...] = ()
    rank_prefix: tuple[str, ...] = ()
    mpi: str = "pmi2"
    log_root: str = LOG_ROOT
    preflight: bool = True

    def srun(self, *options: str) -> list[str]:
        """The command up to the program."""
        # The environment always goes along, also after `sbatch --export=NONE`, which srun would repeat.
        return ["srun", "--export=ALL", *options, *self.srun_options, *self.rank_prefix]

    @property
    def python(self) -> str:
        """A container has an interpreter of its own."""
        is_contained = self.rank_prefix or any(word.startswith("--container-") for word in self.srun_options)
        return "python3" if is_contained else sys.executable


@dataclass(frozen=True)
class Attempt:
    """How the ranks of one step ended."""

    outcome: Outcome
    ends: list[RankEnd]
    asked: list[int]
    """Signals that this process got."""


class SrunReach:
    """Ranks on other hosts, reached through srun, which passes SIGUSR1 on to all of them."""

    def __init__(
        self, srun: subprocess.Popen[bytes], directory: Path, allocation: Allocation, step: int
    ) -> None:
        self._srun = srun
        self._directory = directory
        self._allocation = allocation
        self._step = step
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
        step = f"{self._allocation.job_id}.{self._step}"
        subprocess.run(["scancel", "--signal=KILL", step], check=False, capture_output=True)
        return set(range(self._allocation.num_tasks)) - set(ended)


def run_ranks(
    module: str,
    arguments: tuple[str, ...],
    allocation: Allocation,
    settings: SlurmSettings,
    directory: Path,
    step: int,
) -> Attempt:
    """Run one job step and wait for all its ranks.

    Args:
        module: run by every rank.
        arguments: of the module.
        allocation: its tasks become the ranks.
        settings: of the cluster.
        directory: gets records and logs of the ranks.
        step: its number in this allocation, from 0.
    """
    directory.mkdir(parents=True, exist_ok=True)
    job = Job(
        module,
        arguments,
        tuple(rank_environment(allocation, os.environ).items()),
        status_directory=str(directory.resolve()),
        log_directory=str(directory.resolve()),
    )
    with signals_held() as held:
        srun = subprocess.Popen(
            srun_command(job, allocation, settings),
            env={**os.environ, "PYTHONPATH": python_path(os.environ)},
            start_new_session=True,
            preexec_fn=child_setup(),  # noqa: PLW1509 - no threads here
        )
        reach = SrunReach(srun, directory, allocation, step)
        watch = RankWatch(directory, allocation.num_tasks, held, reach)
        outcome = watch.wait(srun, _SETTLE_S)
    return Attempt(outcome, watch.ends(), watch.asked)


def srun_command(job: Job, allocation: Allocation, settings: SlurmSettings) -> list[str]:
    """One task per rank; a rank that fails does not end the others, which may be committing a checkpoint."""
    options = [
        f"--ntasks={allocation.num_tasks}",
        f"--cpus-per-task={allocation.cpus_per_task}",
        "--kill-on-bad-exit=0",
        "--wait=0",
    ]
    return [*settings.srun(*options), settings.python, "-m", "launcher.rank", "--job", job.encode()]


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


def last_error(directory: Path, ends: Sequence[RankEnd]) -> str | None:
    """What the first rank that failed by itself said last, if that is an error."""
    causes = [end for end in ends if not end.is_consequence]
    if not causes:
        return None
    log = directory / f"rank-{min(causes, key=lambda end: end.at).rank}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line.partition("error: ")[2] for line in lines[-20:] if "error: " in line]
    return errors[-1] if errors else None
