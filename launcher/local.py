"""Ranks on this machine, started by DeepSpeed's own launcher.

Signals go straight to the ranks, and the launcher waits as long as their commit takes; DeepSpeed's
launcher would kill them after 30 s. Only when a rank has failed are the others killed, once they had
time to notice by themselves.
"""

from __future__ import annotations

import base64
import contextlib
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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from albert.errors import ConfigError
from launcher.job import Job, Rendezvous
from launcher.process import child_setup, signals_held
from launcher.watch import LocalReach, RankWatch

_ACCELERATOR_DEVICES = ("nvidia[0-9]*", "kfd", "dxg", "dri/renderD*", "davinci[0-9]*", "accel*")
_LOOPBACK = "127.0.0.1"
_PORTS = range(20000, 30000)  # below the range from which the kernel takes ports of outgoing connections


@dataclass(frozen=True)
class LocalRun:
    """One job on this machine."""

    job: Job
    """With `status_directory`, which exists for the time of the job only."""
    num_ranks: int
    rendezvous: Rendezvous

    def command(self) -> list[str]:
        """DeepSpeed's launcher for one node; it starts the ranks."""
        world = json.dumps({"localhost": list(range(self.num_ranks))}).encode()
        options = {
            "world_info": base64.urlsafe_b64encode(world).decode(),
            "master_addr": self.rendezvous.address,
            "master_port": str(self.rendezvous.port),
            "log_level": "error",
        }
        return [
            *(sys.executable, "-m", "deepspeed.launcher.launch"),
            *(f"--{name}={value}" for name, value in options.items()),
            *("--module", "--no_local_rank", "launcher.rank", "--job", self.job.encode()),
        ]

    def describe(self) -> str:
        """The command, and what each rank does with it, as lines for a shell and a reader."""
        lines = [
            f"# ranks on this machine: {self.num_ranks}",
            shlex.join(self.command()),
            "# each rank then runs:",
            *(f"export {name}={shlex.quote(value)}" for name, value in self.job.environment),
            shlex.join(self.job.command()),
        ]
        return "\n".join(lines)


def plan_local(job: Job, num_ranks: int, environment: Mapping[str, str]) -> LocalRun:
    """Choose what the command line leaves open: port, threads per rank, place for extensions."""
    # Named here and made later, so that a dry run prints what would run and leaves nothing behind.
    directory = Path(tempfile.gettempdir()) / f"albert-launch-{secrets.token_hex(8)}"
    added = {}
    if "TORCH_EXTENSIONS_DIR" not in environment:
        # The default is shared by all jobs, and a rank that is killed while it compiles blocks it for good.
        added["TORCH_EXTENSIONS_DIR"] = str(directory / "torch_extensions")
    if "OMP_NUM_THREADS" not in environment:
        added["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    if "DS_ACCELERATOR" not in environment and not _has_accelerator():
        added["DS_ACCELERATOR"] = "cpu"  # DeepSpeed comes to the same, with a warning on every rank
    if "CUDA_VISIBLE_DEVICES" in environment:
        # DeepSpeed's launcher overwrites the variable; ranks are to see the devices that the user allows.
        added["CUDA_VISIBLE_DEVICES"] = environment["CUDA_VISIBLE_DEVICES"]
    return LocalRun(
        job=replace(job, environment=(*job.environment, *added.items()), status_directory=str(directory)),
        num_ranks=num_ranks,
        rendezvous=Rendezvous(_LOOPBACK, free_port()),
    )


def run_local(run: LocalRun) -> int:
    """Start the ranks, pass signals on, wait for all of them; returns the job's exit code."""
    directory = Path(str(run.job.status_directory))
    directory.mkdir(mode=0o700)
    try:
        with signals_held() as held:
            starter = subprocess.Popen(
                run.command(),
                env={**os.environ, **dict(run.job.environment), "PYTHONPATH": python_path(os.environ)},
                start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on
                preexec_fn=child_setup(),  # noqa: PLW1509 - no threads here
            )
            reach = LocalReach(directory, run.num_ranks)
            outcome = RankWatch(directory, run.num_ranks, held, reach).wait(starter)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
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
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_LOOPBACK, port))
            return port
    raise ConfigError(
        f"no free port found between {_PORTS.start} and {_PORTS.stop - 1}; end other jobs on this machine"
    )


def _has_accelerator() -> bool:
    return any(path for pattern in _ACCELERATOR_DEVICES for path in Path("/dev").glob(pattern))
