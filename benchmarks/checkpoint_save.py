"""How long a save holds up the training: in the background against waiting for the disk, alternating.

python -m benchmarks.checkpoint_save [--preset base] [--rounds 5] [--directory DIR]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from albert import checkpoint
from albert.config import OptimizerConfig
from albert.deepspeed_config import complete_placement, read_placement
from albert.distributed import World, close_world, init_world
from albert.engine import Engine
from albert.heads import AlbertForPreTraining
from albert.model_config import MODEL_PRESETS
from benchmarks.figure import print_figure


def _build_engine(preset: str, world: World) -> Engine:
    placement = complete_placement(
        read_placement("zero1"),
        precision="fp32",
        micro_batch_size=1,
        accumulation_steps=1,
        world_size=1,
        max_grad_norm=1.0,
    )
    model = AlbertForPreTraining(MODEL_PRESETS[preset])
    return Engine(model, OptimizerConfig(learning_rate=1e-3), placement, world)


def _state(step: int) -> checkpoint.TrainingState:
    return checkpoint.TrainingState(
        step=step, position=0, optimizer_steps=0, loss_scaler={}, run_config={},
        dataset_sha256="", tokenizer_sha256="", world_size=1,
    )  # fmt: skip


def main() -> None:
    """Measure and print the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="base", choices=MODEL_PRESETS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="where to save; default a temporary directory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = init_world("cpu", timeout_s=600)
    engine = _build_engine(options.preset, world)
    shares, seconds = [], []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        for step in range(options.rounds):
            begin = time.perf_counter()
            save = checkpoint.Save(
                Path(name), _state(step), engine.gather_state(), engine.named_shapes(), world
            )
            snapshot_s = time.perf_counter() - begin
            while not save.is_written:
                time.sleep(0.01)
            begin_commit = time.perf_counter()
            save.commit({}, 1, 0)
            now = time.perf_counter()
            shares.append((snapshot_s + now - begin_commit) / (now - begin))
            seconds.append(now - begin)
    close_world()
    print_figure("save_stall_share", shares, "of a synchronous save", preset=options.preset)
    print_figure("synchronous_save", seconds, "s", preset=options.preset)


if __name__ == "__main__":
    main()
