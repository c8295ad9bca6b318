"""Ranks on this machine, started by DeepSpeed's own launcher.

Signals go straight to the ranks, and the launcher waits as long as their commit takes; DeepSpeed's
launcher would kill them after 30 s. Only when a rank has failed are the others killed, once they had
time to notice by themselves.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import random
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from albert.errors import ConfigError
from launcher.job import Job, Rendezvous
from launcher.outcome import Outcome
from launcher.process import child_setup, signals_held
from launcher.watch import LocalReach, RankWatch

_ACCELERATOR_DEVICES = ("nvidia[0-9]*", "kfd", "dxg", "dri/renderD*", "davinci[0-9]*", "accel*")
_LOOPBACK = "127.0.0.1"
PORTS = range(20000, 30000)
"""For rendezvous: below the range from which the kernel takes ports of outgoing connections."""


@dataclass(frozen=True)
class LocalRun:
    """One job on this machine."""

    job: Job
    """With `status_directory`, which exists for the time of the job only."""
    num_ranks: int
    rendezvous: Rendezvous

    def command(self) -> list[str]:
        """DeepSpeed's launcher for this machine alone."""
        return node_command(self.job, {"localhost": list(range(self.num_ranks))}, 0, self.rendezvous)

    def describe(self) -> str:
        """The command, and what each rank does with it, as lines for a shell and a reader."""
        lines = [
            f"# ranks on this machine: {self.num_ranks}",
            shlex.join(self.command()),
            *self.job.describe(),
        ]
        return "\n".join(lines)


def node_command(
    job: Job, world: Mapping[str, Sequence[int]], node_rank: int, rendezvous: Rendezvous
) -> list[str]:
    """DeepSpeed's launcher for one of the nodes of `world` (devices by host); it starts the ranks of that node."""
    options = {
        "world_info": base64.urlsafe_b64encode(json.dumps(world).encode()).decode(),
        "node_rank": str(node_rank),
        "master_addr": rendezvous.address,
        "master_port": str(rendezvous.port),
        "log_level": "error",
    }
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch"),
        *(f"--{name}={value}" for name, value in options.items()),
        *("--module", "--no_local_rank", "launcher.rank", "--job", job.encode()),
    ]


def plan_local(job: Job, num_ranks: int, environment: Mapping[str, str]) -> LocalRun:
    """Choose what the command line leaves open, a free port too."""
    return LocalRun(with_defaults(job, environment), num_ranks, Rendezvous(_LOOPBACK, free_port()))


def with_defaults(job: Job, environment: Mapping[str, str]) -> Job:
    """The job with what the user leaves open: the place for records and for compiled extensions."""
    # Named here and made later, so that a dry run prints what would run and leaves nothing behind.
    directory = Path(tempfile.gettempdir()) / f"albert-launch-{secrets.token_hex(8)}"
    added = {}
    if "TORCH_EXTENSIONS_DIR" not in environment:
        # The default is shared by all jobs, and a rank that is killed while it compiles blocks it for good.
        added["TORCH_EXTENSIONS_DIR"] = str(directory / "torch_extensions")
    if "DS_ACCELERATOR" not in environment and not _has_accelerator():
        added["DS_ACCELERATOR"] = "cpu"  # DeepSpeed comes to the same, with a warning on every rank
    if "CUDA_VISIBLE_DEVICES" in environment:
        # DeepSpeed's launcher overwrites the variable; ranks are to see the devices that the user allows.
        added["CUDA_VISIBLE_DEVICES"] = environment["CUDA_VISIBLE_DEVICES"]
    variables = (*job.environment, *added.items())
    return replace(job, environment=variables, status_directory=str(directory))


def count_gpus(environment: Mapping[str, str]) -> int:
    """NVIDIA GPUs that ranks may use; CUDA ignores what follows an empty or negative number in the list."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        names = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
        return len(list(itertools.takewhile(lambda name: name and not name.startswith("-"), names)))
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def run_local(run: LocalRun) -> int:
    """Start the ranks, pass signals on, wait for all of them; returns the job's exit code."""
    return run_node(run.job, run.num_ranks, run.command())


def run_node(job: Job, num_ranks: int, command: Sequence[str]) -> int:
    """Run the ranks of this machine; returns their exit code.

    Args:
        job: with a status directory, which exists for the time of the job.
        num_ranks: on this machine.
        command: starts them.
    """
    directory = Path(str(job.status_directory))
    directory.mkdir(mode=0o700)
    try:
        with signals_held() as held:
            starter = subprocess.Popen(
                command,
                env={**os.environ, **dict(job.environment), "PYTHONPATH": python_path(os.environ)},
                start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on
                preexec_fn=child_setup(),  # noqa: PLW1509 - no threads here
            )
            reach = LocalReach(directory, num_ranks)
            outcome = RankWatch(directory, num_ranks, held, reach).wait(starter)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return finish(outcome)


def finish(outcome: Outcome) -> int:
    """Say why the job ended as it did, where the ranks may not have; returns its exit code."""
    if outcome.line is not None:
        sys.stderr.write(f"launcher: {outcome.line}\n")
    return outcome.exit_code


def python_path(environment: Mapping[str, str]) -> str:
    """PYTHONPATH under which the ranks find this project, installed or not."""
    own = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, (own, environment.get("PYTHONPATH", ""))))


def free_port() -> int:
    """A TCP port on which nobody listens.

    Raises:
        ConfigError: a hundred ports in a row are taken.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_LOOPBACK, port))
            return port
    raise ConfigError(
        f"no free port found between {PORTS.start} and {PORTS.stop - 1}; end other jobs on this machine"
    )


def _has_accelerator() -> bool:
    return any(path for pattern in _ACCELERATOR_DEVICES for path in Path("/dev").glob(pattern))
