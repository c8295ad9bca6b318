"""Checkpoints with known content: every tensor is a function of the step."""

from __future__ import annotations

from pathlib import Path

import torch

from albert import checkpoint

SHAPES = {
    "a.weight": torch.Size([40, 30]),
    "a.bias": torch.Size([40]),
    "b": torch.Size([7, 3]),
    "c": torch.Size([1]),
}


def make_state(step: int) -> checkpoint.TrainingState:
    return checkpoint.TrainingState(
        step=step,
        position=step * 8,
        optimizer_steps=step,
        loss_scaler={"cur_scale": 2.0**16},
        run_config={"seed": 1},
        dataset_sha256="d",
        tokenizer_sha256="t",
        world_size=1,
    )


def make_tensors(step: int) -> list[tuple[str, str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [
        (part, name, torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
        for part in ("weights", "exp_avg", "exp_avg_sq")
    ]


def assert_holds(directory: Path, step: int) -> None:
    state, parts = checkpoint.read_checkpoint(checkpoint.step_directory(directory, step))
    assert state == make_state(step)
    for part, name, tensor in make_tensors(step):
        assert torch.equal(parts[part][name], tensor)
    assert sum(len(names) for names in parts.values()) == 3 * len(SHAPES)
