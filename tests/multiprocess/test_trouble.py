"""What goes wrong inside a step: poisoned batches, numbers that are not finite, weights that differ."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from albert import checkpoint, loss_spikes
from albert.errors import end_rank
from albert.sample_order import step_positions
from albert.trainer import Trainer
from tests import runs
from tests.ranks import Ranks

pytestmark = pytest.mark.multiprocess
BATCH = 12
POISONED = 33 * BATCH
"""First position of step 34."""
SPIKES = ("spikes.action=rewind", "spikes.threshold=20", "log.ledger=true", "train.num_steps=45")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_workspace(tmp_path_factory.mktemp("trouble"))


def _faulty_pretrain(fault: Callable[[], None], config: str, overrides: list[str]) -> None:
    fault()
    end_rank(runs.pretrain_rank(config, overrides))


def codes(
    workspace: Path, name: str, world_size: int, fault: Callable[[], None], *overrides: str
) -> list[int]:
    """Exit codes of a run in which something goes wrong."""
    output = [f"train.output_dir={workspace / name}", *overrides]
    ranks = Ranks(world_size, _faulty_pretrain, fault, str(workspace / "config.yaml"), output)
    for process in ranks.processes:
        process.join(100)
    ranks.kill()
    return [process.exitcode for process in ranks.processes]


def events(run: Path) -> list[dict]:
    return [line for line in runs.metrics(run) if line["kind"] == "event"]


def poison() -> None:
    """The examples from one position on make a loss ten times as high."""
    original = Trainer._forward

    def forward(self, *arguments, **options):
        loss, values = original(self, *arguments, **options)
        first = step_positions(self.position, 1, self.checkpoints.skipped_ranges)[0]
        factor = 10 if first == POISONED else 1
        return factor * loss, factor * values

    Trainer._forward = forward


def audit(workspace: Path, name: str, *options: str) -> list[int]:
    return codes(workspace, name, 1, lambda: None, "--audit-ledger", *options)


@pytest.mark.parametrize("log_interval", [1, 7])
def test_a_spike_is_left_out_as_if_its_batch_had_never_been_there(workspace, log_interval, capfd):
    name, clean = f"spike-{log_interval}", f"clean-{log_interval}"
    options = (*SPIKES, f"log.interval_steps={log_interval}")
    assert codes(workspace, name, 2, poison, *options) == [0, 0]
    skipped = loss_spikes.read_skipped(workspace / name / "checkpoints")
    assert [(step.begin, step.end, step.step, step.rewind) for step in skipped] == [
        (POISONED, POISONED + BATCH, 34, 1)
    ]
    (workspace / clean / "checkpoints").mkdir(parents=True)
    shutil.copy(
        workspace / name / "checkpoints" / loss_spikes.SKIPPED_NAME, workspace / clean / "checkpoints"
    )
    assert runs.train(workspace, clean, 2, *options) == [0, 0]
    runs.assert_same_state(workspace / name, workspace / clean)
    state = checkpoint.read_manifest(checkpoint.find_latest(workspace / name)).state
    assert (state.position, state.skipped) == (46 * BATCH, [(POISONED, POISONED + BATCH)])
    capfd.readouterr()
    assert audit(workspace, name, *options) == [0]
    report = capfd.readouterr().out
    assert "540 examples in their order, 0 lost, 0 repeated" in report
    assert "12 skipped after loss spikes" in report
    (back,) = [line for line in events(workspace / name) if "went back" in line["message"]]
    assert back["step"] == 30
    assert back["positions_left_out"] == [[POISONED, POISONED + BATCH]]


def test_a_run_killed_after_it_went_back_does_not_use_what_it_left_out(workspace):
    """The process dies after the file of skipped steps is written and before anything else."""

    def die_while_going_back() -> None:
        poison()
        original = loss_spikes.write_skipped

        def write_and_die(*arguments):
            original(*arguments)
            os.kill(os.getpid(), 9)

        import albert.run_checkpoints

        albert.run_checkpoints.write_skipped = write_and_die

    options = (*SPIKES, "log.interval_steps=9")
    assert codes(workspace, "dead", 2, die_while_going_back, *options)[0] == -9
    assert runs.train(workspace, "dead", 2, *options) == [0, 0]
    runs.assert_same_state(workspace / "dead", workspace / "clean-1")


def test_without_rewind_a_spike_is_reported(workspace):
    options = ("spikes.threshold=20", "train.num_steps=36")
    assert codes(workspace, "reported", 1, poison, *options) == [0]
    (line,) = [line for line in events(workspace / "reported") if "spike" in line["message"]]
    assert line["step"] == 34
    assert line["message"].startswith("loss spike: ")


def nan_output() -> None:
    """From step 8 on, the feed-forward block of rank 1 computes a NaN."""
    original = Trainer._forward

    def forward(self, *arguments, **options):
        block = self.engine.model.get_submodule("albert.encoder.feed_forward.0")
        if self.step >= 7 and self.world.rank == 1 and not hasattr(self, "is_faulty"):
            self.is_faulty = True
            block.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        return original(self, *arguments, **options)

    Trainer._forward = forward


def nan_gradient() -> None:
    """From step 8 on, what goes back through the pooled output of rank 0 is not finite."""
    original = Trainer._forward

    def forward(self, *arguments, **options):
        pooler = self.engine.model.get_submodule("albert.pooler")
        if self.step >= 7 and self.world.rank == 0 and not hasattr(self, "is_faulty"):
            self.is_faulty = True
            pooler.register_forward_hook(
                lambda module, inputs, output: output.register_hook(lambda gradient: gradient / 0.0) and None
            )
        return original(self, *arguments, **options)

    Trainer._forward = forward


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_the_first_bad_tensor_is_named(workspace, capfd, stage):
    name = f"nan-{stage}"
    assert codes(workspace, name, 2, nan_output, f"deepspeed.config={stage}") == [70, 70]
    found = [line for line in events(workspace / name) if "dropped" in line["message"]]
    assert [line["step"] for line in found] == [8, 9, 10]
    assert found[0]["positions"] == [7 * BATCH, 8 * BATCH]
    assert found[0]["message"].endswith("first bad tensor on rank 1: output of albert.encoder.feed_forward.0")
    assert "not finite 3 times in a row (update dropped: gradient norm" in capfd.readouterr().err


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_the_first_bad_gradient_is_named(workspace, stage):
    name = f"inf-{stage}"
    assert codes(workspace, name, 2, nan_gradient, f"deepspeed.config={stage}") == [70, 70]
    found = [line["message"] for line in events(workspace / name) if "dropped" in line["message"]]
    assert len(found) == 3
    assert found[0].endswith(
        "first bad tensor on rank 0: gradient of the output of albert.encoder.feed_forward.0.LayerNorm"
    )


def flip_a_bit() -> None:
    """After step 9, one bit of one weight of rank 1 is another."""
    original = Trainer._advance

    def advance(self, *arguments):
        original(self, *arguments)
        if self.step == 9 and self.world.rank == 1:
            weight = next(self.engine.model.parameters()).data.view(-1)
            weight[3:4].view(torch.int32).bitwise_xor_(1)

    Trainer._advance = advance


@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_a_replica_with_one_flipped_bit_is_named(workspace, capfd, stage):
    options = ("train.replica_check_interval_steps=5", f"deepspeed.config={stage}")
    assert (
        codes(workspace, f"flipped-{stage}", 3, flip_a_bit, "train.micro_batch_size=2", *options) == [76] * 3
    )
    assert "step 10: the weights of rank 1 differ from the other ranks'" in capfd.readouterr().err
    assert checkpoint.list_steps(workspace / f"flipped-{stage}" / "checkpoints")[-1] == 5
    assert (
        codes(workspace, f"sound-{stage}", 3, lambda: None, "train.micro_batch_size=2", *options) == [0] * 3
    )


def test_a_killed_run_whose_ranks_and_batch_change_has_an_exact_ledger(workspace, capfd):
    options = ("log.ledger=true", "train.num_steps=40")
    run = workspace / "ledger"
    for world_size, step in [(2, 8), (3, 17), (1, 27)]:
        ranks = runs.start(workspace, run.name, world_size, "train.micro_batch_size=2", *options)
        runs.wait_until(lambda step=step: runs.last_step(run) >= step, f"step {step}")
        runs.kill_all(ranks)
    resumed_at = checkpoint.list_steps(run / "checkpoints")[-1]
    twice = ("train.global_batch_size=24", "checkpoint.allow_changes=[train.global_batch_size]")
    assert runs.train(workspace, run.name, 2, *options, *twice) == [0, 0]
    capfd.readouterr()
    assert audit(workspace, run.name, *options) == [0]
    report = capfd.readouterr().out
    assert report.startswith("40 steps in 4 starts, ")
    num_examples = 12 * resumed_at + 24 * (40 - resumed_at)
    assert f"{num_examples} examples in their order, 0 lost, 0 repeated" in report
    lines = (run / "ledger" / "start-0003" / "rank-00000.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 40


def test_profiled_steps_leave_a_trace_and_the_same_run(workspace, capfd):
    assert runs.train(workspace, "profiled", 2, "log.profile_steps=2") == [0, 0]
    assert runs.train(workspace, "plain", 2) == [0, 0]
    runs.assert_same_run(workspace / "profiled", workspace / "plain")
    for rank in range(2):
        path = workspace / "profiled" / "profile" / f"rank-{rank:05d}.trace.json"
        names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
        assert {"ProfilerStep#4", "ProfilerStep#5", "aten::addmm"} <= names
    assert "trace of 2 steps written" in capfd.readouterr().err


def test_the_loss_scale_of_fp16_goes_on_after_a_stop(workspace):
    """An overflow before the stop halves the scale; the history of the scaler decides when it grows again."""
    options = ("train.precision=fp16", "deepspeed.config=zero1")
    assert codes(workspace, "fp16-whole", 2, overflow_once, *options) == [0, 0]
    assert codes(workspace, "fp16-parts", 2, overflow_once, *options, "train.stop_after_steps=9") == [75, 75]
    assert codes(workspace, "fp16-parts", 2, overflow_once, *options) == [0, 0]
    runs.assert_same_run(workspace / "fp16-whole", workspace / "fp16-parts")
    states = [
        checkpoint.read_manifest(checkpoint.find_latest(workspace / name)).state.loss_scaler
        for name in ("fp16-whole", "fp16-parts")
    ]
    assert states[0] == states[1]
    assert states[0]["last_overflow_iter"] > 0


def overflow_once() -> None:
    """At step 7 the loss is infinite. Every CPU computes in fp16; DeepSpeed allows only those that do it fast."""
    get_accelerator().is_fp16_supported = lambda: True
    original = Trainer._forward

    def forward(self, *arguments, **options):
        loss, values = original(self, *arguments, **options)
        return (loss * float("inf") if self.step == 6 else loss), values

    Trainer._forward = forward
