"""What Slurm has given a job: read from its environment inside the job."""

from __future__ import annotations

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

    @property
    def rendezvous(self) -> Rendezvous:
        """Rank 0 is on the first host; the port differs between jobs and between restarts."""
        return Rendezvous(self.hosts[0], _PORTS[(self.job_id * 7 + self.restart_count) % len(_PORTS)])


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """Read the variables of a batch job.

    Raises:
        ConfigError: this is no batch job of Slurm, or it does not say how many tasks it has.
    """
    names = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NTASKS")
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(
            f"launcher slurm job: {', '.join(missing)} not set; run it in a batch script that has --nodes and "
            "--ntasks-per-node, as those in slurm/ do"
        )
    num_tasks = int(environment["SLURM_NTASKS"])
    hosts = tuple(run_scontrol("show", "hostnames", environment["SLURM_JOB_NODELIST"]).split())
    cpus_on_node = int(environment.get("SLURM_CPUS_ON_NODE", "1"))
    per_node = max(1, num_tasks // len(hosts))
    return Allocation(
        job_id=int(environment["SLURM_JOB_ID"]),
        job_name=environment.get("SLURM_JOB_NAME", "job"),
        restart_count=int(environment.get("SLURM_RESTART_COUNT", "0")),
        hosts=hosts,
        num_tasks=num_tasks,
        cpus_per_task=int(environment.get("SLURM_CPUS_PER_TASK", max(1, cpus_on_node // per_node))),
    )


def run_scontrol(*arguments: str) -> str:
    """Output of scontrol.

    Raises:
        ConfigError: Slurm is not installed here, or refuses.
    """
    return run_slurm_command("scontrol", *arguments)


def run_slurm_command(*command: str) -> str:
    """Output of one of Slurm's commands.

    Raises:
        ConfigError: it is not installed here, or it refuses; quotes what it says.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
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
    text = run_scontrol("show", "job", "--oneliner", str(job_id))
    return dict(re.findall(r"(\w+)=(\S*)", text))
