"""The elastic order: global position -> (block, example, epoch). A pure function of (seed, position, p).

Position k belongs to lane `k mod L`, where L is fixed for a run. Epoch e permutes all blocks by (seed, e); lane l
takes every L-th of them, `permutation[l::L]`. Inside a lane, examples are shuffled over windows of several
blocks by (seed, e, l, window). A lane that has used its blocks of epoch e goes on with its blocks of e + 1, so
every example is seen exactly once per epoch of its lane and no tail is dropped or padded.

The shuffle deals lengths evenly: position k gets an example whose rank by length inside its block is near the radical
inverse of k in a prime base p (van der Corput's sequence: 0/p, 1/p, 2/p, ... with ever finer steps between). Any p
positions in a row then have examples of all p-ths of the lengths, and so have p positions k, k + W, k + 2 W, ... of
a rank, because p does not divide B and so not W. Steps have nearly equal numbers of tokens, and so have the ranks of
a step, which wait for the fullest of them.

A step takes the next B positions and rank r of W takes those with `k mod W = r`. The examples of a step are
therefore the same for every number of ranks, any accumulation and any number of loader processes, and the whole
state of the loader is one integer, the positions consumed. When W divides L, a rank reads only its own lanes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from albert.config import DataConfig
from albert.errors import ConfigError
from albert.manifest import Manifest

_AUTO_LANES = (960, 480, 240, 120, 60, 24, 12, 6, 4, 2, 1)
_MIN_BLOCKS_PER_LANE = 16
_NEVER = 2**62
_PERMUTATION, _WINDOW = 0, 1
_LENGTH_BASES = (11, 13, 17, 19, 23)
"""Of these p is the first that does not divide the global batch."""
_LENGTH_DIGITS = 6
_LENGTH_JITTER = 1 / 16
"""How far the rank by length of an example may lie from what its position asks for."""

Ranges = Sequence[tuple[int, int]]
"""(begin, end) of positions, the end not included."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def choose_num_lanes(num_blocks: int) -> int:
    """Lanes for a dataset: highly composite, at most 960, with enough blocks per lane to shuffle."""
    return next((lanes for lanes in _AUTO_LANES if num_blocks >= lanes * _MIN_BLOCKS_PER_LANE), 1)


class Place(NamedTuple):
    """An example of a dataset, and how often it was seen before."""

    block: int
    """Index over all shards of the split, in manifest order."""
    by_length: int
    """Index among the examples of the block, the shortest first; equal lengths as they lie in the block."""
    epoch: int


class SampleOrder:
    """Maps positions to examples; holds a few cached permutations and no other state."""

    def __init__(
        self,
        block_examples: Sequence[int],
        *,
        seed: int,
        num_lanes: int,
        window_blocks: int,
        global_batch_size: int,
    ) -> None:
        """Set up the order.

        Args:
            block_examples: [blocks] number of examples of every block, in manifest order; each at least 1.
            seed: of the run.
            num_lanes: L; at most the number of blocks, so that no lane is empty.
            window_blocks: blocks per shuffle window of a lane.
            global_batch_size: B; only its divisibility matters.

        Raises:
            ConfigError: more lanes than blocks, or no blocks at all.
        """
        self.block_examples = np.asarray(block_examples, np.int64)
        if len(self.block_examples) == 0:
            raise ConfigError("data.directory: the train split holds no examples; build it from more text")
        if num_lanes > len(self.block_examples):
            raise ConfigError(
                f"data.num_lanes ({num_lanes}) is more than the dataset's {len(self.block_examples)} blocks; "
                "use data.num_lanes=auto"
            )
        self.seed, self.num_lanes, self.window_blocks = seed, num_lanes, window_blocks
        self.length_base = next((p for p in _LENGTH_BASES if global_batch_size % p), _LENGTH_BASES[0])
        self.examples_per_epoch = int(self.block_examples.sum())
        # [epochs known + 1, lanes]: index inside its lane at which a lane's epoch begins
        self._epoch_starts = [np.zeros(num_lanes, np.int64)]
        self._permutations: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], NDArray[np.int64]] = OrderedDict()
        self._window_starts: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    @staticmethod
    def of_dataset(config: DataConfig, manifest: Manifest, seed: int, global_batch_size: int) -> SampleOrder:
        """The order in which a run uses the train split.

        Raises:
            ConfigError: the dataset has no training examples, or fewer blocks than lanes.
        """
        sizes = [entry.examples for shard in manifest.split("train") for entry in shard.blocks]
        lanes = choose_num_lanes(len(sizes)) if config.num_lanes == "auto" else config.num_lanes
        return SampleOrder(
            sizes, seed=seed, num_lanes=lanes, window_blocks=config.window_blocks,
            global_batch_size=global_batch_size,
        )  # fmt: skip

    def locate(self, position: int) -> Place:
        """Where the example at a global position lies."""
        index, lane = divmod(position, self.num_lanes)
        epoch = self._epoch_of(lane, index)
        index -= int(self._epoch_starts[epoch][lane])
        starts = self._lane_window_starts(epoch, lane)
        window = int(np.searchsorted(starts, index, side="right")) - 1
        block, example = self._window(epoch, lane, window)[index - starts[window]]
        return Place(int(block), int(example), epoch)

    def epoch(self, position: int) -> float:
        """Epochs consumed before a position, over all lanes; for reports."""
        return position / self.examples_per_epoch

    def _epoch_of(self, lane: int, index: int) -> int:
        while self._epoch_starts[-1][lane] <= index:
            epoch = len(self._epoch_starts) - 1
            counts = self.block_examples[self._permutation(epoch)]
            padded = np.zeros(-(-len(counts) // self.num_lanes) * self.num_lanes, np.int64)
            padded[: len(counts)] = counts
            per_lane = padded.reshape(-1, self.num_lanes).sum(axis=0)
            self._epoch_starts.append(self._epoch_starts[-1] + per_lane)
        epoch = len(self._epoch_starts) - 2
        while self._epoch_starts[epoch][lane] > index:
            epoch -= 1
        return epoch

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        def make() -> NDArray[np.int64]:
            generator = np.random.default_rng([self.seed, _PERMUTATION, epoch])
            return generator.permutation(len(self.block_examples))

        return _cached(self._permutations, epoch, 3, make)

    def _lane_blocks(self, epoch: int, lane: int) -> NDArray[np.int64]:
        return self._permutation(epoch)[lane :: self.num_lanes]

    def _lane_window_starts(self, epoch: int, lane: int) -> NDArray[np.int64]:
        """[windows] index inside the lane's epoch at which each window begins."""

        def make() -> NDArray[np.int64]:
            counts = self.block_examples[self._lane_blocks(epoch, lane)]
            ends = np.concatenate(([0], np.cumsum(counts)))
            return ends[:-1][:: self.window_blocks]

        return _cached(self._window_starts, (epoch, lane), 2 * self.num_lanes, make)

    def _window(self, epoch: int, lane: int, window: int) -> NDArray[np.int64]:
        """[examples, 2] block and index by length, shuffled."""

        def make() -> NDArray[np.int64]:
            first = window * self.window_blocks
            blocks = self._lane_blocks(epoch, lane)[first : first + self.window_blocks]
            counts = self.block_examples[blocks]
            within = np.concatenate([np.arange(count) for count in counts])
            pairs = np.stack([np.repeat(blocks, counts), within], axis=1)
            generator = np.random.default_rng([self.seed, _WINDOW, epoch, lane, window])
            jitter = _LENGTH_JITTER * generator.random(len(pairs))
            lengths = (within + 0.5) / np.repeat(counts, counts) + jitter
            start = self._epoch_starts[epoch][lane] + self._lane_window_starts(epoch, lane)[window]
            positions = (start + np.arange(len(pairs))) * self.num_lanes + lane
            wanted = _radical_inverse(positions, self.length_base)
            dealt = np.empty_like(pairs)
            dealt[np.argsort(wanted, kind="stable")] = pairs[np.argsort(lengths, kind="stable")]
            return dealt

        return _cached(self._windows, (epoch, lane, window), 2 * self.num_lanes, make)


def _radical_inverse(values: NDArray[np.int64], base: int) -> NDArray[np.int64]:
    """The lowest digits in reverse order, in units of base ** -_LENGTH_DIGITS."""
    result = np.zeros_like(values)
    for _ in range(_LENGTH_DIGITS):
        values, digits = np.divmod(values, base)
        result = result * base + digits
    return result


def _cached(cache: OrderedDict[_Key, _Value], key: _Key, capacity: int, make: Callable[[], _Value]) -> _Value:
    """`cache[key]`, made on demand; the least recently used entries beyond `capacity` are dropped."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > capacity:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def step_positions(start: int, count: int, skipped: Ranges = ()) -> NDArray[np.int64]:
    """The next positions of the run.

    Args:
        start: where the step before ended.
        count: positions of the step, B.
        skipped: (begin, end) ranges, ascending and disjoint, that no step uses.

    Returns:
        [count] ascending; the next step starts after the last of them.
    """
    pieces = []
    for begin, end in (*skipped, (_NEVER, _NEVER)):
        free = min(count, max(0, begin - start))
        pieces.append(np.arange(start, start + free, dtype=np.int64))
        count -= free
        if not count:
            break
        start = max(start, end)
    return np.concatenate(pieces)


def rank_share(positions: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """Positions of one step that belong to a rank: those k with k mod W = rank, as long as none was skipped."""
    return positions[(rank - int(positions[0])) % world_size :: world_size]
