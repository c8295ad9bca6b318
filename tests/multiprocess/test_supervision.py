"""`launcher local --restarts`: a lost or stopped rank, the next start on fewer ranks, the same losses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from albert.errors import ConfigError
from launcher.supervisor import delay_s, fewer_ranks_chooser
from tests import runs

pytestmark = pytest.mark.multiprocess
QUICK = (*runs.NO_DROPOUT, "checkpoint.interval_steps=20", "eval.interval_steps=0")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_workspace(tmp_path_factory.mktemp("supervision"), num_steps=120)


def supervise(workspace: Path, name: str, launcher: list[str], *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "launcher", "local", "-n", "2", *launcher, "pretrain",
        "--config", str(workspace / "config.yaml"), f"train.output_dir={workspace / name}", "data.num_workers=0",
        *QUICK, *overrides,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rank_pid(run: Path, rank: int) -> int:
    """The process of a rank of the run, found by its command line and environment."""
    wanted = {b"albert.pretrain", f"train.output_dir={run}".encode(), f"RANK={rank}".encode()}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
            if entry.name.isdigit() and wanted <= set(words.split(b"\0")):
                return int(entry.name)
    raise AssertionError(f"rank {rank} does not run")


def test_a_stopped_rank_is_shown_and_replaced_by_a_start_on_fewer_ranks(workspace):
    run = workspace / "stopped"
    options = ["--restarts", "2", "--min-ranks", "1"]
    launched = supervise(workspace, run.name, options, "train.hang_timeout_s=2", "log.ledger=true")
    runs.wait_until(lambda: runs.last_step(run) >= 1, "step 1")
    stopped = rank_pid(run, 1)
    runs.wait_until(lambda: runs.last_step(run) >= 20, "step 20")
    os.kill(stopped, signal.SIGSTOP)
    output, _ = launched.communicate(timeout=200)
    assert launched.returncode == 0, output
    assert re.search(r"rank 1 on \S+ is silent since \w+ of step \d+", output), output
    assert output.count("launcher: restart 1 of 2, on 1 ranks in 1 s") == 1
    # The stopped rank, woken for it, printed where it was.
    assert re.search(r"\[rank 1\] .*most recent call first", output)
    assert runs.last_step(run) == 120
    assert runs.train(workspace, "whole", 2, *QUICK) == [0, 0]
    ours, theirs = runs.losses(run), runs.losses(workspace / "whole")
    for key, values in theirs.items():
        assert ours[key]["mlm_loss"] == pytest.approx(values["mlm_loss"], rel=1e-3), key


def test_restarts_wait_longer_while_no_checkpoint_comes():
    def history(*steps: int) -> list[dict[str, int]]:
        return [{"step": step} for step in steps]

    assert [delay_s(history(*steps)) for steps in [(5,), (5, 5), (5, 5, 5), (5, 5, 10), [7] * 9]] == [
        1,
        2,
        4,
        1,
        60,
    ]


def test_fewer_ranks_are_those_that_the_batch_allows():
    def check(num_ranks: int) -> None:
        if 12 % num_ranks:
            raise ConfigError("does not divide")

    choose = fewer_ranks_chooser(check, min_ranks=3)
    assert [choose(num_ranks) for num_ranks in (12, 6, 5, 4, 3)] == [6, 4, 4, 3, 3]


def test_min_ranks_needs_restarts_of_a_pretraining():
    command = [sys.executable, "-m", "launcher", "local", "--min-ranks", "1", "data", "build"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 78
    assert "--min-ranks (1) is for 'pretrain' with --restarts only" in ended.stderr
