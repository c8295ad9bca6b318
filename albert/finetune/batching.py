"""Which units each step, rank and micro-batch takes: a pure function of (seed, position), as in pretraining."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ORDER_STREAM = 11


class BatchOrder:
    """One endless sequence of positions; epoch `e` is a permutation of all units by (seed, e).

    A step takes the next `batch_size` positions, rank `r` of `W` those with position mod W = r. So the global
    batch is the same for any number of ranks, every batch is full, and a step needs no other state.
    """

    def __init__(self, num_units: int, batch_size: int, seed: int) -> None:
        self.num_units = num_units
        self.batch_size = batch_size
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, _ORDER_STREAM, epoch]).permutation(num_units)
        )

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """Units of a step over all ranks, [batch_size]."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(positions, self.num_units)
        units = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            units[chosen] = self._permutation(int(epoch))[places[chosen]]
        return units

    def micro_batches(
        self, step: int, rank: int, world_size: int, micro_batch_size: int, lengths: NDArray[np.int64]
    ) -> Iterator[NDArray[np.int64]]:
        """This rank's units of a step, piece by piece; similar lengths stand together, which attends faster."""
        mine = self.global_batch(step)[rank::world_size]
        for start in range(0, len(mine), micro_batch_size):
            piece = mine[start : start + micro_batch_size]
            yield piece[np.argsort(lengths[piece], kind="stable")]


def evaluation_batches(
    lengths: NDArray[np.int64], rank: int, world_size: int, batch_size: int
) -> list[NDArray[np.int64]]:
    """This rank's share of all units, sorted by length; every rank gets equally many batches of equal size.

    The last unit is repeated where the ranks do not divide the units, so that collectives match.
    """
    order = np.argsort(-lengths, kind="stable")
    missing = -len(order) % world_size
    padded = np.concatenate((order, np.repeat(order[-1:], missing)))
    mine = padded[rank::world_size]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
