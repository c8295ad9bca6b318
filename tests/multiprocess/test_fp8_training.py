"""Training with emulated float8 products under ZeRO-1: near bf16, resumed bitwise, with the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from albert.errors import ConfigError
from albert.fp8 import fp8_product
from albert.pretrained import load_pretrained
from tests.runs import (
    NO_DROPOUT,
    assert_same_run,
    assert_same_state,
    final_state,
    losses,
    make_workspace,
    train,
)

pytestmark = pytest.mark.multiprocess

STEPS = 6
SETTINGS = (
    "train.precision=bf16",
    "deepspeed.config=zero1",
    "data.num_workers=0",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.intermediate_size=48",
    "model.initializer_range=0.1",
    "checkpoint.interval_steps=3",
    "eval.interval_steps=3",
    "optimizer.learning_rate=0.01",
)
FP8 = (*SETTINGS, "train.fp8=emulated")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fp8_product("emulated", torch.device("cpu"))  # imports torchao, which forked ranks then need not
    return make_workspace(tmp_path_factory.mktemp("fp8"), STEPS)


@pytest.fixture(scope="module")
def straight(workspace: Path) -> Path:
    assert train(workspace, "straight", 2, *FP8) == [0, 0]
    return workspace / "straight"


def test_resumes_bitwise_and_is_not_continued_in_bf16(
    workspace: Path, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(workspace, "halves", 2, *FP8, "train.stop_after_steps=3") == [75, 75]
    assert train(workspace, "halves", 2, *SETTINGS) == [ConfigError.exit_code] * 2
    assert "train.fp8: 'emulated' in the checkpoint, 'off' now" in capfd.readouterr().err
    assert train(workspace, "halves", 2, *FP8) == [0, 0]
    assert_same_run(straight, workspace / "halves")


def test_activation_checkpointing_changes_nothing(workspace: Path, straight: Path) -> None:
    assert train(workspace, "recomputed", 2, *FP8, "train.activation_checkpointing=true") == [0, 0]
    assert_same_state(straight, workspace / "recomputed")


def test_partitioned_weights_train_the_same(workspace: Path, straight: Path) -> None:
    """Under ZeRO-3, where backward needs weights that were given back after forward."""
    assert train(workspace, "partitioned", 2, *FP8, "deepspeed.config=zero3") == [0, 0]
    ours, theirs = losses(workspace / "partitioned"), losses(straight)
    assert ours.keys() == theirs.keys()
    for key, line in theirs.items():
        assert ours[key]["mlm_loss"] == pytest.approx(line["mlm_loss"], rel=3e-4), key


def test_files_are_those_of_bf16_and_losses_near(workspace: Path) -> None:
    runs = []
    for name, settings in (("bf16", SETTINGS), ("fp8", FP8)):
        assert train(workspace, name, 1, *settings, *NO_DROPOUT) == [0]
        runs.append(workspace / name)
    bf16, fp8 = runs
    states = [final_state(run) for run in runs]
    assert states[0].keys() == states[1].keys()
    assert {n: (x.shape, x.dtype) for n, x in states[0].items()} == {
        n: (x.shape, x.dtype) for n, x in states[1].items()
    }
    expected, actual = losses(bf16), losses(fp8)
    assert expected.keys() == actual.keys()
    ratios = {key: actual[key]["mlm_loss"] / line["mlm_loss"] for key, line in expected.items()}
    assert all(abs(ratio - 1) < 0.01 for ratio in ratios.values()), ratios
    assert len(set(ratios.values())) > 1

    (fields, weights, _), (fp8_fields, fp8_weights, _) = (load_pretrained(run / "model") for run in runs)
    assert fields == fp8_fields
    assert list(weights) == list(fp8_weights)
    assert {x.dtype for x in fp8_weights.values()} == {torch.float32}


def test_a_cpu_without_float8_ends_with_one_line(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(workspace, "on", 1, *SETTINGS, "train.fp8=on") == [ConfigError.exit_code]
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        "error: train.fp8 (on): a CPU does not compute in float8; use a GPU of compute capability 8.9 or later, "
        "train.fp8=off, or train.fp8=emulated to try it out, slowly"
    ]
    assert not any("Traceback" in line for line in lines)
