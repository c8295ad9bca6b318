"""Shards -> packed batches of this rank, in the elastic order, verified, with no state but a position."""

from __future__ import annotations

import functools
import os
import signal
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from albert.batches import PretrainBatch, pack
from albert.blocks import Block
from albert.config import DataConfig
from albert.errors import AlbertError, ConfigError
from albert.manifest import Manifest, dataset_tokenizer
from albert.masking import MaskingPolicy, example_keys, remask_block
from albert.processes import die_with_parent
from albert.sample_order import Place, Ranges, SampleOrder, rank_share, step_positions
from albert.shard_cache import CacheOptions
from albert.shards import ShardReader
from albert.tokenization import load_tokenizer

_HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class _LocatedBlock:
    """A decoded block with the offsets of its examples."""

    block: Block
    rows_by_length: NDArray[np.int64]
    """[examples] the shortest first; equal lengths in the order of the block."""
    token_ends: NDArray[np.int64]
    pred_ends: NDArray[np.int64]


class Row(NamedTuple):
    """Where an example lies, and how often it was seen before."""

    block: int
    """Index over all shards of the split, in manifest order."""
    row: int
    """Index inside the block."""
    epoch: int


@dataclass(frozen=True)
class Remasking:
    """Fresh masks in every epoch, a pure function of (seed, epoch, example)."""

    seed: int
    policy: MaskingPolicy

    @staticmethod
    def of_dataset(config: DataConfig, manifest: Manifest, seed: int) -> Remasking:
        """Masks under the policy that the dataset was built with."""
        tokenizer = load_tokenizer(dataset_tokenizer(config.directory, manifest, config.cache))
        names = {"masked_lm_prob", "max_predictions_per_seq", "max_ngram"}
        options = {name: manifest.settings[name] for name in names}
        favor = manifest.settings["favor_ngram"]
        return Remasking(seed, MaskingPolicy.of_tokenizer(tokenizer, favor=favor, **options))


class ExampleSource:
    """Reads single examples of one split; keeps the most recently used blocks decoded."""

    def __init__(
        self,
        directory: str,
        manifest: Manifest,
        split: str,
        cached_blocks: int,
        remasking: Remasking | None = None,
        cache: CacheOptions | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            directory: of the dataset, or its address.
            manifest: of the dataset.
            split: `train` or `eval`.
            cached_blocks: decoded blocks that are kept; bounds the memory.
            remasking: without it the shards' masks are used.
            cache: of a remote dataset's files.
        """
        self._remasking = remasking
        shards = manifest.split(split)
        self._reader = ShardReader(directory, shards, manifest.tokenizer.vocab_size, cache)
        self._places = [
            (index, block) for index, shard in enumerate(shards) for block in range(len(shard.blocks))
        ]
        self.block_examples = [entry.examples for shard in shards for entry in shard.blocks]
        self._cache: OrderedDict[tuple[int, int], _LocatedBlock] = OrderedDict()
        self._cached_blocks = cached_blocks

    @property
    def num_examples(self) -> int:
        """Examples in the split."""
        return sum(self.block_examples)

    def batch(self, rows: Sequence[Row]) -> PretrainBatch:
        """Pack examples.

        Raises:
            DataError: a block is damaged; names shard and block.
        """
        ids, types, flat, labels, orders, lengths = [], [], [], [], [], []
        offset = 0
        for block_index, row, epoch in rows:
            located = self._located(block_index, epoch)
            block = located.block
            length, num_masked = int(block.lengths[row]), int(block.num_masked[row])
            token_end, pred_end = int(located.token_ends[row]), int(located.pred_ends[row])
            preds = slice(pred_end - num_masked, pred_end)
            ids.append(block.input_ids[token_end - length : token_end])
            types.append(np.arange(length) >= block.segment_a_lengths[row])
            flat.append(block.masked_lm_positions[preds].astype(np.int64) + offset)
            labels.append(block.masked_lm_labels[preds])
            orders.append(int(block.sentence_order_labels[row]))
            lengths.append(length)
            offset += length
        return PretrainBatch(
            pack(_int64(ids), _int64(types), tuple(lengths)),
            _int64(flat),
            _int64(labels),
            torch.tensor(orders, dtype=torch.int64),
        )

    def first_rows(self, count: int) -> list[Row]:
        """The first `count` examples in the order of the shards; for evaluation."""
        every = (Row(block, row, 0) for block, size in enumerate(self.block_examples) for row in range(size))
        return [row for row, _ in zip(every, range(count), strict=False)]

    def row_at(self, place: Place) -> Row:
        """The example that the elastic order means.

        Raises:
            DataError: its block is damaged; names shard and block.
        """
        located = self._located(place.block, place.epoch)
        return Row(place.block, int(located.rows_by_length[place.by_length]), place.epoch)

    def _located(self, index: int, epoch: int) -> _LocatedBlock:
        key = (index, epoch if self._remasking else 0)
        if key not in self._cache:
            block = self._reader.read_block(*self._places[index])
            if self._remasking:
                rows = np.arange(block.num_examples)
                keys = example_keys(self._remasking.seed, epoch, index, rows)
                block = remask_block(block, keys, self._remasking.policy)
            ends = (np.cumsum(column, dtype=np.int64) for column in (block.lengths, block.num_masked))
            by_length = np.argsort(block.lengths, kind="stable")
            self._cache[key] = _LocatedBlock(block, by_length, *ends)
            if len(self._cache) > self._cached_blocks:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


def _int64(arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))


@dataclass(frozen=True)
class BatchPlan:
    """How the examples of a step are divided."""

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    num_steps: int

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per step of one rank."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)


class _PositionSampler(Sampler[list[int]]):
    """Positions of this rank's micro-batches, from a step on."""

    def __init__(self, plan: BatchPlan, first_step: int, first_position: int, skipped: Ranges) -> None:
        self.plan, self.skipped = plan, skipped
        self.first_step, self.first_position = first_step, first_position

    def __iter__(self) -> Iterator[list[int]]:
        plan, start = self.plan, self.first_position
        for _ in range(plan.num_steps - self.first_step):
            positions = step_positions(start, plan.global_batch_size, self.skipped)
            start = int(positions[-1]) + 1
            own = rank_share(positions, plan.rank, plan.world_size).tolist()
            for first in range(0, len(own), plan.micro_batch_size):
                yield own[first : first + plan.micro_batch_size]


class _Positions(Dataset[PretrainBatch]):
    """Map-style dataset over positions; a batch sampler asks for a whole micro-batch at once."""

    def __init__(self, source: ExampleSource, order: SampleOrder, names_examples: bool) -> None:
        self.source, self.order, self.names_examples = source, order, names_examples

    def __getitems__(self, positions: list[int]) -> PretrainBatch:
        places = [self.order.locate(position) for position in positions]
        batch = self.source.batch([self.source.row_at(place) for place in places])
        if not self.names_examples:
            return batch
        return replace(batch, examples=[(k, *place) for k, place in zip(positions, places, strict=True)])


class TrainLoader:
    """Micro-batches of every step for one rank."""

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        plan: BatchPlan,
        seed: int,
        *,
        names_examples: bool = False,
    ) -> None:
        """Set up order and source.

        Args:
            config: of the data.
            manifest: of the dataset.
            plan: how a step is divided.
            seed: of the run.
            names_examples: fill `PretrainBatch.examples`, for a ledger.

        Raises:
            ConfigError: the dataset has no training examples, or fewer blocks than lanes.
        """
        self.order = SampleOrder.of_dataset(config, manifest, seed, plan.global_batch_size)
        lanes = self.order.num_lanes
        own_lanes = lanes // plan.world_size if lanes % plan.world_size == 0 else lanes
        self._config, self._plan, self._names_examples = config, plan, names_examples
        remasking = Remasking.of_dataset(config, manifest, seed) if config.remask else None
        # Two windows per lane: the one in use and, while lanes cross a border one after the other, the next.
        cached_blocks = 2 * own_lanes * config.window_blocks
        self.source = ExampleSource(
            config.directory, manifest, "train", cached_blocks, remasking, config.cache
        )

    def steps(
        self, first_step: int, first_position: int, skipped: Ranges = ()
    ) -> Generator[list[PretrainBatch], None, None]:
        """The micro-batches of each step from `first_step` (which begins at `first_position`) to the last.

        Args:
            first_step: steps done before.
            first_position: where the last of them ended.
            skipped: positions that no step uses.
        """
        workers = self._config.num_workers
        loader = DataLoader(
            _Positions(self.source, self.order, self._names_examples),
            batch_sampler=_PositionSampler(self._plan, first_step, first_position, skipped),
            num_workers=workers,
            # The way in which workers know their parent; another one starts them from a server.
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=4 if workers else None,
            collate_fn=_identity,
            worker_init_fn=functools.partial(_set_up_worker, os.getpid()),
            generator=torch.Generator(),
            pin_memory=False,
        )
        micro_batches = iter(loader)
        try:
            for _ in range(first_step, self._plan.num_steps):
                yield [next(micro_batches) for _ in range(self._plan.accumulation_steps)]
        except AlbertError as error:
            raise type(error)(_message_of_worker(error)) from None
        finally:
            # Workers ignore signals; left to the interpreter's exit, it would wait for them for ever.
            getattr(micro_batches, "_shutdown_workers", lambda: None)()


def _message_of_worker(error: AlbertError) -> str:
    """The error's own sentence, without the traceback that a loader process puts around it."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()


def _identity(batch: Any) -> Any:
    return batch


def _set_up_worker(trainer: int, worker: int) -> None:  # noqa: ARG001
    """A signal asks the trainer to stop at the end of a step; its loaders must live until then, and no longer."""
    die_with_parent(trainer, signal.SIGKILL)  # writing to a pipe that nobody reads, it would wait for ever
    torch.set_num_threads(1)
    for number in _HANDLED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def check_dataset(manifest: Manifest, vocab_size: int, max_position_embeddings: int, directory: str) -> None:
    """Check that a dataset fits a model.

    Raises:
        ConfigError: vocabulary or sequence length differ; says which key to set.
    """
    problems = []
    if manifest.tokenizer.vocab_size != vocab_size:
        problems.append(
            f"{directory}: its tokenizer has {manifest.tokenizer.vocab_size} entries, model.vocab_size is "
            f"{vocab_size}; set model.vocab_size={manifest.tokenizer.vocab_size} or choose another dataset"
        )
    if manifest.max_seq_length > max_position_embeddings:
        problems.append(
            f"{directory}: examples have up to {manifest.max_seq_length} tokens, model.max_position_embeddings "
            f"is {max_position_embeddings}; build shards with --max-seq-length {max_position_embeddings}"
        )
    if problems:
        raise ConfigError("\n".join(problems))
