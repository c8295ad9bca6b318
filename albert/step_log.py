"""What a training step counts and sums up: over the ranks, and until the next line of metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from albert.batches import PretrainBatch
from albert.blocks import NO_SENTENCE_ORDER
from albert.distributed import sum_over_ranks
from albert.flops import step_flops
from albert.model_config import ModelConfig


@dataclass(frozen=True)
class BatchCounts:
    """Sums over the global batch of a step."""

    preds: float
    orders: float
    tokens: float
    squared_lengths: float
    sequences: float
    stop_requests: float
    saves_written: float
    """Ranks that have written their part of the checkpoint that is under way."""


def count_batch(
    micro_batches: Sequence[PretrainBatch], *, stop_requested: bool = False, save_written: bool = False
) -> BatchCounts:
    """Count on the host and sum over the ranks; also how the ranks agree to stop and to commit. Collective."""
    local = torch.zeros(7, dtype=torch.float64)
    for batch in micro_batches:
        lengths = batch.sequences.lengths
        orders = int((batch.sentence_order_labels != NO_SENTENCE_ORDER).sum())
        squares = sum(length * length for length in lengths)
        preds = batch.masked_lm_labels.numel()
        local[:5] += torch.tensor([preds, orders, sum(lengths), squares, len(lengths)], dtype=torch.float64)
    local[5:] = torch.tensor([stop_requested, save_written])
    return BatchCounts(*sum_over_ranks(local).tolist())


@dataclass
class Interval:
    """What has been summed up since the last line of metrics."""

    began_at: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    num_steps: int = 0
    losses: list[Tensor] = field(default_factory=list)
    """[2] MLM and SOP loss of every step over the ranks, or this rank's share of it."""
    num_reduced: int = 0
    """So many of `losses` are sums over the ranks already."""

    def add(self, model: ModelConfig, sums: Tensor, counts: BatchCounts) -> None:
        """Add a step.

        Args:
            model: of the run.
            sums: [2 or more] this rank's MLM and SOP loss, summed over predictions; not waited for.
            counts: of the step.
        """
        self.losses.append(torch.stack([sums[0] / counts.preds, sums[1] / max(counts.orders, 1.0)]))
        self.tokens += counts.tokens
        self.num_steps += 1
        self.flops += step_flops(
            model,
            tokens=int(counts.tokens),
            sum_squared_lengths=int(counts.squared_lengths),
            sequences=int(counts.sequences),
            preds=int(counts.preds),
        )

    def reduce_losses(self) -> list[tuple[float, float]]:
        """MLM and SOP loss of the steps since the last call, over the ranks. Collective, waits for the device."""
        new = self.losses[self.num_reduced :]
        if not new:
            return []
        reduced = sum_over_ranks(torch.stack(new).double().cpu())
        self.losses[self.num_reduced :] = list(reduced)
        self.num_reduced = len(self.losses)
        return [(float(mlm), float(sop)) for mlm, sop in reduced]

    def mean_losses(self) -> tuple[float, float]:
        """Mean MLM and SOP loss over the interval, after `reduce_losses`."""
        mlm_loss, sop_loss = torch.stack(self.losses).mean(0).tolist()
        return mlm_loss, sop_loss
