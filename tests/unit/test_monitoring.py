"""Metrics reach JSON lines and TensorBoard, and a resume leaves no step twice."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from albert.config import LogConfig
from albert.monitoring import Monitor, measure_matmul_flops_per_s, read_metrics


def record_steps(directory: Path, first: int, last: int, factor: float) -> None:
    with Monitor(directory, LogConfig(progress="off"), first_step=first, num_steps=10) as monitor:
        for step in range(first + 1, last + 1):
            monitor.record("train", step, {"mlm_loss": step * factor, "learning_rate": 0.1})
            monitor.advance(step)
        monitor.event(last, "checkpoint committed: somewhere")


def test_resumed_steps_replace_those_that_were_lost(tmp_path):
    record_steps(tmp_path, 0, 7, factor=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # torn by a crash
    record_steps(tmp_path, 4, 9, factor=2.0)
    lines = read_metrics(tmp_path, "train")
    assert [(line["step"], line["mlm_loss"]) for line in lines] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 10.0), (6, 12.0), (7, 14.0), (8, 16.0), (9, 18.0),
    ]  # fmt: skip
    assert [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][
        -1
    ] == "event"
    assert len(read_metrics(tmp_path, "event")) == 1


def test_tensorboard_files_hold_the_same_numbers(tmp_path):
    record_steps(tmp_path, 0, 6, factor=1.0)
    record_steps(tmp_path, 4, 8, factor=3.0)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    scalars = accumulator.Scalars("train/mlm_loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 15.0), (6, 18.0), (7, 21.0), (8, 24.0),
    ]  # fmt: skip


def test_lines_are_printed_where_there_is_no_terminal(tmp_path, capsys):
    with Monitor(tmp_path, LogConfig(tensorboard=False), first_step=0, num_steps=10) as monitor:
        monitor.record(
            "train", 1, {"mlm_loss": 1.5, "learning_rate": 0.001, "tokens_per_s": 12345.6, "epoch": 3.0}
        )
        monitor.record("eval", 1, {"mlm_loss": 1.25, "mlm_accuracy": 0.5})
    shown = capsys.readouterr().err
    assert "train step 1/10  mlm_loss 1.5000  learning_rate 1.00e-03  tokens_per_s 12,346\n" in shown
    assert "eval  step 1/10  mlm_loss 1.2500  mlm_accuracy 0.5000\n" in shown
    assert not (tmp_path / "tensorboard").exists()


def test_matmul_rate_is_that_of_this_machine():
    """Between a very slow core and the fastest CPU there is."""
    assert 1e8 < measure_matmul_flops_per_s(torch.device("cpu"), torch.float32) < 1e14
