"""Small pretraining runs on forked ranks, and how to compare, watch and kill them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

from albert import checkpoint, pretrain
from albert.errors import run_command
from tests.ranks import Ranks
from tests.synthetic import TINY_MODEL, make_dataset

NO_DROPOUT = ("model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0")
"""Dropout depends on the number of ranks."""
ENDLESS = ("train.num_steps=100000", "schedule.warmup_steps=2")


def make_workspace(directory: Path, num_steps: int = 20) -> Path:
    """A dataset and `config.yaml` of a run over it; returns the directory."""
    make_dataset(directory / "shards")
    config = {
        "model": {**TINY_MODEL, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        "data": {"directory": str(directory / "shards"), "num_workers": 1},
        "train": {
            "output_dir": "?",
            "num_steps": num_steps,
            "global_batch_size": 12,
            "micro_batch_size": 3,
            "precision": "fp32",
            "peer_timeout_s": 60,
        },
        "optimizer": {"name": "lamb", "learning_rate": 0.02},
        "schedule": {"name": "linear", "warmup_steps": 3},
        "eval": {"interval_steps": 10, "num_examples": 20},
        "checkpoint": {"interval_steps": 5, "keep_last": 2},
        "log": {"interval_steps": 1, "tensorboard": False, "progress": "off"},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def pretrain_rank(config: str, overrides: list[str]) -> int:
    """What one rank does; returns its exit code."""
    sys.argv = ["pretrain", "--config", config, *overrides]
    return run_command(pretrain._main)


def start(workspace: Path, name: str, world_size: int, *overrides: str) -> Ranks:
    """Begin to train in `workspace/name`."""
    output = f"train.output_dir={workspace / name}"
    return Ranks(world_size, pretrain_rank, str(workspace / "config.yaml"), [output, *overrides])


def train(workspace: Path, name: str, world_size: int, *overrides: str) -> list[int]:
    """Train to the end; returns the exit codes of the ranks."""
    return start(workspace, name, world_size, *overrides).results()


def audit(workspace: Path, name: str, *overrides: str) -> int:
    """Exit code of `--audit-ledger`: 0 where no example was lost or repeated."""
    return train(workspace, name, 1, *overrides, "log.ledger=true", "--audit-ledger")[0]


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 100) -> None:
    """Look every few milliseconds whether a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.005)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(run: Path, since: float = 0.0) -> int:
    """Newest step in the metrics that was done after a time (seconds since 1970), -1 before the first."""
    steps = [line["step"] for line in metrics(run) if line["kind"] == "train" and line["time"] >= since]
    return max(steps, default=-1)


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is under way."""
    return any((run / "checkpoints").glob("step-*.tmp"))


def newest_step(run: Path) -> int:
    """Step of the newest committed checkpoint, 0 without one."""
    return max(checkpoint.list_steps(run / "checkpoints"), default=0)


def kill_all(ranks: Ranks) -> None:
    """SIGKILL every rank."""
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGKILL)
    ranks.kill()


def final_state(run: Path) -> dict[str, np.ndarray]:
    """All tensors of the newest checkpoint."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(checkpoint.find_latest(run).glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def losses(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What is a function of the training alone, by ("train" or "eval", step)."""
    kept = ("mlm_loss", "sop_loss", "mlm_accuracy", "sop_accuracy", "learning_rate", "grad_norm")
    return {
        (line["kind"], line["step"]): {key: line[key] for key in kept if key in line}
        for line in metrics(run)
        if line["kind"] != "event"
    }


def assert_same_state(left: Path, right: Path) -> None:
    """Equal weights and optimizer, bit for bit."""
    ours, theirs = final_state(left), final_state(right)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def assert_same_run(left: Path, right: Path) -> None:
    """Equal weights, optimizer and losses, bit for bit."""
    assert_same_state(left, right)
    assert losses(left) == losses(right)
