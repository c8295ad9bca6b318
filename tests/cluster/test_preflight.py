"""`launcher preflight` on two hosts: every fault of the second host is named in one line, in time."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path

import pytest
from ssh_hosts import ROOT, SshHosts

MODEL = shlex.split(
    "model.vocab_size=600 train.global_batch_size=16 train.micro_batch_size=4 train.device=cpu"
)
LIMIT_S = 30.0

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


class Preflight:
    """A preflight of two hosts, each started by itself."""

    def __init__(self, hosts: SshHosts, shards: Path, directory: Path) -> None:
        self.hosts, self.directory = hosts, directory
        self.shards = directory / "shards"
        shutil.copytree(shards, self.shards)
        self.run = directory / "run"
        self.run.mkdir()

    def check(self, *overrides: str, prefix: tuple[str, ...] = ()) -> tuple[list[int], list[str], float]:
        """Exit codes of both hosts, lines that they printed, seconds from the first output of python on."""
        paths = [f"data.directory={self.shards}", f"train.output_dir={self.run}"]
        job = ["preflight", "--config", "demo", *paths, *MODEL, *overrides]
        common = ["hosts", "--hostfile", str(self.hosts.hostfile), "--no-ssh", "--node-rank"]
        began_at = time.monotonic()
        running = [self.hosts.launch(f"node{n + 1}", self.directory, *common, str(n), *job) for n in range(2)]
        lines = [line for process in running for line in process.communicate(timeout=120)[0].splitlines()]
        return [process.returncode for process in running], lines, time.monotonic() - began_at

    def on_second(self, *command: str | Path) -> None:
        self.hosts.machines.run("node2", *command)


@pytest.fixture
def preflight(hosts, local_shards, tmp_path):
    check = Preflight(hosts, local_shards, tmp_path)
    yield check
    for place in (check.run, check.shards / "manifest.json", ROOT / "albert/flops.py"):
        hosts.machines.run("node2", "umount", place, check=False)
    hosts.machines.variables.pop("GLOO_SOCKET_IFNAME", None)


def errors(lines: list[str]) -> list[str]:
    return [line.partition("error: preflight: ")[2] for line in lines if "error: preflight: " in line]


def test_two_sound_hosts_pass(preflight):
    codes, lines, _ = preflight.check()
    assert codes == [0, 0], lines
    assert any(line.startswith("preflight: 2 ranks on node1, node2: ") for line in lines)
    assert any(line.startswith("preflight: all-reduce of 16 MiB: ") for line in lines)
    assert list(preflight.run.iterdir()) == []


def test_other_code_an_unshared_directory_and_stale_shards_are_named_together(preflight):
    preflight.on_second("mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", preflight.run)
    other = preflight.directory / "flops.py"
    other.write_text((ROOT / "albert/flops.py").read_text() + "\n")
    preflight.on_second("mount", "--bind", other, ROOT / "albert/flops.py")
    manifest = preflight.directory / "manifest.json"
    text = (preflight.shards / "manifest.json").read_text()
    manifest.write_text(text.replace('"seed": 0', '"seed": 1', 1))
    assert manifest.read_text() != text
    preflight.on_second("mount", "--bind", manifest, preflight.shards / "manifest.json")
    codes, lines, _ = preflight.check()
    assert codes == [78, 78], lines
    found = errors(lines)
    assert len(found) == 3, lines
    assert all(line.startswith("node2: ") for line in found)
    assert (
        f"node2: train.output_dir ({preflight.run}): not shared with the other hosts; use a shared file system"
        in found
    )
    assert any("different code (hash " in line for line in found)
    assert any("different or stale shards (manifest " in line for line in found)


@pytest.mark.slow
def test_a_full_disk_is_named(preflight):
    preflight.on_second("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", preflight.run)
    codes, lines, seconds = preflight.check()
    assert codes == [78, 78], lines
    assert seconds < LIMIT_S
    assert any(
        line.startswith("node2: train.output_dir") and "MiB are free" in line for line in errors(lines)
    )


@pytest.mark.slow
def test_a_wrong_interface_is_named(preflight):
    preflight.hosts.machines.variables["GLOO_SOCKET_IFNAME"] = "ib7"
    codes, lines, seconds = preflight.check()
    assert codes == [78, 78], lines
    assert "node2: GLOO_SOCKET_IFNAME: no network interface 'ib7'; there are eth0, lo" in errors(lines)
    assert seconds < LIMIT_S


@pytest.mark.slow
def test_a_missing_device_is_named(preflight):
    codes, lines, seconds = preflight.check("train.device=cuda")
    assert codes == [78, 78], lines
    assert any("node2: train.device (cuda): no CUDA device is visible" in line for line in errors(lines))
    assert seconds < LIMIT_S
