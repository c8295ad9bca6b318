"""The pretraining loop: fetch, count, forward, backward, step; log, evaluate, save and stop when due."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from albert.batches import PretrainBatch
from albert.checkpoint import TrainingState, step_directory
from albert.config import RunConfig
from albert.distributed import sum_over_ranks
from albert.engine import Engine
from albert.errors import NonFiniteError
from albert.evaluation import Evaluator
from albert.heads import PretrainOutput
from albert.loader import TrainLoader
from albert.loss_spikes import SkippedStep, SpikeDetector
from albert.monitoring import Monitor, measure_matmul_flops_per_s
from albert.nonfinite import first_bad_tensors
from albert.optim.schedules import learning_rate
from albert.precision import DTYPES
from albert.probes import Probes
from albert.profiling import step_profiler
from albert.replicas import check_replicas
from albert.run_checkpoints import RunCheckpoints
from albert.sample_order import step_positions
from albert.step_log import BatchCounts, Interval, count_batch
from albert.stopping import StopRequest
from albert.watchdog import Watchdog

_DROPOUT_STREAM = 2
_PROBE_POLL_S = 0.5


class Trainer:
    """Runs a training from its current step to the last one."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        loader: TrainLoader,
        *,
        evaluator: Evaluator | None,
        monitor: Monitor | None,
        stop: StopRequest,
        checkpoints: RunCheckpoints,
        watchdog: Watchdog,
    ) -> None:
        """Put the parts together.

        Args:
            config: of the run.
            engine: model and optimizer.
            loader: of this rank's micro-batches.
            evaluator: None for no evaluation.
            monitor: on the main rank, None on the others.
            stop: set by signals.
            checkpoints: saves the run.
            watchdog: is told what goes on.
        """
        self.config, self.engine, self.loader, self.world = config, engine, loader, engine.world
        self.evaluator, self.monitor, self.stop = evaluator, monitor, stop
        self.checkpoints, self.watchdog = checkpoints, watchdog
        self.step, self.position = 0, 0
        self._matmul_flops_per_s = measure_matmul_flops_per_s(engine.device, DTYPES[config.train.precision])
        self._nonfinite_in_a_row = 0
        self._interval = Interval()
        self._spikes = SpikeDetector(config.spikes)
        self._found: list[SkippedStep] = []
        self._probes = Probes(config.probe, Path(config.train.output_dir), monitor)
        self._saved_step = -1
        self._step_done: Callable[[], None] = lambda: None
        model = config.model
        self._has_dropout = model.hidden_dropout_prob > 0 or model.attention_probs_dropout_prob > 0

    def go_on_from(self, state: TrainingState) -> None:
        """Take over what a checkpoint knows besides the engine's tensors."""
        self.step, self.position = state.step, state.position
        self._spikes = SpikeDetector(self.config.spikes, state.recent_losses)

    def fit(self) -> bool:
        """Train until the last step or until asked to stop; the checkpoint is committed in both cases.

        Returns:
            True when the run is finished, False when it was stopped before its last step.

        Raises:
            NonFiniteError: too many non-finite steps in a row.
            PeerLostError: a rank holds other weights than the others.
        """
        train = self.config.train
        last_step = min(train.num_steps, train.stop_after_steps or train.num_steps)
        if self.step == 0:
            self._evaluate()
        self._interval = Interval()
        should_stop = False
        directory = Path(self.config.train.output_dir)
        with step_profiler(directory, self.world, self.config.log.profile_steps) as self._step_done:
            while self.step < last_step and not should_stop:
                should_stop = self._train_until(last_step)
                if (should_stop or self.step >= last_step) and self._saved_step != self.step:
                    self._save()
        if self.step < train.num_steps:
            self._probes.close()
        self._finish_save()
        return self.step == train.num_steps

    def finish_probes(self) -> None:
        """Wait for the probe that runs and for that of the last checkpoint, or for a signal. Collective.

        Ranks leave together even without probes: one that has left is as silent as a lost one.
        """
        last = step_directory(self.checkpoints.directory, self.step)
        is_waiting = True
        while is_waiting:
            self.watchdog.enter("probe", self.step)
            flags = torch.tensor([self._probes.finish(self.step, last), self.stop.is_set], dtype=torch.int64)
            num_running, num_stopped = sum_over_ranks(flags).tolist()
            is_waiting = num_running > 0 and num_stopped == 0
            if is_waiting:
                time.sleep(_PROBE_POLL_S)
        self._probes.close()

    def _train_until(self, last_step: int) -> bool:
        """Steps in a row, ended by the last one, a stop request (returns True) or a rewind."""
        num_skipped = len(self.checkpoints.skipped)
        ranges = self.checkpoints.skipped_ranges
        with contextlib.closing(self.loader.steps(self.step, self.position, ranges)) as steps:
            while self.step < last_step and len(self.checkpoints.skipped) == num_skipped:
                if self._fetch_and_train(steps):
                    return True
        return False

    def _fetch_and_train(self, steps: Iterator[list[PretrainBatch]]) -> bool:
        """One step with all that is due after it; returns whether any rank was asked to stop."""
        began_at = time.perf_counter()
        self.watchdog.enter("data", self.step)
        micro_batches = next(steps)
        self._interval.waited_s += time.perf_counter() - began_at
        counts = self.train_step(micro_batches)
        self._step_done()
        if self._answer_spikes():
            return counts.stop_requests > 0
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
        self.watchdog.enter("count", self.step)
        counts = count_batch(
            micro_batches, stop_requested=self.stop.is_set, save_written=self.checkpoints.is_written
        )
        is_logging = (self.step + 1) % self.config.log.interval_steps == 0 or self.step + 1 == train.num_steps
        rate = learning_rate(
            self.config.schedule, self.config.optimizer.learning_rate, train.num_steps, self.step
        )
        self.watchdog.enter("forward_backward", self.step)
        sums = torch.zeros(4, device=self.engine.device)
        for index, batch in enumerate(micro_batches):
            loss, values = self._forward(self.engine.forward, index, batch, counts, is_logging)
            self.engine.backward(loss)
            sums[: len(values)] += values
        self.watchdog.enter("update", self.step)
        if (interval := train.replica_check_interval_steps) and (self.step + 1) % interval == 0:
            # Before the update, which under ZeRO-1 and 2 brings all ranks fresh weights.
            check_replicas(self.engine.model, self.world, self.step + 1)
        result = self.engine.step(rate)
        bad = {} if result.applied else self._find_bad_tensors(micro_batches, counts)
        self._advance(micro_batches)
        if result.applied:
            self._nonfinite_in_a_row = 0
        else:
            self._report_nonfinite(result.grad_norm, bad)
        self._interval.add(self.config.model, sums, counts)
        if is_logging:
            self._log(sums, counts, rate, result.grad_norm)
        return counts

    def _advance(self, micro_batches: Sequence[PretrainBatch]) -> None:
        positions = step_positions(
            self.position, self.config.train.global_batch_size, self.checkpoints.skipped_ranges
        )
        self.step, self.position = self.step + 1, int(positions[-1]) + 1
        self._spikes.expect(self.step, int(positions[0]), self.position)
        if self.checkpoints.ledger:
            self.checkpoints.ledger.record(self.step, micro_batches)
        if self.monitor:
            self.monitor.advance(self.step)

    def _forward(
        self,
        model: Callable[..., PretrainOutput],
        index: int,
        batch: PretrainBatch,
        counts: BatchCounts,
        with_accuracy: bool,
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of the step's loss for one micro-batch, and the sums behind it."""
        self._seed_dropout(index)
        output = model(batch.to(self.engine.device), with_accuracy=with_accuracy)
        loss = output.mlm_loss_sum / counts.preds + output.sop_loss_sum / max(counts.orders, 1.0)
        return loss, torch.stack([value.detach().float() for value in output if value is not None])

    def _seed_dropout(self, micro_batch: int) -> None:
        """Dropout is a function of (seed, step, rank, micro-batch), so there is no generator state to save."""
        if self._has_dropout:
            key = [self.config.seed, _DROPOUT_STREAM, self.step, self.world.rank, micro_batch]
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

    def _find_bad_tensors(
        self, micro_batches: Sequence[PretrainBatch], counts: BatchCounts
    ) -> dict[int, str]:
        """Rank -> first tensor of the dropped step that is not finite. Collective."""
        if self._searches_loss_scale:
            return {}
        losses = [
            partial(lambda i, b: self._forward(self.engine.model, i, b, counts, False)[0], index, batch)
            for index, batch in enumerate(micro_batches)
        ]
        return first_bad_tensors(self.engine, losses)

    @property
    def _searches_loss_scale(self) -> bool:
        """fp16 drops updates while it searches for a scale: that is no divergence until the scale is at its end."""
        return self.engine.loss_scale > 1.0

    def _report_nonfinite(self, grad_norm: float, bad: Mapping[int, str]) -> None:
        """Say which update was dropped and why; all ranks see the same gradient norm and agree."""
        self._nonfinite_in_a_row += 1
        limit = self.config.train.max_nonfinite_steps
        begin, end = self._spikes.newest
        what = f"update dropped: gradient norm {grad_norm}"
        if self._searches_loss_scale:
            what += f" at loss scale {self.engine.loss_scale:g}"
        what += "".join(f"; first bad tensor on rank {rank}: {name}" for rank, name in bad.items())
        if self.monitor:
            self.monitor.event(self.step, what, positions=[begin, end])
        if self._nonfinite_in_a_row >= limit and not self._searches_loss_scale:
            raise NonFiniteError(
                f"step {self.step}: loss or gradient was not finite {limit} times in a row ({what}); lower "
                "optimizer.learning_rate or go on from an earlier checkpoint"
            )

    def _log(self, sums: Tensor, counts: BatchCounts, rate: float, grad_norm: float) -> None:
        """Losses are means over the interval, accuracies those of the last step."""
        interval = self._interval
        self._found += self._spikes.observe(interval.reduce_losses())
        mlm_loss, sop_loss = interval.mean_losses()
        mlm_correct, sop_correct = sum_over_ranks(sums[2:].double().cpu()).tolist()
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
        self._interval = Interval()

    def _answer_spikes(self) -> bool:
        """Report the spikes that were found; True if the run went back to before them. Collective."""
        found, self._found = self._found, []
        if not found:
            return False
        what = ", ".join(f"{spike.loss:.3f} at step {spike.step}" for spike in found)
        from_step, spikes = self.step, self.config.spikes
        state = None
        if spikes.action == "rewind" and self.checkpoints.num_rewinds < spikes.max_rewinds:
            self._finish_save()
            self.watchdog.enter("rewind", self.step)
            state = self.checkpoints.rewind(found)
        if state is None:
            if self.monitor:
                self.monitor.event(self.step, f"loss spike: {what}")
            return False
        self.go_on_from(state)
        self._saved_step, self._interval = self.step, Interval()
        if self.monitor:
            self.monitor.rewind(self.step)
            ranges = [[spike.begin, spike.end] for spike in found]
            text = f"went back from step {from_step} because of a loss spike: {what}"
            self.monitor.event(self.step, text, positions_left_out=ranges)
        return True

    def _is_due(self, interval_steps: int) -> bool:
        return interval_steps > 0 and self.step % interval_steps == 0

    def _evaluate(self) -> None:
        if self.evaluator is None:
            return
        metrics = self.evaluator.evaluate(self.engine, lambda: self.watchdog.enter("evaluate", self.step))
        if self.monitor:
            self.monitor.record("eval", self.step, metrics)

    def _save(self) -> None:
        """Save the state after this step, unless its losses make the run go back instead."""
        self._finish_save()
        self._found += self._spikes.observe(self._interval.reduce_losses())
        if self._answer_spikes():
            return
        self.watchdog.enter("save", self.step)
        self.checkpoints.begin(self.step, self.position, self._spikes.losses)
        self._saved_step = self.step
        if not self.config.checkpoint.asynchronous:
            self._finish_save()

    def _finish_save(self) -> None:
        self.watchdog.enter("commit", self.step)
        path = self.checkpoints.finish()
        if path and self.monitor:
            self.monitor.event(self.step, f"checkpoint committed: {path}")
            if self._saved_step < self.config.train.num_steps:  # else see finish_probes
                self._probes.begin(self._saved_step, path)
