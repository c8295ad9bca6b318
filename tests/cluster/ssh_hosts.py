"""Hosts of `machines` with a real sshd each; keys and configuration are private to them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from machines import PATH, Machines, wait_until

ROOT = Path(__file__).parents[2]
COMMANDS = ("sshd", "ssh", "ssh-keygen", "pdsh", "ompi_info")
_CLIENT = """
Host *
  IdentityFile /etc/ssh/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
"""
_SERVER = """
Port 22
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
PidFile /run/sshd.pid
SetEnv PATH={path}
"""


class SshHosts:
    """`ctl` and nodes that reach each other by ssh."""

    def __init__(self, nodes: Sequence[str] = ("node1", "node2")) -> None:
        self.machines = Machines(nodes)
        self.hostfile = self.machines.directory / "hostfile"
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        etc = self.machines.directory / "etcssh"
        (etc / "ssh_config.d").mkdir(parents=True)
        for name in ("host_key", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", etc / name], check=True)
        shutil.copy(etc / "id.pub", etc / "authorized_keys")
        (etc / "ssh_config").write_text(_CLIENT)
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        (etc / "sshd_config").write_text(_SERVER.format(path=path))
        for name in self.machines.names:
            self.machines.boot(name)
            self.machines.run(name, shutil.which("sshd", path=PATH))
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in self.machines.nodes))
        for name in self.machines.nodes:
            wait_until(
                lambda host=name: (
                    self.machines.run("ctl", "ssh", host, "hostname", check=False).strip() == host
                ),
                10,
                f"no ssh to {name}",
            )

    def launch(self, host: str, directory: Path, *words: str) -> subprocess.Popen[str]:
        """`python -m launcher` on a host, one thread per rank."""
        root = ["OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]
        settings = [f"PYTHONPATH={ROOT}", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1", *root]
        command = ["env", *settings, sys.executable, "-m", "launcher", *words]
        return self.machines.start(host, *command, cwd=directory)

    def close(self) -> None:
        self.machines.close()
