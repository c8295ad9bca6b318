"""What the ranks send to sum their gradients: once per step, in the precision that the placement names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from albert.config import DataConfig, OptimizerConfig
from albert.deepspeed_config import complete_placement, read_placement
from albert.distributed import close_world, init_world
from albert.engine import Engine
from albert.heads import AlbertForPreTraining
from albert.loader import BatchPlan, TrainLoader
from albert.manifest import read_manifest
from albert.model_config import ModelConfig
from albert.step_log import count_batch
from tests.ranks import run_ranks
from tests.synthetic import TINY_MODEL, make_dataset

pytestmark = pytest.mark.multiprocess
ACCUMULATION, MICRO_BATCH = 3, 4


def _record_all_reduces(sent: list[tuple[torch.dtype, int]]) -> None:
    original = torch.distributed.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sent.append((tensor.dtype, tensor.numel()))
        return original(tensor, *args, **kwargs)

    torch.distributed.all_reduce = all_reduce


def _one_step(dataset: Path, placement: str):
    """All-reduces of more than a few numbers, and the averages that the optimizer keeps of the first gradient."""
    world = init_world("cpu", timeout_s=60)
    complete = complete_placement(
        read_placement(placement), precision="bf16", micro_batch_size=MICRO_BATCH,
        accumulation_steps=ACCUMULATION, world_size=world.size, max_grad_norm=0.0,
    )  # fmt: skip
    model = AlbertForPreTraining(ModelConfig(**TINY_MODEL), seed=3)
    engine = Engine(model, OptimizerConfig(learning_rate=0.01, max_grad_norm=0.0), complete, world)
    plan = BatchPlan(MICRO_BATCH * ACCUMULATION * world.size, MICRO_BATCH, world.rank, world.size, 1)
    config = DataConfig(directory=str(dataset), num_workers=0)
    (micro_batches,) = TrainLoader(config, read_manifest(dataset), plan, seed=7).steps(0, 0)
    counts = count_batch(micro_batches, stop_requested=False)
    sent: list[tuple[torch.dtype, int]] = []
    _record_all_reduces(sent)
    for batch in micro_batches:
        output = engine.forward(batch)
        engine.backward(output.mlm_loss_sum / counts.preds + output.sop_loss_sum / counts.orders)
    assert engine.step(0.01).applied
    sums = [each for each in sent if each[1] > 100]  # gathering the state, below, sends more
    averages = [x.flatten().clone() for part, _, x in engine.gather_state() if part == "exp_avg"]
    close_world()
    return sums, torch.cat(averages).numpy()


def test_gradients_are_summed_over_the_ranks_once_per_step_in_fp32_or_bf16(tmp_path):
    make_dataset(tmp_path / "shards")
    (in_fp32, exact), _ = run_ranks(2, _one_step, tmp_path / "shards", "zero1")
    (in_bf16, rounded), _ = run_ranks(2, _one_step, tmp_path / "shards", "zero1_bf16_reduction")
    num_values = len(exact)
    assert [dtype for dtype, _ in in_fp32] == [torch.float32]
    assert [dtype for dtype, _ in in_bf16] == [torch.bfloat16]
    assert num_values <= in_fp32[0][1] == in_bf16[0][1] <= num_values + 8
    difference = torch.from_numpy(rounded - exact).norm() / torch.from_numpy(exact).norm()
    # Rounded once before and once after the sum of two, to 8 bits; accumulating in bf16 too would round more often.
    assert 2**-11 < float(difference) < 2**-8
