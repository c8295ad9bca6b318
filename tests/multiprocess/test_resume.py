"""20 steps = 10 + SIGKILL + 10, bitwise; damaged checkpoints, refused changes, one owner of a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from albert import checkpoint
from tests.runs import (
    ENDLESS,
    assert_same_run,
    kill_all,
    last_step,
    make_workspace,
    start,
    train,
    wait_until,
)

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_killed_and_resumed_run_is_bitwise_the_same(workspace, stage):
    placement = f"deepspeed.config={stage}"
    assert train(workspace, f"whole-{stage}", 2, placement) == [0, 0]
    killed = workspace / f"killed-{stage}"
    ranks = start(workspace, killed.name, 2, placement)
    wait_until(lambda: last_step(killed) >= 12, "step 12")
    kill_all(ranks)
    assert checkpoint.list_steps(killed / "checkpoints")[-1] in (5, 10)
    assert train(workspace, killed.name, 2, placement, "checkpoint.resume=required") == [0, 0]
    assert_same_run(workspace / f"whole-{stage}", killed)


def test_bf16_and_checkpointed_activations_resume_bitwise(workspace):
    options = ("train.precision=bf16", "train.activation_checkpointing=true", "deepspeed.config=zero1")
    assert train(workspace, "whole-bf16", 1, *options) == [0]
    assert train(workspace, "stopped-bf16", 1, *options, "train.stop_after_steps=7") == [75]
    assert train(workspace, "stopped-bf16", 1, *options) == [0]
    assert_same_run(workspace / "whole-bf16", workspace / "stopped-bf16")


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
    first = start(workspace, "owned", 1, *ENDLESS)
    wait_until(lambda: last_step(run) >= 1, "the first step")
    assert train(workspace, "owned", 2) == [78, 78]
    message = capfd.readouterr().err
    assert f"owned by process {first.processes[0].pid} on" in message
    assert "refused by rank 0, see its message" in message
    os.kill(first.processes[0].pid, signal.SIGTERM)
    assert first.results() == [75]
    assert train(workspace, "owned", 1, "train.stop_after_steps=1", *ENDLESS) == [75]
