"""`launcher hosts` on two ssh hosts: pdsh, OpenMPI, and each host by itself, all with the same losses."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from machines import wait_until

ROOT = Path(__file__).parents[2]
NUM_STEPS = 8
SETTINGS = shlex.split(
    "model.vocab_size=600 model.embedding_size=16 model.hidden_size=32 model.num_hidden_layers=2 "
    "model.num_attention_heads=2 model.intermediate_size=64 train.global_batch_size=16 train.micro_batch_size=4 "
    "schedule.warmup_steps=4 eval.interval_steps=0 log.interval_steps=1 log.progress=off log.tensorboard=false"
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def pretrain(shards: Path, run: Path, *more: str) -> list[str]:
    paths = [f"data.directory={shards}", f"train.output_dir={run}"]
    return ["pretrain", "--config", "demo", *paths, "train.num_steps=40", *SETTINGS, *more]


def losses(run: Path) -> list[float]:
    lines = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")
    ]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def end(process: subprocess.Popen, code: int) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


STOPPED = f"train.stop_after_steps={NUM_STEPS}"


@pytest.fixture(scope="module")
def by_themselves(hosts, local_shards, tmp_path_factory) -> list[float]:
    """Losses of the run that each host starts by itself."""
    directory = tmp_path_factory.mktemp("no-ssh")
    common = ["hosts", "--hostfile", str(hosts.hostfile), "--no-ssh", "--node-rank"]
    job = pretrain(local_shards, directory / "run", STOPPED)
    running = [hosts.launch(f"node{n + 1}", directory, *common, str(n), *job) for n in range(2)]
    for process in running:
        end(process, 75)
    assert len(losses(directory / "run")) == NUM_STEPS
    return losses(directory / "run")


@pytest.mark.parametrize("via", ["pdsh", "openmpi"])
def test_one_command_trains_to_the_same_losses_and_ends_with_the_ranks_code(
    hosts, local_shards, by_themselves, tmp_path, via
):
    words = ["hosts", "--hostfile", str(hosts.hostfile), "--via", via, "--interface", "eth0"]
    end(hosts.launch("ctl", tmp_path, *words, *pretrain(local_shards, tmp_path / "run", STOPPED)), 75)
    assert losses(tmp_path / "run") == by_themselves
    logs = next((tmp_path / "launcher-logs").iterdir())
    assert sorted(path.name for path in logs.glob("*.log")) == ["rank-0.log", "rank-1.log"]


def test_hosts_make_the_shards_of_a_single_build_in_parts(hosts, text, tokenizer, local_shards, tmp_path):
    words = ["hosts", "--hostfile", str(hosts.hostfile), "data", "build"]
    options = ["--max-seq-length", "32", "--eval-fraction", "0.1", "--workers", "1"]
    files = ["--input", str(text), "--tokenizer", str(tokenizer), "--output", "data"]
    said = end(hosts.launch("ctl", tmp_path, *words, *files, *options), 0)
    assert "data: part 0/2 is done" in said
    assert "data: 2 shards, manifest " in said
    for path in local_shards.iterdir():
        assert path.is_dir() or (tmp_path / "data" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_signal_to_the_launcher_commits_on_all_hosts(hosts, local_shards, tmp_path):
    words = ["hosts", "--hostfile", str(hosts.hostfile)]
    process = hosts.launch(
        "ctl", tmp_path, *words, *pretrain(local_shards, tmp_path / "run", "train.num_steps=100000")
    )
    run = tmp_path / "run"
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3, 90, "no steps were trained")
    launcher = hosts.machines.run("ctl", "pgrep", "-o", "-f", "launcher hosts").strip()
    hosts.machines.run("ctl", "kill", f"-{int(signal.SIGTERM)}", launcher)
    end(process, 75)
    assert (run / "checkpoints/latest").exists()
    for host in hosts.machines.nodes:
        assert hosts.machines.run(host, "pgrep", "-f", "albert.pretrain", check=False) == ""
