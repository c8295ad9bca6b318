"""A rank of a fine-tuning that hangs is named with what it was doing, and the run ends with exit code 76 in time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import albert.finetune.loop
import albert.finetune.run
from albert.errors import end_rank, run_command
from albert.finetune import cli
from albert.finetune.text_data import TextData
from tests.hangs import (
    FAULTY_STEP,
    HANG_TIMEOUT_S,
    assert_a_stopped_rank_is_named,
    assert_rank_1_is_named_with_its_phase,
    exit_code,
    wait_for_ever,
)
from tests.ranks import Ranks
from tests.tiny_task import write_model, write_task

pytestmark = pytest.mark.multiprocess
_SETTING = "--hang-timeout-s"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("finetune-hangs")
    return write_task(directory / "data", num_train=100, num_dev=20), write_model(directory / "model")


def _at_the_faulty_step(function: Callable) -> Callable:
    """Rank 1 gets no further in the call that belongs to that step."""
    calls = []

    def changed(*arguments):
        calls.append(1)
        if len(calls) == FAULTY_STEP + 1 and os.environ["RANK"] == "1":
            wait_for_ever()
        return function(*arguments)

    return changed


def no_fault() -> None:
    """All is well until somebody stops a rank."""


def stuck_data() -> None:
    TextData.batch = _at_the_faulty_step(TextData.batch)


def missing_collective() -> None:
    tuner = albert.finetune.loop.FineTuner
    original = albert.finetune.loop.sum_over_ranks
    is_stopped = _at_the_faulty_step(lambda: None)

    def agree(self) -> bool:
        def sum_over_ranks(flags):
            is_stopped()
            return original(flags)

        albert.finetune.loop.sum_over_ranks = sum_over_ranks
        try:
            return agree_to_stop(self)
        finally:
            albert.finetune.loop.sum_over_ranks = original

    agree_to_stop, tuner._agree_to_stop = tuner._agree_to_stop, agree


def slow_predictions() -> None:
    """Rank 0 writes for longer than a step may hang, while the others have nothing more to do."""
    original = albert.finetune.run.write_predictions

    def write_predictions(*arguments):
        time.sleep(3 * HANG_TIMEOUT_S)
        return original(*arguments)

    albert.finetune.run.write_predictions = write_predictions


def _faulty_finetune(fault: Callable[[], None], arguments: list[str]) -> None:
    fault()
    sys.argv = ["finetune", *arguments]
    end_rank(run_command(cli._main))


def _start(inputs, output: Path, fault: Callable[[], None], *options: str) -> Ranks:
    data, model = inputs
    arguments = [
        "--task=lcqmc", f"--data-dir={data}", f"--model={model}", f"--output={output}", "--do-train", "--do-eval",
        "--max-steps=100000", "--batch-size=20", "--progress=off", "--log-interval-steps=1", "--no-tensorboard",
        "--eval-interval-steps=50000", f"--hang-timeout-s={HANG_TIMEOUT_S}",
    ]  # fmt: skip
    return Ranks(2, _faulty_finetune, fault, [*arguments, *options])


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named(inputs, tmp_path, capfd, stopped):
    ranks = _start(inputs, tmp_path, no_fault)
    assert_a_stopped_rank_is_named(ranks, tmp_path, stopped, _SETTING, lambda: capfd.readouterr().err)


@pytest.mark.parametrize(("fault", "phase"), [(stuck_data, "data"), (missing_collective, "count")])
def test_a_rank_that_does_not_get_on_is_named_with_its_phase(inputs, tmp_path, capfd, fault, phase):
    ranks = _start(inputs, tmp_path, fault)
    assert_rank_1_is_named_with_its_phase(ranks, tmp_path, phase, _SETTING, lambda: capfd.readouterr().err)


def test_ranks_wait_for_one_that_writes_slowly(inputs, tmp_path):
    ranks = _start(inputs, tmp_path, slow_predictions, "--max-steps=12")
    assert [exit_code(ranks, rank) for rank in (0, 1)] == [0, 0]
    assert (tmp_path / "predictions-dev.jsonl").is_file()
