"""20 steps = 10 + SIGKILL + 10, bitwise; and the same trajectory on other numbers of ranks."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import yaml

from albert import checkpoint, pretrain
from albert.errors import run_command
from tests.ranks import Ranks
from tests.synthetic import TINY_MODEL, make_dataset

pytestmark = pytest.mark.multiprocess
NUM_STEPS = 20


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    make_dataset(directory / "shards")
    config = {
        "model": {**TINY_MODEL, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        "data": {"directory": str(directory / "shards"), "num_workers": 1},
        "train": {
            "output_dir": "?",
            "num_steps": NUM_STEPS,
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


def _pretrain(config: str, overrides: list[str]) -> int:
    import sys

    sys.argv = ["pretrain", "--config", config, *overrides]
    return run_command(pretrain._main)


def start(workspace: Path, name: str, world_size: int, *overrides: str) -> Ranks:
    output = f"train.output_dir={workspace / name}"
    return Ranks(world_size, _pretrain, str(workspace / "config.yaml"), [output, *overrides])


def train(workspace: Path, name: str, world_size: int, *overrides: str) -> list[int]:
    return start(workspace, name, world_size, *overrides).results()


def final_state(run: Path) -> dict[str, np.ndarray]:
    directory = checkpoint.find_latest(run)
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def losses(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("mlm_loss", "sop_loss", "mlm_accuracy", "sop_accuracy", "learning_rate", "grad_norm")
    return {
        (line["kind"], line["step"]): {key: line[key] for key in kept if key in line}
        for line in lines
        if line["kind"] != "event"
    }


def kill_at_step(ranks: Ranks, run: Path, step: int) -> None:
    """SIGKILL all ranks as soon as the metrics of a step are written."""
    deadline = time.monotonic() + 100
    path = run / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.is_file() and f'"step": {step},' in path.read_text():
            break
        time.sleep(0.01)
    else:
        raise AssertionError(f"step {step} was not reached")
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGKILL)
    ranks.kill()


def assert_same_run(left: Path, right: Path) -> None:
    ours, theirs = final_state(left), final_state(right)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert losses(left) == losses(right)


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_killed_and_resumed_run_is_bitwise_the_same(workspace, stage):
    placement = f"deepspeed.config={stage}"
    assert train(workspace, f"whole-{stage}", 2, placement) == [0, 0]
    killed = workspace / f"killed-{stage}"
    kill_at_step(start(workspace, killed.name, 2, placement), killed, 12)
    assert checkpoint.list_steps(killed / "checkpoints")[-1] in (5, 10)
    assert train(workspace, killed.name, 2, placement, "checkpoint.resume=required") == [0, 0]
    assert_same_run(workspace / f"whole-{stage}", killed)


def test_bf16_and_checkpointed_activations_resume_bitwise(workspace):
    options = ("train.precision=bf16", "train.activation_checkpointing=true", "deepspeed.config=zero1")
    assert train(workspace, "whole-bf16", 1, *options) == [0]
    assert train(workspace, "stopped-bf16", 1, *options, "train.stop_after_steps=7") == [75]
    assert train(workspace, "stopped-bf16", 1, *options) == [0]
    assert_same_run(workspace / "whole-bf16", workspace / "stopped-bf16")


def test_other_ranks_stage_and_micro_batch_follow_the_same_trajectory(workspace):
    plain = ("model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0")
    assert train(workspace, "one", 1, *plain, "deepspeed.config=zero0") == [0]
    hops = [(2, "zero1", 3), (3, "zero2", 2), (1, "zero3", 12), (2, "zero3", 1)]
    for stop, (world_size, stage, micro) in zip((5, 9, 13, NUM_STEPS), hops, strict=True):
        codes = train(
            workspace, "hops", world_size, *plain, f"deepspeed.config={stage}", f"train.micro_batch_size={micro}",
            f"train.stop_after_steps={stop}",
        )  # fmt: skip
        assert set(codes) == {0 if stop == NUM_STEPS else 75}
    ours, theirs = losses(workspace / "hops"), losses(workspace / "one")
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        for name in ("mlm_loss", "sop_loss"):
            assert ours[key][name] == pytest.approx(values[name], rel=2e-6), (key, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_one_rank_commits_and_exits_75_on_all(workspace, number):
    run = workspace / f"signalled-{number}"
    ranks = start(workspace, run.name, 2, "train.num_steps=100000", "schedule.warmup_steps=2")
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not ((run / "metrics.jsonl").is_file() and losses(run)):
        time.sleep(0.02)
    os.kill(ranks.processes[1].pid, number)
    os.kill(ranks.processes[1].pid, number)
    assert ranks.results() == [75, 75]
    last_step = max(step for _, step in losses(run))
    assert checkpoint.verify(checkpoint.find_latest(run)).state.step == last_step


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(workspace):
    assert train(workspace, "damaged", 2, "train.stop_after_steps=10") == [75, 75]
    newest = checkpoint.find_latest(workspace / "damaged")
    victim = next(newest.glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert train(workspace, "damaged", 2) == [0, 0]
    assert train(workspace, "undamaged", 2) == [0, 0]
    assert_same_run(workspace / "undamaged", workspace / "damaged")


def test_a_changed_configuration_is_refused_with_the_difference(workspace, capfd):
    assert train(workspace, "changed", 1, "train.stop_after_steps=3") == [75]
    assert train(workspace, "changed", 1, "optimizer.weight_decay=0.5", "model.ln_type=preln") == [78]
    message = capfd.readouterr().err
    assert "optimizer.weight_decay: 0.01 in the checkpoint, 0.5 now" in message
    assert "model.ln_type: 'postln' in the checkpoint, 'preln' now" in message
    allowed = "checkpoint.allow_changes=[optimizer.weight_decay]"
    assert train(workspace, "changed", 1, "optimizer.weight_decay=0.5", allowed) == [0]


def test_resume_modes(workspace, capfd):
    assert train(workspace, "modes", 1, "checkpoint.resume=required") == [66]
    assert "no checkpoint, and checkpoint.resume is required" in capfd.readouterr().err
    assert train(workspace, "modes", 1, "train.stop_after_steps=2") == [75]
    assert train(workspace, "modes", 1, "checkpoint.resume=never") == [78]
    assert "holds a checkpoint of step 2 and checkpoint.resume is never" in capfd.readouterr().err


def test_two_jobs_cannot_own_one_run(workspace, capfd):
    run = workspace / "owned"
    first = start(workspace, "owned", 1, "train.num_steps=100000", "schedule.warmup_steps=2")
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not ((run / "metrics.jsonl").is_file() and losses(run)):
        time.sleep(0.02)
    assert train(workspace, "owned", 2) == [78, 78]
    message = capfd.readouterr().err
    assert f"owned by process {first.processes[0].pid} on" in message
    assert "refused by rank 0, see its message" in message
    os.kill(first.processes[0].pid, signal.SIGTERM)
    assert first.results() == [75]
    assert train(
        workspace, "owned", 1, "train.stop_after_steps=1", "train.num_steps=100000", "schedule.warmup_steps=2"
    ) == [75]
