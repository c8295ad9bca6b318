"""SIGKILL at random moments, also inside saves; a run that is started again until it is done is bitwise the same.

KILL_LEDGER=FILE appends one JSON line for every kill.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from albert.errors import PeerLostError
from tests.runs import (
    assert_same_run,
    audit,
    is_saving,
    last_step,
    make_workspace,
    newest_step,
    start,
    train,
    wait_until,
)

pytestmark = pytest.mark.multiprocess
NUM_STEPS = 18
WORLD_SIZE = 2
OPTIONS = ("checkpoint.interval_steps=2", "log.ledger=true")
STAGES = ["zero0", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("kills"), NUM_STEPS)


@pytest.fixture(scope="module")
def undisturbed(workspace):
    """Runs that nobody kills, by stage."""

    def run(stage: str) -> Path:
        name = f"undisturbed-{stage}"
        if not (workspace / name).exists():
            assert train(workspace, name, WORLD_SIZE, *OPTIONS, f"deepspeed.config={stage}") == [0, 0]
        return workspace / name

    return run


def start_and_kill(
    workspace: Path, name: str, options: tuple[str, ...], first: int, last: int, seed: int
) -> None:
    """Kill one rank or all of them at a random moment after a random step from `first` to `last`, or in a save."""
    generator = np.random.default_rng(seed)
    step = int(generator.integers(first, last + 1))
    victims = [[0], [1], [0, 1]][generator.integers(3)] if step else [0, 1]
    run = workspace / name
    began_at = time.time()
    ranks = start(workspace, name, WORLD_SIZE, *options)

    def is_there() -> bool:
        return last_step(run, began_at) >= step or not ranks.are_alive

    if step == 0:
        time.sleep(generator.uniform(0, 1))  # while the ranks start
    elif generator.random() < 0.5:
        wait_until(lambda: is_there() and (is_saving(run) or not ranks.are_alive), f"seed {seed}, save")
        time.sleep(generator.uniform(0, 0.01))
    else:
        wait_until(is_there, f"seed {seed}")
        time.sleep(generator.uniform(0, 0.1))
    facts = {"run": name, "seed": seed, "time": time.time(), "ranks": victims, "in_save": is_saving(run)}
    for rank in victims:
        ranks.processes[rank].kill()
    survivors = {0, 1} - set(victims)
    assert [ranks.result(rank) for rank in survivors] == [PeerLostError.exit_code] * len(survivors)
    ranks.kill()
    codes = {ranks.processes[rank].exitcode for rank in victims}
    assert codes == {-9}, f"seed {seed}: ended before it was killed"
    facts |= {"step": last_step(run), "resumes_from": newest_step(run)}
    if path := os.environ.get("KILL_LEDGER"):
        with Path(path).open("a") as file:
            file.write(json.dumps(facts) + "\n")


def check(workspace: Path, name: str, options: tuple[str, ...], undisturbed: Path) -> None:
    """Finish the run; it is the undisturbed one."""
    assert train(workspace, name, WORLD_SIZE, *options) == [0, 0]
    assert_same_run(undisturbed, workspace / name)
    assert audit(workspace, name, *options) == 0


@pytest.mark.parametrize("asynchronous", [True, False])
def test_five_kills_in_a_run(workspace, undisturbed, asynchronous):
    options = (*OPTIONS, "deepspeed.config=zero1", f"checkpoint.asynchronous={asynchronous}")
    name = f"five-{asynchronous}"
    for index in range(5):
        start_and_kill(workspace, name, options, 3 * index, 3 * index + 2, seed=30 * asynchronous + index)
    check(workspace, name, options, undisturbed("zero1"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_runs_with_a_kill_each(workspace, undisturbed, seed):
    stage = STAGES[seed % 4]
    options = (*OPTIONS, f"deepspeed.config={stage}", f"checkpoint.asynchronous={seed % 3 > 0}")
    name = f"once-{seed}"
    start_and_kill(workspace, name, options, 0, NUM_STEPS - 3, seed)
    check(workspace, name, options, undisturbed(stage))
