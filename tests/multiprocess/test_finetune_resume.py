"""A fine-tuning that is killed or stopped goes on bitwise; what is finished is not done again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from albert.errors import run_command
from albert.finetune import cli
from albert.pretrained import load_pretrained
from albert.run_lock import LOCK_NAME
from tests.ranks import Ranks
from tests.tiny_task import MODEL, write_model, write_task

pytestmark = pytest.mark.multiprocess
_NUM_STEPS = 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("resume")
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return write_task(directory / "data", num_train=300, num_dev=40), write_model(
        directory / "model", MODEL.model_copy(update=dropout)
    )


def _command(arguments: list[str]) -> int:
    sys.argv = ["finetune", *arguments]
    return run_command(cli._main)


def _start(inputs, output: Path, *options: str, ranks: int = 1) -> Ranks:
    data, model = inputs
    arguments = [
        "--task=lcqmc", f"--data-dir={data}", f"--model={model}", f"--output={output}", "--do-train", "--do-eval",
        "--do-test", f"--max-steps={_NUM_STEPS}", "--batch-size=20", "--learning-rate=5e-3", "--progress=off",
        "--log-interval-steps=1", "--eval-interval-steps=10", "--checkpoint-interval-steps=7", "--no-tensorboard",
    ]  # fmt: skip
    return Ranks(ranks, _command, [*arguments, *options])


def _wait_for_step(ranks: Ranks, output: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    path = output / "metrics.jsonl"
    while not (path.is_file() and f'"train", "step": {step},' in path.read_text()):
        assert time.monotonic() < deadline, f"step {step} was not reached"
        assert any(process.is_alive() for process in ranks.processes), "the run ended before"
        time.sleep(0.002)


def _signal(ranks: Ranks, number: signal.Signals) -> None:
    for process in ranks.processes:
        os.kill(process.pid, number)


def _outcome(output: Path) -> dict:
    results = json.loads((output / "results.json").read_bytes())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    del results["training"]["seconds"]
    return {
        "results": results,
        "losses": [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"],
        "predictions": (output / "predictions-test.jsonl").read_bytes(),
    }


def _assert_same(left: Path, right: Path) -> None:
    assert _outcome(left) == _outcome(right)
    ours, theirs = load_pretrained(left / "model")[1], load_pretrained(right / "model")[1]
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert _start(inputs, output, ranks=2).results() == [0, 0]
    assert not (output / "checkpoints").exists()
    history = json.loads((output / "results.json").read_bytes())["training"]["history"]
    assert history[-1]["accuracy"] > history[0]["accuracy"] + 0.2
    return output


def test_a_killed_fine_tuning_goes_on_bitwise(inputs, whole, tmp_path):
    ranks = _start(inputs, tmp_path, ranks=2)
    _wait_for_step(ranks, tmp_path, 38)
    _signal(ranks, signal.SIGKILL)
    ranks.kill()
    assert not (tmp_path / "results.json").exists()
    assert list((tmp_path / "checkpoints").iterdir())
    assert _start(inputs, tmp_path, ranks=2).results() == [0, 0]
    _assert_same(whole, tmp_path)


def test_a_signal_commits_and_the_same_command_goes_on_bitwise(inputs, whole, tmp_path):
    ranks = _start(inputs, tmp_path, "--checkpoint-interval-steps=0", ranks=2)
    _wait_for_step(ranks, tmp_path, 9)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.results() == [75, 75]
    (committed,) = (path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert load_pretrained(committed)[1].keys() == load_pretrained(whole / "model")[1].keys()
    assert _start(inputs, tmp_path, "--learning-rate=6e-3", ranks=1).results() == [78]
    assert _start(inputs, tmp_path, ranks=2).results() == [0, 0]
    _assert_same(whole, tmp_path)


def test_two_jobs_do_not_share_a_directory(inputs, tmp_path, capfd):
    ranks = _start(inputs, tmp_path, "--max-steps=100000")
    _wait_for_step(ranks, tmp_path, 3)
    assert _start(inputs, tmp_path, "--max-steps=100000", ranks=2).results() == [78, 78]
    assert "which still runs; wait for it, stop it, or choose another --output" in capfd.readouterr().err
    ranks.processes[0].kill()


def test_a_lost_rank_ends_the_others_with_its_own_code(inputs, tmp_path):
    ranks = _start(inputs, tmp_path, "--max-steps=100000", ranks=2)
    _wait_for_step(ranks, tmp_path, 3)
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    assert ranks._pipes[0].poll(60)
    assert ranks._pipes[0].recv() == (True, 76)
    ranks.kill()


def test_a_finished_training_is_not_done_again(inputs, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    predictions = (whole / "predictions-test.jsonl").read_bytes()
    (whole / "predictions-test.jsonl").unlink()
    assert _start(inputs, whole, "--hang-timeout-s=20", "--peer-timeout-s=300", ranks=2).results() == [0, 0]
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert (whole / "predictions-test.jsonl").read_bytes() == predictions


def _files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """All that a run leaves; its lock file names whoever came last."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file() and path.name != LOCK_NAME
    }


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        ("--learning-rate=6e-3", "learning_rate: 0.005 there, 0.006 now"),
        ("--max-steps=61", "max_steps: 60 there, 61 now"),
    ],
)
def test_another_training_does_not_replace_a_finished_one(inputs, whole, capfd, option, difference):
    before = _files(whole)
    assert _start(inputs, whole, option, ranks=2).results() == [78, 78]
    assert _files(whole) == before
    assert (
        f"error: {whole / 'results.json'}: this training differs from the one that was finished here; {difference}. "
        f"Undo it, choose another --output, or remove {whole} to train from the beginning\n"
    ) in capfd.readouterr().err


def test_other_data_and_weights_do_not_replace_a_finished_training(inputs, whole, tmp_path, capfd):
    other = (
        write_task(tmp_path / "data", num_train=300, num_dev=40, seed=1),
        write_model(tmp_path / "model", MODEL, seed=1),
    )
    before = _files(whole)
    assert _start(other, whole).results() == [78]
    assert _files(whole) == before
    message = capfd.readouterr().err
    assert "finished here; weights_sha256: '" in message
    assert "data: has changed. Undo it" in message


def test_a_finished_run_is_evaluated_whatever_the_settings(inputs, whole):
    data, _ = inputs
    training = json.loads((whole / "results.json").read_bytes())["training"]
    model = _files(whole / "model")
    arguments = [
        "--task=lcqmc", f"--data-dir={data}", f"--model={whole}", f"--output={whole}", "--do-eval", "--do-test",
        "--batch-size=10", "--learning-rate=1e-2", "--progress=off",
    ]  # fmt: skip
    assert Ranks(1, _command, arguments).results() == [0]
    assert json.loads((whole / "results.json").read_bytes())["training"] == training
    assert _files(whole / "model") == model


def test_a_sweep_goes_on_with_the_run_that_was_stopped(inputs, tmp_path):
    sweep = ("--seeds=3",)
    first, second = tmp_path / "lr-0.005" / "seed-0", tmp_path / "lr-0.005" / "seed-1"
    ranks = _start(inputs, tmp_path, *sweep)
    _wait_for_step(ranks, second, 3)
    _signal(ranks, signal.SIGTERM)
    assert ranks.results() == [75]
    untouched = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert _start(inputs, tmp_path, *sweep).results() == [0]
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == untouched
    assert len(json.loads((tmp_path / "sweep.json").read_bytes())["runs"]) == 3
    assert '"resumed"' in (second / "metrics.jsonl").read_text()
    before = _files(tmp_path)
    more = ("--learning-rates", "1e-3", "5e-3", "--batch-size=10")
    assert _start(inputs, tmp_path, *sweep, *more).results() == [78]
    assert _files(tmp_path) == before
