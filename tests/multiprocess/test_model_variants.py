"""Layouts, LayerNorm orders and sharing in real training: stopped, resumed, verified, exported, 2 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from albert import checkpoint, pretrain
from albert.convert.cli import run
from albert.errors import DataError, run_command
from albert.pretrained import load_pretrained
from tests.ranks import Ranks
from tests.synthetic import TINY_MODEL, make_dataset

pytestmark = pytest.mark.multiprocess

VARIANTS = {
    "google-preln-none": ("zero3", {"ln_type": "preln", "final_ln": True, "share_type": "none"}),
    "brightmart-preln-attention": (
        "zero2",
        {"layout": "brightmart", "ln_type": "preln", "share_type": "attention"},
    ),
}
"""Every other combination trains on bitwise from its file in tests/unit/test_pretrained.py."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("variants") / "shards"
    make_dataset(directory)
    return directory


def _pretrain(config: str, overrides: list[str]) -> int:
    import sys

    sys.argv = ["pretrain", "--config", config, *overrides]
    return run_command(pretrain._main)


def write_config(path: Path, shards: Path, placement: str, model: dict[str, object]) -> None:
    config = {
        "model": {**TINY_MODEL, **model},
        "data": {"directory": str(shards), "num_workers": 0},
        "train": {
            "output_dir": "?",
            "num_steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "peer_timeout_s": 60,
        },
        "optimizer": {"name": "lamb", "learning_rate": 0.02},
        "deepspeed": {"config": placement},
        "checkpoint": {"interval_steps": 2, "keep_last": 2},
        "log": {"interval_steps": 1, "tensorboard": False, "progress": "off"},
    }
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_resumes_bitwise_and_leaves_again(variant: str, shards: Path, tmp_path: Path) -> None:
    placement, model = VARIANTS[variant]
    config = tmp_path / "config.yaml"
    write_config(config, shards, placement, model)

    def train(name: str, *overrides: str) -> list[int]:
        arguments = [f"train.output_dir={tmp_path / name}", *overrides]
        return Ranks(2, _pretrain, str(config), arguments).results()

    assert train("straight") == [0, 0]
    assert train("halves", "train.stop_after_steps=2") == [75, 75]
    assert train("halves") == [0, 0]
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    fields, weights, tokenizer = load_pretrained(straight)
    again_fields, again, _ = load_pretrained(halves)
    assert fields == again_fields
    assert weights.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    assert tokenizer is not None
    assert tokenizer.name == "vocab.txt"

    _, exported, _ = load_pretrained(straight / "model")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in weights.items())
    earlier, _, _ = load_pretrained(checkpoint.step_directory(straight / "checkpoints", 2))
    assert earlier == fields


def test_verify_checkpoint_reads_every_byte(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    write_config(config, shards, "zero1", {})
    arguments = [f"train.output_dir={tmp_path / 'run'}"]
    assert Ranks(2, _pretrain, str(config), arguments).results() == [0, 0]
    capsys.readouterr()
    run(["verify-checkpoint", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in lines] == ["step-00000002", "step-00000004"]
    assert all(line.endswith("bytes, all as written") for line in lines)
    run(["inspect", str(tmp_path / "run")])
    assert "step-00000004" in capsys.readouterr().out

    weights = max((tmp_path / "run/checkpoints/step-00000004").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match=weights.name):
        run(["verify-checkpoint", str(tmp_path / "run")])
    with pytest.raises(DataError, match=weights.name):
        load_pretrained(tmp_path / "run")
