"""Held-out MLM and SOP loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from albert.batches import PretrainBatch
from albert.blocks import NO_SENTENCE_ORDER
from albert.config import RunConfig
from albert.distributed import World, sum_over_ranks
from albert.engine import Engine
from albert.errors import ConfigError
from albert.loader import ExampleSource
from albert.manifest import Manifest

_CACHED_BLOCKS = 2


class Evaluator:
    """Evaluates on the same examples every time, whatever the number of ranks."""

    def __init__(self, config: RunConfig, manifest: Manifest, world: World) -> None:
        """Choose the first `eval.num_examples` examples of the eval split.

        Raises:
            ConfigError: the dataset has no eval split.
        """
        if not manifest.split("eval"):
            raise ConfigError(
                f"{config.data.directory}: no eval split; build it with --eval-fraction or set eval.interval_steps=0"
            )
        self._source = ExampleSource(
            config.data.directory, manifest, "eval", _CACHED_BLOCKS, cache=config.data.cache
        )
        self._micro_batch_size = config.eval.micro_batch_size or config.train.micro_batch_size
        self._rows = self._source.first_rows(config.eval.num_examples)
        self._world = world

    def evaluate(self, engine: Engine, on_batch: Callable[[], None]) -> dict[str, float]:
        """Losses per prediction and accuracies over all ranks; says so before every micro-batch. Collective."""
        sums = torch.zeros(6, dtype=torch.float64)
        for batch, weight in self._batches():
            on_batch()
            output = engine.evaluate(batch.to(engine.device), with_accuracy=True)
            counts = (batch.masked_lm_labels.numel(), _count_sentence_orders(batch))
            values = [float(value) for value in (*output, *counts)]
            sums += weight * torch.tensor(values, dtype=torch.float64)
        mlm_loss, sop_loss, mlm_correct, sop_correct, num_preds, num_orders = sum_over_ranks(sums).tolist()
        metrics = {"mlm_loss": mlm_loss / max(num_preds, 1), "mlm_accuracy": mlm_correct / max(num_preds, 1)}
        if num_orders:
            metrics |= {"sop_loss": sop_loss / num_orders, "sop_accuracy": sop_correct / num_orders}
        return metrics

    def _batches(self) -> Iterator[tuple[PretrainBatch, int]]:
        """This rank's micro-batches. Ranks with one less repeat one with weight 0: ZeRO-3 forwards together."""
        size, world = self._micro_batch_size, self._world
        pieces = [self._rows[first : first + size] for first in range(0, len(self._rows), size)]
        rounds = -(-len(pieces) // world.size)
        for turn in range(rounds):
            index = turn * world.size + world.rank
            weight = 1 if index < len(pieces) else 0
            yield self._source.batch(pieces[index if weight else 0]), weight


def _count_sentence_orders(batch: PretrainBatch) -> int:
    return int((batch.sentence_order_labels != NO_SENTENCE_ORDER).sum())
