"""Ranks on the hosts of a DeepSpeed hostfile: through DeepSpeed's runner (pdsh, openmpi), or each host by itself.

DeepSpeed's runner hands words to remote shells unquoted. So the job travels encoded, variables travel inside it, and
paths that a shell would change are refused. Records of the ranks lie in a directory that all hosts share.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from albert.errors import ConfigError, MissingInputError, UnsafeError
from launcher.job import Job, Rendezvous
from launcher.local import finish, node_command, python_path, run_node, with_defaults
from launcher.process import child_setup, signals_held
from launcher.records import write_signals
from launcher.watch import RankWatch

LOG_ROOT = "launcher-logs"
"""Below the directory that the launcher is started in; all hosts have to share it."""
VIAS = ("pdsh", "openmpi")

_NEEDED = {"pdsh": ("pdsh", "ssh"), "openmpi": ("ompi_info", "ssh")}
_SETTLE_S = 5.0
_SAFE = re.compile(r"[A-Za-z0-9._/:@%+=,-]*")
_HOST = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=(?P<slots>\d+)")
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Beginnings of the variables that DeepSpeed's runner writes into remote shells."""
_CARRIED = ("NCCL_", "GLOO_", "HF_", "OMP_", "CUDA_DEVICE_ORDER", "TORCH_", "DS_ACCELERATOR")
"""Beginnings of the variables that every rank gets from where the launcher was started."""


@dataclass(frozen=True)
class Hosts:
    """Hosts and ranks on each, in order."""

    slots: dict[str, int]

    @property
    def num_ranks(self) -> int:
        """On all hosts."""
        return sum(self.slots.values())

    @property
    def first(self) -> str:
        """Where rank 0 is."""
        return next(iter(self.slots))

    def one_rank_each(self) -> Hosts:
        """The same hosts with one rank on each."""
        return Hosts(dict.fromkeys(self.slots, 1))

    def text(self) -> str:
        """As a hostfile."""
        return "".join(f"{name} slots={slots}\n" for name, slots in self.slots.items())

    def world(self) -> dict[str, list[int]]:
        """What DeepSpeed calls the world: devices of each host."""
        return {name: list(range(slots)) for name, slots in self.slots.items()}


def read_hostfile(path: str) -> Hosts:
    """Read lines `name slots=N`; `#` begins a comment.

    Raises:
        MissingInputError: no such file.
        ConfigError: a line of another form, a host twice, or no host.
    """
    if not Path(path).is_file():
        raise MissingInputError(f"{path}: no such hostfile; it has a line like 'node1 slots=8' for each host")
    slots: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _HOST.fullmatch(text)
        if found is None or int(found["slots"]) < 1:
            raise ConfigError(f"{path}: line {number}: {text!r} is not of the form 'node1 slots=8'")
        if found["name"] in slots:
            raise ConfigError(f"{path}: line {number}: {found['name']} is there twice")
        slots[found["name"]] = int(found["slots"])
    if not slots:
        raise ConfigError(f"{path}: names no host")
    return Hosts(slots)


@dataclass(frozen=True)
class HostsRun:
    """One job on several hosts, started from here."""

    job: Job
    """With a status directory that all hosts share."""
    hosts: Hosts
    via: str
    rendezvous: Rendezvous
    interface: str | None = None

    @property
    def hostfile(self) -> Path:
        """Written for DeepSpeed's runner when the job starts."""
        return Path(str(self.job.status_directory)) / "hostfile"

    def command(self) -> list[str]:
        """DeepSpeed's runner."""
        options = [
            f"--hostfile={self.hostfile}",
            f"--master_addr={self.rendezvous.address}",
            f"--master_port={self.rendezvous.port}",
            f"--launcher={self.via}",
            *self._mpi_options(),
            *("--force_multi", "--module", "--no_local_rank", "--log_level=error"),
        ]
        runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
        return [*runner, *options, "launcher.rank", "--job", self.job.encode()]

    def _mpi_options(self) -> list[str]:
        """Ranks have threads, so OpenMPI must not bind each to one core; DeepSpeed's runner takes eth0 otherwise."""
        if self.via != "openmpi":
            return []
        interface = f" --mca btl_tcp_if_include {self.interface}" if self.interface else ""
        return [f"--launcher_args=--bind-to none{interface}"]

    def describe(self) -> str:
        """The command, and what each rank does with it."""
        lines = [
            f"# {self.hosts.num_ranks} ranks on {', '.join(self.hosts.slots)} through {self.via}",
            shlex.join(self.command()),
            *self.job.describe(),
        ]
        return "\n".join(lines)


class FileReach:
    """Ranks on other hosts, which look for signals in the directory of the records."""

    def __init__(self, directory: Path, num_ranks: int) -> None:
        self._directory = directory
        self._num_ranks = num_ranks
        self._written = 0

    def pass_on(self, asked: Sequence[int]) -> None:
        """Write down what came."""
        if len(asked) > self._written:
            write_signals(self._directory, asked)
            self._written = len(asked)

    def kill(self) -> set[int]:
        """Have every rank killed by its parent."""
        write_signals(self._directory, [9])
        return set(range(self._num_ranks))


def plan_hosts(
    job: Job,
    hosts: Hosts,
    via: str,
    environment: Mapping[str, str],
    rendezvous: Rendezvous,
    interface: str | None,
) -> HostsRun:
    """Choose the directory, and put variables into the job.

    Raises:
        ConfigError: a program is not installed.
        UnsafeError: a path that the remote shells would change.
    """
    for program in _NEEDED[via]:
        if shutil.which(program) is None:
            raise ConfigError(
                f"--via {via}: {program} is not installed here; install it, or use --no-ssh on each host"
            )
    _refuse_unsafe(
        {
            "the working directory": str(Path.cwd()),
            "the interpreter": sys.executable,
            "PYTHONPATH": python_path(environment),
            "--interface": interface or "",
            "--master-addr": rendezvous.address,
        }
    )
    directory = Path(LOG_ROOT).resolve() / f"hosts-{secrets.token_hex(4)}"
    variables = {
        "MASTER_ADDR": rendezvous.address,
        "MASTER_PORT": str(rendezvous.port),
        "TORCH_EXTENSIONS_DIR": f"/tmp/albert-extensions-{directory.name}",  # noqa: S108 - a name of its own
        **_interface_variables(interface),
        **{name: value for name, value in environment.items() if name.startswith(_CARRIED)},
        **dict(job.environment),
    }
    job = replace(
        job,
        environment=tuple(variables.items()),
        status_directory=str(directory),
        log_directory=job.log_directory or str(directory),
        polls_signals=True,
    )
    return HostsRun(job, hosts, via, rendezvous, interface)


def _refuse_unsafe(values: Mapping[str, str]) -> None:
    for what, text in values.items():
        if _SAFE.fullmatch(text) is None:
            raise UnsafeError(f"{what} ({text!r}) has characters that remote shells change; use plain names")


def _interface_variables(interface: str | None) -> dict[str, str]:
    names = () if interface is None else ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    return {name: str(interface) for name in names}


def run_hosts(run: HostsRun) -> int:
    """Start the ranks on all hosts and wait for them; returns the job's exit code."""
    directory = Path(str(run.job.status_directory))
    directory.mkdir(parents=True)
    run.hostfile.write_text(run.hosts.text())
    sys.stderr.write(f"launcher: the logs of all ranks are in {LOG_ROOT}/{directory.name}\n")
    with signals_held() as held:
        starter = subprocess.Popen(
            run.command(),
            env=runner_environment(os.environ),
            start_new_session=True,
            preexec_fn=child_setup(),  # noqa: PLW1509 - no threads here
        )
        reach = FileReach(directory, run.hosts.num_ranks)
        outcome = RankWatch(directory, run.hosts.num_ranks, held, reach).wait(starter, _SETTLE_S)
    return finish(outcome)


def runner_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of DeepSpeed's runner, without what it would write into remote shells unquoted."""
    kept = {name: value for name, value in environment.items() if not name.startswith(_EXPORTED)}
    alive = "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"
    mpi = shutil.which("ompi_info")
    return {
        **kept,
        "PYTHONPATH": python_path(environment),
        # Without these, pdsh waits for a host that has vanished for hours.
        "PDSH_SSH_ARGS_APPEND": f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {alive}".strip(),
        "DS_ENV_FILE": environment.get("DS_ENV_FILE", ".no_deepspeed_env"),
        # The mpirun that belongs to OpenMPI, before that of another MPI in a virtual environment.
        "PATH": os.pathsep.join(filter(None, (mpi and str(Path(mpi).parent), environment.get("PATH", "")))),
    }


def run_one_host(job: Job, hosts: Hosts, node_rank: int, rendezvous: Rendezvous) -> int:
    """Without ssh: run this host's ranks only; the same command runs on every host with its own number."""
    num_ranks = list(hosts.slots.values())[node_rank]
    return run_node(job, num_ranks, node_command(job, hosts.world(), node_rank, rendezvous))


def plan_one_host(
    job: Job, hosts: Hosts, node_rank: int, environment: Mapping[str, str], interface: str | None
) -> Job:
    """The job with what the user leaves open on this host.

    Raises:
        ConfigError: the hostfile has no such host.
    """
    if not 0 <= node_rank < len(hosts.slots):
        raise ConfigError(
            f"--node-rank {node_rank}: the hostfile has {len(hosts.slots)} hosts, numbered from 0"
        )
    variables = (*job.environment, *_interface_variables(interface).items())
    return with_defaults(replace(job, environment=variables), environment)
