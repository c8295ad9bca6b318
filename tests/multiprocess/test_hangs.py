"""Ranks that hang are named with what they were doing, and the run ends with exit code 76 in time."""

from __future__ import annotations

import os
import re
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
from tests.ranks import Ranks

pytestmark = pytest.mark.multiprocess
HANG_TIMEOUT_S = 2.0
FAULTY_STEP = 12


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_workspace(tmp_path_factory.mktemp("hangs"))


def _wait_for_ever() -> None:
    time.sleep(1000)


def stuck_loader() -> None:
    """Rank 1 gets no data for a step."""
    original = TrainLoader.steps

    def steps(*arguments):
        for index, step in enumerate(original(*arguments)):
            if index == FAULTY_STEP and os.environ["RANK"] == "1":
                _wait_for_ever()
            yield step

    TrainLoader.steps = steps


def missing_collective() -> None:
    """Rank 1 does not join the others in a step."""
    original, calls = albert.trainer.count_batch, []

    def count_batch(*arguments, **options):
        calls.append(1)
        if len(calls) == FAULTY_STEP + 1 and os.environ["RANK"] == "1":
            _wait_for_ever()
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


def exit_code(ranks: Ranks, rank: int, timeout_s: float = 60) -> int | None:
    ranks.processes[rank].join(timeout_s)
    return ranks.processes[rank].exitcode


def allowed_s(message: str) -> float:
    return max(float(found) for found in re.findall(r"([\d.]+) s are allowed", message))


def assert_in_time(message: str, elapsed_s: float) -> None:
    """Within what was allowed and the time that it takes to look twice, print and leave."""
    assert allowed_s(message) >= HANG_TIMEOUT_S
    assert elapsed_s < allowed_s(message) + 4


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named(workspace, capfd, stopped):
    name, other = f"stopped-{stopped}", 1 - stopped
    ranks = start(workspace, name, lambda: None)
    runs.wait_until(lambda: runs.last_step(workspace / name) > FAULTY_STEP, "some steps")
    os.kill(ranks.processes[stopped].pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    assert exit_code(ranks, other) == 76
    elapsed_s = time.monotonic() - stopped_at
    ranks.kill()
    message = capfd.readouterr().err
    # Rank 0 keeps the store by which ranks are asked.
    reasons = [
        "rank 0 cannot be asked",
        r"rank 1 on \S+ is silent since \w+ of step \d+: stopped, or its host is lost",
    ]
    assert re.search(reasons[stopped], message)
    assert "most recent call first" in message  # the stacks of the other rank
    assert_in_time(message, elapsed_s)


@pytest.mark.parametrize(("fault", "phase"), [(stuck_loader, "data"), (missing_collective, "count")])
def test_a_rank_that_does_not_get_on_is_named_with_its_phase(workspace, capfd, fault, phase):
    ranks = start(workspace, fault.__name__, fault)
    runs.wait_until(lambda: runs.last_step(workspace / fault.__name__) == FAULTY_STEP, "the faulty step")
    began_at = time.monotonic()
    assert [exit_code(ranks, rank) for rank in (0, 1)] == [76, 76]
    elapsed_s = time.monotonic() - began_at
    message = capfd.readouterr().err
    assert f"[rank 1] error: {phase} of step {FAULTY_STEP} has taken" in message
    assert "in _wait_for_ever" in message  # its stack says why
    assert_in_time(message, elapsed_s)


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
