"""Data preparation inside a Slurm job: MPI ranks, the worker processes of one node, or one part of a job array."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping

from albert.errors import ConfigError, DataError, DiskError, MissingInputError, PreemptedError, UnsafeError
from launcher.allocation import Allocation
from launcher.job import PROGRAMS
from launcher.local import python_path
from launcher.process import child_setup, signals_held
from launcher.requeue import requeue, say
from launcher.slurm_ranks import SlurmSettings

ATTEMPTS = 3
"""So many times a build is started in one allocation, if it ends without saying why."""
_VERDICTS = {error.exit_code for error in (DataError, MissingInputError, DiskError, UnsafeError, ConfigError)}


def run_data(arguments: tuple[str, ...], allocation: Allocation, settings: SlurmSettings) -> int:
    """Run data preparation; it needs no watching, because a build that was killed goes on where it was.

    That is why an end that is no verdict of data preparation is tried again here, as of a rank out of memory.
    """
    command = data_command(arguments, allocation, settings)
    environment = {**os.environ, **mpi_variables(settings.mpi, os.environ)}
    code = 0
    for attempt in range(1, ATTEMPTS + 1):
        ended = _run(command, environment)
        if ended is None:
            return requeue(allocation, PreemptedError.exit_code)
        code = ended
        if code == 0 or code in _VERDICTS or attempt == ATTEMPTS:
            break
        say(f"data preparation ended with {code}; goes on where it was, attempt {attempt + 1} of {ATTEMPTS}")
    return code


def mpi_variables(mpi: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with which mpich's ranks find each other under Slurm's pmi2; other MPI libraries ignore them.

    Slurm reads at most 1024 bytes of a request (handle_pmi1_cmd in its mpi/pmi2 plugin). mpich's UCX sends 4.6 KB in
    pieces that may be longer than that, depending on what lay in the memory behind its address; then ranks fail or
    wait for ever. The address of libfabric's TCP is one piece of 19 characters.

    Args:
        mpi: how srun starts MPI ranks.
        environment: of the job; what it sets itself counts.
    """
    if mpi != "pmi2":
        return {}
    variables = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
    if "GLOO_SOCKET_IFNAME" in environment:
        variables["FI_TCP_IFACE"] = environment["GLOO_SOCKET_IFNAME"]
    return {name: value for name, value in variables.items() if name not in environment}


def _run(command: list[str], environment: Mapping[str, str]) -> int | None:
    """Exit code of srun; None if Slurm asked to stop."""
    with signals_held() as held:
        srun = subprocess.Popen(
            command,
            env={**environment, "PYTHONPATH": python_path(environment)},
            start_new_session=True,
            preexec_fn=child_setup(),  # noqa: PLW1509 - no threads here
        )
        while srun.poll() is None:
            if signal.sigwait(held) != signal.SIGCHLD:
                srun.terminate()
                return None
    return srun.returncode if srun.returncode >= 0 else 128 - srun.returncode


def data_command(arguments: tuple[str, ...], allocation: Allocation, settings: SlurmSettings) -> list[str]:
    """What is started: one MPI rank per task, or one process with a worker for each task of its node.

    Raises:
        ConfigError: a job array of something that has no parts.
    """
    is_mpi = "--mpi" in arguments
    tasks_per_node = max(1, allocation.num_tasks // len(allocation.hosts))
    is_build = arguments[:1] == ("build",)
    if is_build and not is_mpi and not any(word.startswith("--workers") for word in arguments):
        arguments = (*arguments, "--workers", str(tasks_per_node))
    if allocation.part is not None:
        if is_mpi or not is_build:
            raise ConfigError("--array: only 'data build' without --mpi is done in parts; leave --array out")
        arguments = (*arguments, "--part", "{}/{}".format(*allocation.part))
    num_tasks = allocation.num_tasks if is_mpi else 1
    cpus = allocation.cpus_per_task * (1 if is_mpi else tasks_per_node)
    options = [f"--ntasks={num_tasks}", f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"]
    options += [f"--mpi={settings.mpi}"] if is_mpi else ["--nodes=1", "--mpi=none"]
    return [*settings.srun(*options), settings.python, "-u", "-m", PROGRAMS["data"], *arguments]
