"""The fine-tuning loop, one for every task: forward, backward, step; log, evaluate, keep the best weights.

The loss of a step is a sum over the global batch divided by its number of predictions, so gradients do not
depend on ranks and micro-batches. Losses and metrics are equal on all ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from albert.distributed import gather_rows, sum_over_ranks
from albert.engine import WEIGHTS, Engine
from albert.errors import NonFiniteError
from albert.finetune.batching import BatchOrder, evaluation_batches
from albert.finetune.features import LabelledBatch
from albert.finetune.progress import Progress
from albert.finetune.resume import TuningCheckpoints
from albert.finetune.settings import FinetuneSettings
from albert.finetune.task_data import TaskData
from albert.finetune.task_model import loss_sum
from albert.monitoring import Monitor
from albert.optim.schedules import learning_rate
from albert.stopping import StopRequest
from albert.watchdog import Watchdog

_DROPOUT_STREAM = 12
_MAX_NONFINITE_STEPS = 3


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
        *,
        train: TaskData,
        dev: TaskData | None,
        monitor: Monitor | None,
        stop: StopRequest,
        checkpoints: TuningCheckpoints,
        watchdog: Watchdog,
    ) -> None:
        """Put the parts together.

        Args:
            settings: of the run.
            engine: model and optimizer.
            train: what is learned.
            dev: what chooses the best weights; None takes the last ones.
            monitor: on the main rank, None on the others.
            stop: set by signals.
            checkpoints: saves the run.
            watchdog: is told what goes on.
        """
        self.settings, self.engine, self.world = settings, engine, engine.world
        self.train, self.dev, self.monitor, self.stop = train, dev, monitor, stop
        self.checkpoints, self.watchdog = checkpoints, watchdog
        num_units = len(train.lengths)
        self.num_steps = settings.num_steps(num_units)
        self.evaluation_interval = settings.steps_per_evaluation(num_units)
        self.checkpoint_interval = settings.steps_per_checkpoint(num_units)
        self.micro_batch_size, _ = settings.micro_batches(self.world.size)
        self.order = BatchOrder(num_units, settings.batch_size, settings.seed)
        self.schedule = settings.schedule_config(self.num_steps)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        """Best weights so far, on every rank."""
        self._saved_step = 0
        self._interval = _Interval()
        self._nonfinite_steps = 0

    def go_on_from(self, progress: Progress, best: dict[str, Tensor]) -> None:
        """Take over what a checkpoint knows besides the engine's state."""
        self.progress, self.best, self._saved_step = progress, best, progress.step

    def fit(self, on_best: Callable[[], None]) -> bool:
        """Train to the last step, or until early stopping or a signal, which leaves a committed checkpoint.

        Args:
            on_best: called on all ranks whenever there are new best weights.

        Returns:
            False where a signal stopped the run.

        Raises:
            NonFiniteError: loss or gradients were not finite several times in a row.
            DiskError: a checkpoint could not be written.
        """
        progress = self.progress
        while progress.step < self.num_steps and not progress.stopped_early:
            self.watchdog.enter("data", progress.step)
            micro_batches = self._fetch()
            if self._agree_to_stop():
                return False
            self.train_step(micro_batches)
            is_last = progress.step == self.num_steps
            if is_last or progress.step % self.settings.log_interval_steps == 0:
                self._log()
            if is_last or progress.step % self.evaluation_interval == 0:
                self._evaluate_and_compare(on_best)
            if self.checkpoint_interval and progress.step % self.checkpoint_interval == 0 and not is_last:
                self._save()
        return True

    def _agree_to_stop(self) -> bool:
        """Whether any rank got a signal; the state is committed then. Also commits what all ranks have written."""
        self.watchdog.enter("count", self.progress.step)
        flags = torch.tensor([self.stop.is_set, self.checkpoints.is_written], dtype=torch.int64)
        num_stopped, num_written = sum_over_ranks(flags).tolist()
        if num_stopped and self.progress.step and self._saved_step != self.progress.step:
            self._save()
        if num_stopped or num_written == self.world.size:
            self.watchdog.enter("commit", self.progress.step)
            self.checkpoints.finish()
        return num_stopped > 0

    def _save(self) -> None:
        self._saved_step = self.progress.step
        self.watchdog.enter("save", self.progress.step)
        self.checkpoints.begin(self.progress, self.best, self.progress.step * self.settings.batch_size)

    def _fetch(self) -> list[LabelledBatch]:
        """This rank's micro-batches of the next step."""
        batches = self.order.micro_batches(
            self.progress.step, self.world.rank, self.world.size, self.micro_batch_size, self.train.lengths
        )
        return [self.train.batch(units) for units in batches]

    def train_step(self, micro_batches: Sequence[LabelledBatch]) -> float:
        """One optimizer step; returns the mean loss of the global batch."""
        step = self.progress.step
        self.watchdog.enter("forward_backward", step)
        count = float(self.train.loss_counts[self.order.global_batch(step)].sum())
        self._seed_dropout(step)
        total = torch.zeros(1, dtype=torch.float64)
        for micro_batch in micro_batches:
            batch = micro_batch.to(self.engine.device)
            loss = loss_sum(self.engine.model, self.engine.forward(batch.sequences), batch) / count
            self.engine.backward(loss)
            total += loss.detach().double().cpu()
        self.watchdog.enter("update", step)
        rate = learning_rate(self.schedule, self.settings.learning_rate, self.num_steps, step)
        result = self.engine.step(rate)
        loss_of_step = float(sum_over_ranks(total))
        self._check_finite(result.applied and math.isfinite(loss_of_step), loss_of_step)
        self.progress.step += 1
        interval = self._interval
        interval.loss += loss_of_step
        interval.steps += 1
        interval.units += self.settings.batch_size
        interval.tokens += int(self.train.lengths[self.order.global_batch(step)].sum())
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

    def _evaluate_and_compare(self, on_best: Callable[[], None]) -> None:
        progress = self.progress
        if self.dev is None:
            if progress.step == self.num_steps:
                self._keep(on_best)
            return
        began_at = time.perf_counter()
        on_batch = partial(self.watchdog.enter, "evaluate", progress.step)
        rows = evaluate_rows(self.engine, self.dev, self.settings.eval_batch_size, on_batch)
        metrics = self.dev.scores(rows)
        progress.history.append({"step": progress.step, **metrics})
        if self.monitor:
            self.monitor.record("eval", progress.step, metrics)
        score = metrics[self.settings.metric]
        if progress.best_score is None or score > progress.best_score:
            progress.best_score, progress.best_metrics = score, metrics
            progress.best_answers = np.unique(rows.argmax(axis=1)).tolist()
            progress.evaluations_since_best = 0
            self._keep(on_best)
        else:
            progress.evaluations_since_best += 1
            patience = self.settings.early_stopping
            progress.stopped_early = patience is not None and progress.evaluations_since_best >= patience
        # The throughput is that of training.
        self._interval.began_at += time.perf_counter() - began_at

    def _keep(self, on_best: Callable[[], None]) -> None:
        """Remember the present weights as the best ones."""
        self.watchdog.enter("save", self.progress.step)
        self.progress.best_step = self.progress.step
        self.best = {
            name: tensor.clone() for part, name, tensor in self.engine.gather_state() if part == WEIGHTS
        }
        on_best()


def evaluate_rows(
    engine: Engine, data: TaskData, batch_size: int, on_batch: Callable[[], None]
) -> NDArray[np.float32]:
    """Outputs of all units of a split, [units, row_width], in order and equal on all ranks. Collective.

    Args:
        engine: holds the model.
        data: the split.
        batch_size: units per forward pass of one rank.
        on_batch: called before every forward pass.
    """
    batches = evaluation_batches(data.lengths, engine.world.rank, engine.world.size, batch_size)
    parts = []
    for units in batches:
        on_batch()
        batch = data.batch(units).to(engine.device)
        parts.append(data.rows(engine.evaluate(batch.sequences), batch, units))
    mine = np.concatenate(parts)
    indices = torch.from_numpy(np.concatenate(batches))
    gathered = gather_rows(torch.from_numpy(mine).flatten()).view(-1, data.row_width)
    rows = np.empty((len(data.lengths), data.row_width), dtype=np.float32)
    rows[gather_rows(indices).flatten().numpy()] = gathered.numpy()
    return rows
