"""Ranks that hang are named with what they were doing, and the run ends with exit code 76 in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import albert.pretrained
import albert.trainer
from albert.distributed import peer_errors
from albert.errors import PeerLostError, end_rank
from albert.loader import TrainLoader
from tests import runs
from tests.hangs import (
    FAULTY_STEP,
    HANG_TIMEOUT_S,
    assert_a_stopped_rank_is_named,
    assert_rank_1_is_named_with_its_phase,
    exit_code,
    wait_for_ever,
)
from tests.ranks import Ranks

pytestmark = pytest.mark.multiprocess
SETTING = "train.hang_timeout_s"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_workspace(tmp_path_factory.mktemp("hangs"))


def stuck_loader() -> None:
    """Rank 1 gets no data for a step."""
    original = TrainLoader.steps

    def steps(*arguments):
        for index, step in enumerate(original(*arguments)):
            if index == FAULTY_STEP and os.environ["RANK"] == "1":
                wait_for_ever()
            yield step

    TrainLoader.steps = steps


def missing_collective() -> None:
    """Rank 1 does not join the others in a step."""
    original, calls = albert.trainer.count_batch, []

    def count_batch(*arguments, **options):
        calls.append(1)
        if len(calls) == FAULTY_STEP + 1 and os.environ["RANK"] == "1":
            wait_for_ever()
        return original(*arguments, **options)

    albert.trainer.count_batch = count_batch


def slow_model() -> None:
    """Rank 0 writes the model for longer than a step may hang, while the others have nothing more to do."""
    original = albert.pretrained.save_pretrained

    def save_pretrained(*arguments):
        time.sleep(3 * HANG_TIMEOUT_S)
        original(*arguments)

    albert.pretrained.save_pretrained = save_pretrained


def _faulty_pretrain(fault: Callable[[], None], config: str, overrides: list[str]) -> None:
    fault()
    end_rank(runs.pretrain_rank(config, overrides))


def start(workspace: Path, name: str, fault: Callable[[], None], *more: str) -> Ranks:
    overrides = [
        f"train.output_dir={workspace / name}", *runs.ENDLESS, "eval.interval_steps=0", "data.num_workers=0",
        f"train.hang_timeout_s={HANG_TIMEOUT_S}", *more,
    ]  # fmt: skip
    return Ranks(2, _faulty_pretrain, fault, str(workspace / "config.yaml"), overrides)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named(workspace, capfd, stopped):
    ranks = start(workspace, f"stopped-{stopped}", lambda: None)
    run = workspace / f"stopped-{stopped}"
    assert_a_stopped_rank_is_named(ranks, run, stopped, SETTING, lambda: capfd.readouterr().err)


@pytest.mark.parametrize(("fault", "phase"), [(stuck_loader, "data"), (missing_collective, "count")])
def test_a_rank_that_does_not_get_on_is_named_with_its_phase(workspace, capfd, fault, phase):
    ranks = start(workspace, fault.__name__, fault)
    run = workspace / fault.__name__
    assert_rank_1_is_named_with_its_phase(ranks, run, phase, SETTING, lambda: capfd.readouterr().err)


def test_ranks_wait_for_one_that_writes_the_model_slowly(workspace):
    ranks = start(workspace, "slow-model", slow_model, "train.num_steps=12")
    assert [exit_code(ranks, rank) for rank in (0, 1)] == [0, 0]
    assert (workspace / "slow-model" / "model").is_dir()


def test_a_killed_loader_process_asks_for_a_restart(workspace):
    run = workspace / "loader"
    overrides = [f"train.output_dir={run}", *runs.ENDLESS, "eval.interval_steps=0"]
    ranks = Ranks(2, _faulty_pretrain, lambda: None, str(workspace / "config.yaml"), overrides)
    runs.wait_until(lambda: runs.last_step(run) > FAULTY_STEP, "some steps")
    pid = ranks.processes[1].pid
    (loader,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(loader), signal.SIGKILL)
    assert [exit_code(ranks, rank) for rank in (0, 1)] == [76, 76]


def test_a_lost_loader_process_is_told_from_a_lost_rank():
    with (
        pytest.raises(
            PeerLostError, match=r"a process that loads data .* \(DataLoader worker \(pid 7\) is killed"
        ),
        peer_errors(),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def test_a_suspended_job_goes_on(workspace):
    """All ranks stand still, as under `scontrol suspend`, for longer than a hang may last."""
    ranks = start(workspace, "suspended", lambda: None)
    run = workspace / "suspended"
    runs.wait_until(lambda: runs.last_step(run) > FAULTY_STEP, "some steps")
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGSTOP)
    before = runs.last_step(run)
    time.sleep(2 * HANG_TIMEOUT_S)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGCONT)
    runs.wait_until(lambda: runs.last_step(run) > before + 20, "steps after the pause")
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert [exit_code(ranks, rank) for rank in (0, 1)] == [75, 75]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_false_alarm_in_10000_steps(workspace):
    overrides = (
        "train.num_steps=10000", "schedule.warmup_steps=10", "eval.interval_steps=1000", "log.interval_steps=50",
        "checkpoint.interval_steps=500", "optimizer.learning_rate=0.001", "train.hang_timeout_s=10",
    )  # fmt: skip
    assert runs.start(workspace, "long", 2, *overrides).results(timeout_s=1200) == [0, 0]
