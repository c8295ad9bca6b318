"""The pretraining loop: fetch, count, forward, backward, step; log, evaluate, save and stop when due."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from albert.batches import PretrainBatch
from albert.config import RunConfig
from albert.distributed import World, sum_over_ranks
from albert.engine import Engine
from albert.errors import NonFiniteError
from albert.evaluation import Evaluator
from albert.flops import step_flops
from albert.loader import TrainLoader
from albert.monitoring import Monitor, measure_matmul_flops_per_s
from albert.optim.schedules import learning_rate
from albert.probes import Probes
from albert.run_checkpoints import RunCheckpoints
from albert.shards import NO_SENTENCE_ORDER
from albert.stopping import StopRequest

_DROPOUT_STREAM = 2
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    micro_batches: list[PretrainBatch], *, stop_requested: bool = False, save_written: bool = False
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
class _Interval:
    """What has been summed up since the last line of metrics."""

    began_at: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    num_steps: int = 0
    losses: list[Tensor] = field(default_factory=list)


class Trainer:
    """Runs a training from its current step to the last one."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        loader: TrainLoader,
        world: World,
        *,
        evaluator: Evaluator | None,
        monitor: Monitor | None,
        stop: StopRequest,
        checkpoints: RunCheckpoints,
    ) -> None:
        """Put the parts together.

        Args:
            config: of the run.
            engine: model and optimizer.
            loader: of this rank's micro-batches.
            world: the ranks.
            evaluator: None for no evaluation.
            monitor: on the main rank, None on the others.
            stop: set by signals.
            checkpoints: saves the run.
        """
        self.config, self.engine, self.loader, self.world = config, engine, loader, world
        self.evaluator, self.monitor, self.stop = evaluator, monitor, stop
        self.step, self.position = 0, 0
        self._matmul_flops_per_s = measure_matmul_flops_per_s(engine.device, _DTYPES[config.train.precision])
        self._checkpoints = checkpoints
        self._probes = Probes(config.probe, Path(config.train.output_dir), monitor)
        self._nonfinite_in_a_row = 0
        self._interval = _Interval()
        self._saved_step = -1
        model = config.model
        self._has_dropout = model.hidden_dropout_prob > 0 or model.attention_probs_dropout_prob > 0

    def fit(self) -> bool:
        """Train until the last step or until asked to stop; the checkpoint is committed in both cases.

        Returns:
            True when the run is finished, False when it was stopped before its last step.

        Raises:
            NonFiniteError: too many non-finite steps in a row.
        """
        train = self.config.train
        last_step = min(train.num_steps, train.stop_after_steps or train.num_steps)
        if self.step == 0:
            self._evaluate()
        self._interval = _Interval()
        should_stop = False
        steps_of_rank = self.loader.steps(self.step, self.position)
        with contextlib.closing(steps_of_rank) as steps, contextlib.closing(self._probes):
            while self.step < last_step and not should_stop:
                should_stop = self._fetch_and_train(steps)
        if self._saved_step != self.step:
            self._save()
        self._finish_save()
        return self.step == train.num_steps

    def _fetch_and_train(self, steps: Iterator[list[PretrainBatch]]) -> bool:
        """One step with all that is due after it; returns whether any rank was asked to stop."""
        began_at = time.perf_counter()
        micro_batches = next(steps)
        self._interval.waited_s += time.perf_counter() - began_at
        counts = self.train_step(micro_batches)
        if counts.saves_written == self.world.size:
            self._finish_save()
        if self._is_due(self.config.eval.interval_steps) or self.step == self.config.train.num_steps:
            self._evaluate()
        if self._is_due(self.config.checkpoint.interval_steps):
            self._save()
        return counts.stop_requests > 0

    def train_step(self, micro_batches: list[PretrainBatch]) -> BatchCounts:
        """One optimizer step; returns what the ranks counted and agreed on at its beginning."""
        train = self.config.train
        counts = count_batch(
            micro_batches, stop_requested=self.stop.is_set, save_written=self._checkpoints.is_written
        )
        is_logging = (self.step + 1) % self.config.log.interval_steps == 0 or self.step + 1 == train.num_steps
        rate = learning_rate(
            self.config.schedule, self.config.optimizer.learning_rate, train.num_steps, self.step
        )
        sums = torch.zeros(4, device=self.engine.device)
        for index, batch in enumerate(micro_batches):
            self._seed_dropout(index)
            output = self.engine.forward(batch.to(self.engine.device), with_accuracy=is_logging)
            loss = output.mlm_loss_sum / counts.preds + output.sop_loss_sum / max(counts.orders, 1.0)
            self.engine.backward(loss)
            values = [value.detach().float() for value in output if value is not None]
            sums[: len(values)] += torch.stack(values)
        result = self.engine.step(rate)
        self.step += 1
        self.position += train.global_batch_size
        self._check_finite(result.applied, result.grad_norm)
        self._add_to_interval(sums, counts)
        if is_logging:
            self._log(sums, counts, rate, result.grad_norm)
        if self.monitor:
            self.monitor.advance(self.step)
        return counts

    def _seed_dropout(self, micro_batch: int) -> None:
        """Dropout is a function of (seed, step, rank, micro-batch), so there is no generator state to save."""
        if self._has_dropout:
            key = [self.config.seed, _DROPOUT_STREAM, self.step, self.world.rank, micro_batch]
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

    def _check_finite(self, applied: bool, grad_norm: float) -> None:
        """Count steps whose update was dropped; all ranks see the same gradient norm and agree."""
        if applied:
            self._nonfinite_in_a_row = 0
            return
        self._nonfinite_in_a_row += 1
        limit = self.config.train.max_nonfinite_steps
        if self.monitor:
            self.monitor.event(
                self.step, f"update dropped: gradient norm {grad_norm}", first_position=self.position
            )
        # fp16 drops updates while it searches for a loss scale: that is no divergence until the scale is at its end.
        if self._nonfinite_in_a_row >= limit and self.engine.loss_scale <= 1.0:
            raise NonFiniteError(
                f"step {self.step}: loss or gradient was not finite {limit} times in a row; lower "
                "optimizer.learning_rate or go on from an earlier checkpoint"
            )

    def _add_to_interval(self, sums: Tensor, counts: BatchCounts) -> None:
        interval = self._interval
        interval.losses.append(
            sums[:2] / torch.tensor([counts.preds, max(counts.orders, 1.0)]).to(sums.device)
        )
        interval.tokens += counts.tokens
        interval.num_steps += 1
        interval.flops += step_flops(
            self.config.model,
            tokens=int(counts.tokens),
            sum_squared_lengths=int(counts.squared_lengths),
            sequences=int(counts.sequences),
            preds=int(counts.preds),
        )

    def _log(self, sums: Tensor, counts: BatchCounts, rate: float, grad_norm: float) -> None:
        """Losses are means over the interval, accuracies those of the last step."""
        interval = self._interval
        losses = torch.stack(interval.losses).mean(0)
        reduced = sum_over_ranks(torch.cat([losses, sums[2:]]).double().cpu())
        mlm_loss, sop_loss, mlm_correct, sop_correct = reduced.tolist()
        elapsed_s = time.perf_counter() - interval.began_at
        ceiling = self._matmul_flops_per_s * self.world.size * elapsed_s
        if self.monitor:
            remaining = self.config.train.num_steps - self.step
            values = {
                "loss": mlm_loss + sop_loss,
                "mlm_loss": mlm_loss,
                "sop_loss": sop_loss,
                "mlm_accuracy": mlm_correct / max(counts.preds, 1.0),
                "sop_accuracy": sop_correct / max(counts.orders, 1.0),
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "tokens_per_s": interval.tokens / elapsed_s,
                "mfu": interval.flops / ceiling,
                "data_wait_share": interval.waited_s / elapsed_s,
                "epoch": self.loader.order.epoch(self.position),
                "remaining_s": remaining * elapsed_s / interval.num_steps,
            }
            self.monitor.record("train", self.step, values)
            self._probes.poll()
        self._interval = _Interval()

    def _is_due(self, interval_steps: int) -> bool:
        return interval_steps > 0 and self.step % interval_steps == 0

    def _evaluate(self) -> None:
        if self.evaluator is None:
            return
        metrics = self.evaluator.evaluate(self.engine)
        if self.monitor:
            self.monitor.record("eval", self.step, metrics)

    def _save(self) -> None:
        self._finish_save()
        self._checkpoints.begin(self.step, self.position)
        self._saved_step = self.step
        if not self.config.checkpoint.asynchronous:
            self._finish_save()

    def _finish_save(self) -> None:
        path = self._checkpoints.finish()
        if path and self.monitor:
            self.monitor.event(self.step, f"checkpoint committed: {path}")
            self._probes.begin(self._saved_step, path)
