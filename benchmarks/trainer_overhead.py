"""The whole trainer against the bare step: what loader, DeepSpeed ZeRO-1, optimizer and logging cost.

    python -m benchmarks.trainer_overhead [--ranks 2] [--accumulation 4] [--steps 2] [--rounds 5]

Both run on the same ranks in turn, with the same model (hidden 384, 6 layers, 128 tokens) and micro-batches of 8. The
bare step is forward and backward of the model alone, on a batch that is already there. The figure is the ratio of
speeds. With --accumulation 1 every micro-batch is followed by a reduction and an update.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from albert.batches import PretrainBatch
from albert.config import RunConfig, load_run_config
from albert.deepspeed_config import build_deepspeed_config
from albert.distributed import World, barrier, close_world, init_world
from albert.engine import Engine
from albert.heads import AlbertForPreTraining
from albert.loader import BatchPlan, TrainLoader
from albert.manifest import Manifest
from albert.monitoring import Monitor
from albert.run_checkpoints import RunCheckpoints
from albert.stopping import StopRequest
from albert.trainer import Trainer
from albert.watchdog import Watchdog
from benchmarks.figure import print_figure
from benchmarks.loader import write_dataset
from benchmarks.small_run import SMALL_MODEL, run_overrides

_LENGTH, _MICRO_BATCH = 128, 8


def _config(directory: str, options: argparse.Namespace) -> RunConfig:
    overrides = run_overrides(
        Path(directory), "run", num_steps=(options.rounds + 1) * options.steps,
        global_batch_size=options.ranks * options.accumulation * _MICRO_BATCH, micro_batch_size=_MICRO_BATCH,
    )  # fmt: skip
    return load_run_config("base", [*overrides, *SMALL_MODEL, "train.precision=fp32"])


def _build_trainer(config: RunConfig, manifest: Manifest, world: World, watchdog: Watchdog) -> Trainer:
    train = config.train
    plan = BatchPlan(train.global_batch_size, train.micro_batch_size, world.rank, world.size, train.num_steps)
    model = AlbertForPreTraining(config.model)
    engine = Engine(model, config.optimizer, build_deepspeed_config(config, world.size), world)
    monitor = Monitor(Path(train.output_dir), config.log, 0, train.num_steps) if world.is_main else None
    return Trainer(
        config, engine, TrainLoader(config.data, manifest, plan, 0),
        evaluator=None, monitor=monitor, stop=StopRequest(),
        checkpoints=RunCheckpoints(config, manifest, engine, world), watchdog=watchdog,
    )  # fmt: skip


def _measure(
    rank: int, options: argparse.Namespace, directory: str, manifest: Manifest, port: int
) -> list[float]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": options.ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    world = init_world("cpu", timeout_s=600)
    config = _config(directory, options)
    Path(config.train.output_dir).mkdir(exist_ok=True)
    with Watchdog(world, hang_timeout_s=10.0, slow_timeout_s=600.0) as watchdog:
        trainer = _build_trainer(config, manifest, world, watchdog)
        steps = trainer.loader.steps(0, 0)
        batch = next(trainer.loader.steps(0, 0))[0]
        bare = AlbertForPreTraining(config.model)
        ratios = []
        for _ in range(options.rounds + 1):
            seconds: dict[str, float] = {}
            for name in ("whole", "bare"):
                barrier()
                begin = time.perf_counter()
                for _ in range(options.steps):
                    if name == "whole":
                        trainer.train_step(next(steps))
                    else:
                        _bare_step(bare, batch, options.accumulation)
                seconds[name] = time.perf_counter() - begin
            ratios.append(seconds["bare"] / seconds["whole"])
    close_world()
    return ratios[1:]


def _bare_step(model: AlbertForPreTraining, batch: PretrainBatch, accumulation: int) -> None:
    for _ in range(accumulation):
        output = model(batch)
        (output.mlm_loss_sum + output.sop_loss_sum).backward()
    model.zero_grad(set_to_none=True)


def _worker(results: Any, *arguments: Any) -> None:
    results.put((arguments[0], _measure(*arguments)))


def main() -> None:
    """Measure and print the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        num_examples = (
            (options.rounds + 2) * options.steps * options.ranks * options.accumulation * _MICRO_BATCH
        )
        manifest = write_dataset(Path(directory), num_examples, _LENGTH)
        results = context.Queue()
        arguments = [(results, rank, options, directory, manifest, port) for rank in range(options.ranks)]
        processes = [context.Process(target=_worker, args=each) for each in arguments]
        for process in processes:
            process.start()
        ratios = dict(results.get() for _ in processes)
        for process in processes:
            process.join()
    print_figure(
        "whole_trainer_over_bare_step", ratios[0], "x tokens/s", model="hidden 384, 6 layers", tokens=_LENGTH,
        micro_batch_size=_MICRO_BATCH, accumulation=options.accumulation, ranks=options.ranks, placement="zero1",
        precision="fp32",
    )  # fmt: skip


if __name__ == "__main__":
    main()
