"""The fine-tuning loop, one for every task: forward, backward, step; log, evaluate, keep the best weights.

The loss of a step is a sum over the global batch divided by its number of predictions, so gradients do not
depend on ranks and micro-batches. Losses and metrics are equal on all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from albert.distributed import World, gather_rows, max_over_ranks, sum_over_ranks
from albert.engine import WEIGHTS, Engine
from albert.errors import NonFiniteError
from albert.finetune.batching import BatchOrder, evaluation_batches
from albert.finetune.settings import FinetuneSettings
from albert.finetune.task_data import TaskData
from albert.finetune.task_model import loss_sum
from albert.monitoring import Monitor
from albert.optim.schedules import learning_rate
from albert.stopping import StopRequest

_DROPOUT_STREAM = 12
_MAX_NONFINITE_STEPS = 3


@dataclass
class Progress:
    """How far the run is, and the best evaluation so far."""

    step: int = 0
    best_step: int = 0
    best_score: float = -math.inf
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_rows: NDArray[np.float32] | None = None
    evaluations_since_best: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every evaluation, with `step`."""
    stopped_early: bool = False


@dataclass
class _Interval:
    """Sums since the last line of metrics."""

    loss: float = 0.0
    steps: int = 0
    units: int = 0
    tokens: int = 0
    began_at: float = field(default_factory=time.perf_counter)


class FineTuner:
    """Trains a model on one task and evaluates it."""

    def __init__(
        self,
        settings: FinetuneSettings,
        engine: Engine,
        world: World,
        *,
        train: TaskData,
        dev: TaskData | None,
        monitor: Monitor | None,
        stop: StopRequest,
    ) -> None:
        """Put the parts together.

        Args:
            settings: of the run.
            engine: model and optimizer.
            world: the ranks.
            train: what is learned.
            dev: what chooses the best weights; None takes the last ones.
            monitor: on the main rank, None on the others.
            stop: set by signals.
        """
        self.settings, self.engine, self.world = settings, engine, world
        self.train, self.dev, self.monitor, self.stop = train, dev, monitor, stop
        num_units = len(train.lengths)
        self.num_steps = settings.num_steps(num_units)
        self.evaluation_interval = settings.steps_per_evaluation(num_units)
        self.micro_batch_size, _ = settings.micro_batches(world.size)
        self.order = BatchOrder(num_units, settings.batch_size, settings.seed)
        self.schedule = settings.schedule_config(self.num_steps)
        self.progress = Progress()
        self._interval = _Interval()
        self._nonfinite_steps = 0

    def fit(self, on_best: Callable[[Progress], None]) -> bool:
        """Train to the last step, or until early stopping or a signal.

        Args:
            on_best: called on all ranks after every evaluation that is the best so far.

        Returns:
            False where a signal stopped the run.

        Raises:
            NonFiniteError: loss or gradients were not finite several times in a row.
        """
        progress = self.progress
        while progress.step < self.num_steps and not progress.stopped_early:
            if max_over_ranks(int(self.stop.is_set)):
                return False
            self.train_step()
            is_last = progress.step == self.num_steps
            if is_last or progress.step % self.settings.log_interval_steps == 0:
                self._log()
            if is_last or progress.step % self.evaluation_interval == 0:
                self._evaluate_and_compare(on_best)
        return True

    def train_step(self) -> float:
        """One optimizer step; returns the mean loss of the global batch."""
        step, lengths = self.progress.step, self.train.lengths
        count = float(self.train.loss_counts[self.order.global_batch(step)].sum())
        self._seed_dropout(step)
        total = torch.zeros(1, dtype=torch.float64)
        micro_batches = self.order.micro_batches(
            step, self.world.rank, self.world.size, self.micro_batch_size, lengths
        )
        for units in micro_batches:
            batch = self.train.batch(units).to(self.engine.device)
            loss = loss_sum(self.engine.model, self.engine.forward(batch.sequences), batch) / count
            self.engine.backward(loss)
            total += loss.detach().double().cpu()
        rate = learning_rate(self.schedule, self.settings.learning_rate, self.num_steps, step)
        result = self.engine.step(rate)
        loss_of_step = float(sum_over_ranks(total))
        self._check_finite(result.applied and math.isfinite(loss_of_step), loss_of_step)
        self.progress.step += 1
        interval = self._interval
        interval.loss += loss_of_step
        interval.steps += 1
        interval.units += self.settings.batch_size
        interval.tokens += int(lengths[self.order.global_batch(step)].sum())
        self._last_rate, self._last_norm = rate, result.grad_norm
        return loss_of_step

    def _seed_dropout(self, step: int) -> None:
        """Dropout is a function of (seed, step, rank), so that a repeated step is the same step."""
        words = [self.settings.seed, _DROPOUT_STREAM, step, self.world.rank]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))

    def _check_finite(self, is_finite: bool, loss: float) -> None:
        self._nonfinite_steps = 0 if is_finite else self._nonfinite_steps + 1
        if self._nonfinite_steps >= _MAX_NONFINITE_STEPS:
            raise NonFiniteError(
                f"loss ({loss}) or gradients were not finite {_MAX_NONFINITE_STEPS} times in a row at step "
                f"{self.progress.step + 1}; lower --learning-rate ({self.settings.learning_rate}) or use "
                "--precision fp32"
            )

    def _log(self) -> None:
        interval, self._interval = self._interval, _Interval()
        if self.monitor is None or not interval.steps:
            return
        seconds = time.perf_counter() - interval.began_at
        values = {
            "loss": interval.loss / interval.steps,
            "learning_rate": self._last_rate,
            "grad_norm": self._last_norm,
            "examples_per_s": interval.units / seconds,
            "tokens_per_s": interval.tokens / seconds,
        }
        self.monitor.record("train", self.progress.step, values)
        self.monitor.advance(self.progress.step)

    def _evaluate_and_compare(self, on_best: Callable[[Progress], None]) -> None:
        progress = self.progress
        if self.dev is None:
            if progress.step == self.num_steps:
                progress.best_step = progress.step
                on_best(progress)
            return
        rows = evaluate_rows(self.engine, self.dev, self.world, self.settings.eval_batch_size)
        metrics = self.dev.scores(rows)
        progress.history.append({"step": progress.step, **metrics})
        if self.monitor:
            self.monitor.record("eval", progress.step, metrics)
        score = metrics[self.settings.metric]
        if score > progress.best_score:
            progress.best_score, progress.best_step = score, progress.step
            progress.best_metrics, progress.best_rows = metrics, rows
            progress.evaluations_since_best = 0
            on_best(progress)
        else:
            progress.evaluations_since_best += 1
            patience = self.settings.early_stopping
            progress.stopped_early = patience is not None and progress.evaluations_since_best >= patience
        # The clock of the training throughput starts again behind the evaluation.
        self._interval.began_at = time.perf_counter()


def evaluate_rows(engine: Engine, data: TaskData, world: World, batch_size: int) -> NDArray[np.float32]:
    """Outputs of all units of a split, [units, row_width], in order and equal on all ranks. Collective."""
    batches = evaluation_batches(data.lengths, world.rank, world.size, batch_size)
    parts = []
    for units in batches:
        batch = data.batch(units).to(engine.device)
        parts.append(data.rows(engine.evaluate(batch.sequences), batch, units))
    mine = np.concatenate(parts)
    indices = torch.from_numpy(np.concatenate(batches))
    gathered = gather_rows(torch.from_numpy(mine).flatten()).view(-1, data.row_width)
    rows = np.empty((len(data.lengths), data.row_width), dtype=np.float32)
    rows[gather_rows(indices).flatten().numpy()] = gathered.numpy()
    return rows


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """Full fp32 weights on every rank. Collective."""
    return {name: tensor.clone() for part, name, tensor in engine.gather_state() if part == WEIGHTS}
