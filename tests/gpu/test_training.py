"""A whole pretraining on a GPU: in 16 bits, compiled, resumed, and with the losses of a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny_task
from tests.runs import NO_DROPOUT, losses, make_workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parents[2]
NUM_STEPS = 6


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("gpu"), NUM_STEPS)


def pretrain(workspace: Path, name: str, *overrides: str, local_rank: str = "0") -> tuple[int, str]:
    """Exit code and messages of one rank."""
    settings = [
        "--config",
        str(workspace / "config.yaml"),
        f"train.output_dir={workspace / name}",
        *NO_DROPOUT,
    ]
    ended = subprocess.run(  # noqa: PLW1510 - the code is the result
        [sys.executable, "-m", "albert.pretrain", *settings, *overrides],
        cwd=ROOT,
        env={**os.environ, "LOCAL_RANK": local_rank},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return ended.returncode, ended.stderr


def mlm_losses(run: Path) -> list[float]:
    return [line["mlm_loss"] for (kind, _), line in losses(run).items() if kind == "train"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("placement", ["zero1", "zero3"])
def test_losses_are_those_of_a_cpu_also_when_resumed(workspace, precision, placement):
    expected = workspace / "cpu"
    if not expected.exists():
        assert pretrain(workspace, "cpu", "train.device=cpu")[0] == 0
    name, chosen = (
        f"{precision}-{placement}",
        (f"train.precision={precision}", f"deepspeed.config={placement}"),
    )
    code, errors = pretrain(workspace, name, "train.device=cuda", "train.stop_after_steps=3", *chosen)
    assert code == 75, errors
    code, errors = pretrain(workspace, name, "train.device=cuda", *chosen)
    assert code == 0, errors
    rtol = 1e-3 if precision == "fp32" else 2e-2
    assert len(mlm_losses(workspace / name)) == NUM_STEPS
    assert mlm_losses(workspace / name) == pytest.approx(mlm_losses(expected), rel=rtol)


def test_a_rank_that_sees_one_gpu_uses_it_whatever_its_place_on_the_node(workspace, monkeypatch):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code, errors = pretrain(workspace, "place", "train.device=cuda", "train.precision=bf16", local_rank="3")
    assert code == 0, errors


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_fine_tuning_computes_where_it_is_told_to(tmp_path, device):
    task, model = tiny_task.write_task(tmp_path / "task"), tiny_task.write_model(tmp_path / "model")
    words = [
        "--task",
        "lcqmc",
        "--data-dir",
        task,
        "--model",
        model,
        "--output",
        tmp_path / "run",
        "--device",
        device,
    ]
    ended = subprocess.run(  # noqa: PLW1510 - the code is the result
        [sys.executable, "-m", "albert.finetune", *map(str, words), "--do-train", "--do-eval", "--max-steps", "4",
         "--max-seq-length", "32", "--device", device],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
