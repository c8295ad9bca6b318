"""What Slurm has given a job: read from its environment inside the job."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from albert.errors import ConfigError
from launcher.job import Rendezvous

_PORTS = range(20000, 30000)  # below the range from which the kernel takes ports of outgoing connections


@dataclass(frozen=True)
class Allocation:
    """One allocation of a Slurm job; a requeued job gets another one."""

    job_id: int
    job_name: str
    restart_count: int
    hosts: tuple[str, ...]
    num_tasks: int
    cpus_per_task: int
    array_job_id: int | None = None
    """Of the job array that this job is one task of."""
    part: tuple[int, int] | None = None
    """Which of how many tasks of the array, from 0."""

    @property
    def log_id(self) -> int:
        """The number that the user knows the job by."""
        return self.array_job_id or self.job_id

    @property
    def log_name(self) -> str:
        """Directory of the job below the logs."""
        return f"{self.job_name}-{self.log_id}"

    def node_of(self, rank: int) -> str:
        """Slurm's name of the node that a rank runs on."""
        return self.hosts[rank * len(self.hosts) // self.num_tasks]

    @property
    def rendezvous(self) -> Rendezvous:
        """Rank 0 is on the first host; the port differs between jobs and between restarts."""
        return Rendezvous(self.hosts[0], _PORTS[(self.job_id * 7 + self.restart_count) % len(_PORTS)])


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """Read the variables of a batch job.

    Raises:
        ConfigError: this is no batch job of Slurm, or it does not say how many tasks it has.
    """
    names = ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"]
    # Some versions of Slurm set the number of tasks only where --ntasks is given.
    names += ["SLURM_NTASKS"] if "SLURM_NTASKS_PER_NODE" not in environment else []
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(
            f"launcher slurm job: {', '.join(missing)} not set; run it in a batch script that has --nodes and "
            "--ntasks-per-node, as those in slurm/ do"
        )
    array = environment.get("SLURM_ARRAY_JOB_ID")
    hosts = tuple(run_scontrol("show", "hostnames", environment["SLURM_JOB_NODELIST"]).split())
    num_tasks = int(environment.get("SLURM_NTASKS") or len(hosts) * int(environment["SLURM_NTASKS_PER_NODE"]))
    cpus_on_node = int(environment.get("SLURM_CPUS_ON_NODE", "1"))
    per_node = max(1, num_tasks // len(hosts))
    return Allocation(
        job_id=int(environment["SLURM_JOB_ID"]),
        job_name=environment.get("SLURM_JOB_NAME", "job"),
        restart_count=int(environment.get("SLURM_RESTART_COUNT", "0")),
        hosts=hosts,
        num_tasks=num_tasks,
        cpus_per_task=int(environment.get("SLURM_CPUS_PER_TASK", max(1, cpus_on_node // per_node))),
        array_job_id=None if array is None else int(array),
        part=None if array is None else _array_part(environment),
    )


def _array_part(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which of how many tasks of a job array this is.

    Raises:
        ConfigError: the array is no whole range, so that tasks cannot be told from gaps.
    """
    names = ("TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_STEP", "TASK_COUNT")
    task, first, last, step, count = (int(environment[f"SLURM_ARRAY_{name}"]) for name in names)
    if (last - first) // step + 1 != count:
        raise ConfigError(
            "--array: has gaps; give a whole range such as --array=0-7, finished parts are skipped"
        )
    return (task - first) // step, count


def run_scontrol(*arguments: str) -> str:
    """Output of scontrol.

    Raises:
        ConfigError: Slurm is not installed here, or refuses.
    """
    return run_slurm_command("scontrol", *arguments)


def run_slurm_command(*command: str, strip: tuple[str, ...] = ()) -> str:
    """Output of one of Slurm's commands.

    Args:
        command: its words.
        strip: beginnings of variables that it does not get.

    Raises:
        ConfigError: it is not installed here, or it refuses; quotes what it says.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(strip)}
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} not found: this machine is no login node of a Slurm cluster"
        ) from None
    if result.returncode:
        said = " ".join(result.stderr.split()).removeprefix(f"{command[0]}: ").removeprefix("error: ")
        raise ConfigError(f"{command[0]} refused: {said or f'exit code {result.returncode}'}")
    return result.stdout


def job_fields(job_id: int) -> dict[str, str]:
    """What `scontrol show job` says, by field: JobState, Restarts, Reason, ...

    Raises:
        ConfigError: Slurm does not know the job.
    """
    return all_job_fields(job_id)[0]


def all_job_fields(job_id: int) -> list[dict[str, str]]:
    """The same for every task of a job array.

    Raises:
        ConfigError: Slurm does not know the job.
    """
    lines = run_scontrol("show", "job", "--oneliner", str(job_id)).splitlines()
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if line]
