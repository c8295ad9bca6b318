"""A stop signal, given twice, to a rank, all ranks or the launcher, whatever they do: committed, exit code 75."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from albert import checkpoint
from launcher.process import catches
from tests.ranks import Ranks
from tests.runs import (
    ENDLESS,
    is_saving,
    last_step,
    make_workspace,
    metrics,
    newest_step,
    start,
    train,
    wait_until,
)

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).parents[2]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
TARGETS = ["one", "all", "launcher"]
PHASES = {
    "step": (),
    "save": ("checkpoint.interval_steps=1", "checkpoint.asynchronous=false"),
    "eval": ("eval.interval_steps=1", "eval.num_examples=48", "eval.micro_batch_size=1"),
    "start": (),
}
"""What makes a run be in the phase often."""
OPTIONS = (*ENDLESS, "eval.interval_steps=0", "checkpoint.interval_steps=100000")
STEPS_BEFORE = 2
"""Of the checkpoint that every run goes on from."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_workspace(tmp_path_factory.mktemp("signals"))
    assert train(directory, "before", 2, *OPTIONS, f"train.stop_after_steps={STEPS_BEFORE}") == [75, 75]
    return directory


def is_in_phase(run: Path, phase: str) -> bool:
    """Whether rank 0 is in a phase now; "step" is wherever it is not in another one."""
    if last_step(run) <= STEPS_BEFORE:
        return False
    if phase == "save":
        return is_saving(run)
    # While it evaluates, the line of the evaluation is still to come.
    return phase == "step" or metrics(run)[-1]["kind"] == "train"


def send_twice(pids: list[int], number: int) -> None:
    for pid in pids * 2:
        os.kill(pid, number)


def signal_ranks(ranks: Ranks, targets: list[int], run: Path, phase: str, number: int) -> None:
    """Stop the ranks in the phase, so that they are still in it when the signal is sent."""
    pids = [process.pid for process in ranks.processes]
    if phase == "start":
        wait_until(lambda: all(catches(pid, signal.SIGUSR2) for pid in pids), "their handlers")
        send_twice([pids[rank] for rank in targets], number)
        return
    while True:
        wait_until(lambda: is_in_phase(run, phase), phase)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        is_there = is_in_phase(run, phase)
        if is_there:
            send_twice([pids[rank] for rank in targets], number)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        if is_there:
            return


def launch(workspace: Path, run: Path, options: tuple[str, ...]) -> subprocess.Popen:
    command = ["launcher", "local", "-n", "2", "pretrain", "--config", str(workspace / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(workspace)}
    return subprocess.Popen(
        [sys.executable, "-m", *command, f"train.output_dir={run}", *options],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def stop_launcher(workspace: Path, run: Path, options: tuple[str, ...], phase: str, number: int) -> int:
    with launch(workspace, run, options) as launcher:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        try:
            wait_until(lambda: children.read_text() if phase == "start" else is_in_phase(run, phase), phase)
            send_twice([launcher.pid], number)
            _, errors = launcher.communicate(timeout=120)
        finally:
            launcher.kill()  # its ranks end with it
    assert number.name in errors
    return launcher.returncode


def cells() -> Iterator[Any]:
    """All 48; those that together have every signal in every phase and at every target are for every day."""
    for (i, number), target, (j, phase) in itertools.product(enumerate(SIGNALS), TARGETS, enumerate(PHASES)):
        is_daily = (i - j) % 4 == {"one": 0, "all": 2, "launcher": 1}[target]
        if target == "launcher":
            is_daily &= phase == "step"  # starting programs costs seconds
        marks = [] if is_daily else [pytest.mark.slow]
        yield pytest.param(number, target, phase, marks=marks, id=f"{number.name}-{target}-{phase}")


@pytest.mark.parametrize(("number", "target", "phase"), list(cells()))
def test_a_signal_commits_and_exits_75(workspace, number, target, phase):
    run = workspace / f"{number.name}-{target}-{phase}"
    shutil.copytree(workspace / "before", run)
    options = (*OPTIONS, *PHASES[phase])
    if target == "launcher":
        assert stop_launcher(workspace, run, options, phase, number) == 75
    else:
        ranks = start(workspace, run.name, 2, *options)
        signal_ranks(ranks, [1] if target == "one" else [0, 1], run, phase, number)
        assert ranks.results() == [75, 75]
    assert newest_step(run) == last_step(run) >= STEPS_BEFORE
    checkpoint.verify(checkpoint.find_latest(run))
