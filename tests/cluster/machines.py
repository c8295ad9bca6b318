"""Hosts on one machine: each is a process in namespaces of its own, with its own network card, pids and /run.

Killing a host's first process is a power-off: everything on it dies, and nothing outside can be reached from it.
The bridge that joins the hosts lies inside the first one, so the machine's own network stays as it is. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_ADDRESSES = "10.213.0"
_INIT = """
set -e
hostname {name}
mount --bind {directory}/hosts /etc/hosts
mount -t sysfs sysfs /sys 2>/dev/null || true
mount -t tmpfs -o size=2g shm /dev/shm
mount -t tmpfs -o size=64m run /run
mkdir -p /run/sshd /run/lock
if [ -d {directory}/etcssh ]; then mount --bind {directory}/etcssh /etc/ssh; fi
ip link set lo up
: > {directory}/{name}.ready
set +e
trap : TERM INT HUP
while :; do sleep 86400 & wait; done
"""


def missing_for_machines(*commands: str) -> str | None:
    """Why this machine cannot play several hosts; None if it can."""
    needed = ("unshare", "nsenter", "ip", "mount", *commands)
    missing = [name for name in needed if shutil.which(name, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "no right to make namespaces (needs root)"
    return None


class Machines:
    """`ctl` and the nodes."""

    def __init__(self, nodes: Sequence[str]) -> None:
        # A short path: that of a unix socket ends at 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="albert-cluster-"))
        self.nodes = tuple(nodes)
        self.names = ("ctl", *nodes)
        self.variables: dict[str, str] = {}
        """Set for every command that runs on a host."""
        self._first: dict[str, subprocess.Popen[bytes]] = {}
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.directory / "hosts").write_text("\n".join(lines) + "\n")

    def address(self, name: str) -> str:
        return f"{_ADDRESSES}.{10 + self.names.index(name)}"

    def boot(self, name: str) -> None:
        """Start a host and plug in its cable."""
        ready = self.directory / f"{name}.ready"
        ready.unlink(missing_ok=True)
        namespaces = "--net --uts --ipc --mount --pid --fork --kill-child --mount-proc --propagation private"
        script = _INIT.format(name=name, directory=self.directory)
        self._first[name] = subprocess.Popen(
            ["unshare", *namespaces.split(), "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=(self.directory / f"{name}.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PATH": PATH},
        )
        wait_until(ready.exists, 10, f"{name} did not boot: {self.directory / f'{name}.log'}")
        self._plug_in(name)

    def _plug_in(self, name: str) -> None:
        address = f"{self.address(name)}/24"
        if name == "ctl":
            self.run("ctl", "ip", "link", "add", "br0", "type", "bridge")
            self.run("ctl", "ip", "addr", "add", address, "dev", "br0")
            self.run("ctl", "ip", "link", "set", "br0", "up")
            return
        cable = f"v-{name}"
        self.run("ctl", "ip", "link", "del", cable, check=False)
        # Only the network of ctl is entered here: the process number is that of the outside.
        veth = [
            "ip",
            "link",
            "add",
            cable,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(self._pid(name)),
        ]
        network = ["nsenter", "-t", str(self._pid("ctl")), "-n", *veth]
        subprocess.run(network, check=True, env={**os.environ, "PATH": PATH})
        self.run("ctl", "ip", "link", "set", cable, "master", "br0", "up")
        # A fixed card address, so that the others still find the host after it has been booted again.
        card = f"02:00:00:00:00:{10 + self.names.index(name):02x}"
        self.run(name, "ip", "link", "set", "eth0", "address", card)
        self.run(name, "ip", "addr", "add", address, "dev", "eth0")
        self.run(name, "ip", "link", "set", "eth0", "up")

    def _pid(self, name: str) -> int:
        parent = self._first[name].pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def _inside(self, name: str, *command: str) -> list[str]:
        enter = ["nsenter", "-t", str(self._pid(name)), "-n", "-u", "-i", "-m", "-p", f"-W{Path.cwd()}"]
        return [*enter, "--", "env", *(f"{key}={value}" for key, value in self.variables.items()), *command]

    def run(
        self,
        name: str,
        *command: str | Path,
        check: bool = True,
        timeout: float = 60,
        cwd: Path | None = None,
    ) -> str:
        """Output of a command on a host; fails with what it said."""
        result = subprocess.run(
            self._inside_in(name, cwd, *map(str, command)),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={**os.environ, "PATH": PATH},
        )
        if check and result.returncode:
            raise AssertionError(
                f"{name}: {command} ended with {result.returncode}:\n{result.stdout}{result.stderr}"
            )
        return result.stdout

    def start(self, name: str, *command: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
        """A command on a host that goes on while the test does."""
        return subprocess.Popen(
            self._inside_in(name, cwd, *map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PATH": PATH},
        )

    def _inside_in(self, name: str, cwd: Path | None, *command: str) -> list[str]:
        words = self._inside(name, *command)
        if cwd is not None:
            words[words.index(f"-W{Path.cwd()}")] = f"-W{cwd}"
        return words

    def power_off(self, name: str) -> None:
        """Cut the power: the cable goes dead first, so the others hear nothing."""
        self.run(name, "ip", "link", "set", "eth0", "down", check=False)
        self._kill(name)

    def unplug(self, name: str) -> None:
        self.run("ctl", "ip", "link", "set", f"v-{name}", "down")

    def plug(self, name: str) -> None:
        self.run("ctl", "ip", "link", "set", f"v-{name}", "up")

    def _kill(self, name: str) -> None:
        process = self._first.pop(name)
        process.kill()  # unshare takes the host's first process with it
        process.wait()

    def close(self) -> None:
        for name in reversed(list(self._first)):
            self._kill(name)
        shutil.rmtree(self.directory, ignore_errors=True)


def wait_until(condition, timeout_s: float, message: str, interval_s: float = 0.1) -> None:
    """Wait for something; fails with the message."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(interval_s)
