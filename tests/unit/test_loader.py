"""Batches hold exactly the examples that the shards hold, packed."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from albert.config import DataConfig
from albert.errors import ConfigError, DataError, MissingInputError
from albert.loader import BatchPlan, ExampleSource, Row, TrainLoader, check_dataset
from albert.manifest import Manifest, check_files, read_manifest
from albert.sample_order import Place
from albert.shards import ShardReader
from tests.synthetic import MAX_LENGTH, VOCAB_SIZE, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loader") / "shards"
    make_dataset(directory)
    return directory


@pytest.fixture(scope="module")
def manifest(dataset: Path) -> Manifest:
    return read_manifest(dataset)


def examples_of(batch) -> list[tuple]:
    """Each example of a packed batch as plain values."""
    found, preds = [], 0
    for index, length in enumerate(batch.sequences.lengths):
        start = int(batch.sequences.cu_seqlens[index])
        inside = slice(start, start + length)
        own = (batch.masked_lm_indices >= start) & (batch.masked_lm_indices < start + length)
        preds += int(own.sum())
        found.append(
            (
                tuple(batch.sequences.input_ids[inside].tolist()),
                tuple(batch.sequences.token_type_ids[inside].tolist()),
                tuple((batch.masked_lm_indices[own] - start).tolist()),
                tuple(batch.masked_lm_labels[own].tolist()),
                int(batch.sentence_order_labels[index]),
            )
        )
        assert batch.sequences.position_ids[inside].tolist() == list(range(length))
    assert preds == len(batch.masked_lm_labels)
    return found


def expected_examples(dataset: Path, manifest: Manifest, split: str) -> list[tuple]:
    reader = ShardReader(dataset, manifest.split(split), VOCAB_SIZE)
    found = []
    for shard_index, shard in enumerate(manifest.split(split)):
        for block_index in range(len(shard.blocks)):
            block = reader.read_block(shard_index, block_index)
            tokens = np.split(block.input_ids, np.cumsum(block.lengths)[:-1])
            positions = np.split(block.masked_lm_positions, np.cumsum(block.num_masked)[:-1])
            labels = np.split(block.masked_lm_labels, np.cumsum(block.num_masked)[:-1])
            for row, ids in enumerate(tokens):
                a_length = int(block.segment_a_lengths[row])
                types = (0,) * a_length + (1,) * (len(ids) - a_length)
                found.append(
                    (
                        tuple(ids.tolist()),
                        types,
                        tuple(positions[row].tolist()),
                        tuple(labels[row].tolist()),
                        int(block.sentence_order_labels[row]),
                    )
                )
    return found


def test_source_returns_what_the_shards_hold(dataset, manifest):
    for split in ("train", "eval"):
        source = ExampleSource(str(dataset), manifest, split, cached_blocks=2)
        rows = source.first_rows(10**9)
        assert len(rows) == source.num_examples
        assert examples_of(source.batch(rows)) == expected_examples(dataset, manifest, split)


def test_the_order_counts_the_examples_of_a_block_by_length(dataset, manifest):
    source = ExampleSource(str(dataset), manifest, "train", cached_blocks=2)
    size = source.block_examples[1]
    rows = [source.row_at(Place(1, index, 3)) for index in range(size)]
    assert sorted(rows) == [Row(1, row, 3) for row in range(size)]
    lengths = source.batch(rows).sequences.lengths
    assert list(lengths) == sorted(lengths)
    assert len(set(lengths)) > 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_epoch_is_every_example_once(dataset, manifest, num_workers):
    total = sum(shard.examples for shard in manifest.split("train"))
    batch_size = 6
    num_steps = total // batch_size + 1
    plan = BatchPlan(batch_size, 3, rank=0, world_size=1, num_steps=num_steps)
    config = DataConfig(directory=str(dataset), num_workers=num_workers, num_lanes=1)
    seen = [
        example
        for micro_batches in TrainLoader(config, manifest, plan, seed=5).steps(0, 0)
        for batch in micro_batches
        for example in examples_of(batch)
    ]
    assert sorted(seen[:total]) == sorted(expected_examples(dataset, manifest, "train"))


def test_steps_are_the_same_for_every_division_and_resume(dataset, manifest):
    def step_sets(world_size: int, micro: int, first_step: int = 0) -> list[list[tuple]]:
        steps: list[list[tuple]] = [[] for _ in range(8 - first_step)]
        for rank in range(world_size):
            plan = BatchPlan(12, micro, rank, world_size, num_steps=8)
            loader = TrainLoader(DataConfig(directory=str(dataset), num_workers=0), manifest, plan, seed=5)
            for index, micro_batches in enumerate(loader.steps(first_step, first_step * 12)):
                assert len(micro_batches) == plan.accumulation_steps
                steps[index] += [example for batch in micro_batches for example in examples_of(batch)]
        return [sorted(step) for step in steps]

    reference = step_sets(1, 12)
    for world_size, micro in ((1, 3), (2, 6), (3, 2), (4, 1), (6, 2), (12, 1)):
        assert step_sets(world_size, micro) == reference
    assert step_sets(2, 3, first_step=5) == reference[5:]


def test_a_damaged_block_stops_the_run_and_is_named(dataset, manifest, tmp_path):
    copy = tmp_path / "copy"
    make_dataset(copy)
    shard = copy / "train-00001.tar"
    data = bytearray(shard.read_bytes())
    data[manifest.shards[1].blocks[1].offset + 700] ^= 4
    shard.write_bytes(data)
    source = ExampleSource(str(copy), read_manifest(copy), "train", cached_blocks=2)
    with pytest.raises(DataError, match=r"train-00001.tar: block 1: checksum mismatch"):
        source.batch(source.first_rows(10**9))


def test_a_damaged_block_in_a_loader_process_says_the_same_and_leaves_nothing_behind(tmp_path):
    directory = tmp_path / "shards"
    manifest = make_dataset(directory)
    shard = directory / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    for block in manifest.shards[0].blocks:
        data[block.offset + 700] ^= 4
    shard.write_bytes(data)
    plan = BatchPlan(12, 12, 0, 1, num_steps=30)
    steps = TrainLoader(DataConfig(directory=str(directory), num_workers=1), manifest, plan, seed=5).steps(
        0, 0
    )
    with pytest.raises(DataError) as caught:
        list(steps)
    assert str(caught.value).startswith(str(shard))
    assert "checksum mismatch" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert multiprocessing.active_children() == []


def test_a_step_of_many_micro_batches_keeps_no_files_open(dataset, manifest):
    """Tensors that torch shares have a descriptor each; 150 micro-batches were more than the usual 1024."""

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    plan = BatchPlan(40, 1, 0, 1, num_steps=2)
    config = DataConfig(directory=str(dataset), num_workers=1)
    with contextlib.closing(TrainLoader(config, manifest, plan, seed=5).steps(0, 0)) as steps:
        before = open_files()
        held = list(steps)
        assert open_files() <= before
    in_process = TrainLoader(config.model_copy(update={"num_workers": 0}), manifest, plan, seed=5).steps(0, 0)
    for step, expected in zip(held, in_process, strict=True):
        assert [examples_of(batch) for batch in step] == [examples_of(batch) for batch in expected]


def read_one_step(config: DataConfig, manifest: Manifest, connection) -> None:
    """A rank that begins to train, tells the pids of its loader processes and waits to be killed."""
    plan = BatchPlan(1, 1, 0, 1, num_steps=10000)
    steps = TrainLoader(config, manifest, plan, seed=5).steps(0, 0)
    next(steps)
    connection.send([process.pid for process in multiprocessing.active_children()])
    signal.pause()


def test_loader_processes_end_with_a_rank_that_is_killed(dataset, manifest):
    """Within seconds: torch's own look after the parent comes every 5 s, and then waits for what nobody reads."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    config = DataConfig(directory=str(dataset), num_workers=2)
    rank = multiprocessing.get_context("fork").Process(target=read_one_step, args=(config, manifest, sender))
    rank.start()
    workers = receiver.recv()
    assert len(workers) == 2
    assert all(is_running(pid) for pid in workers)
    rank.kill()
    rank.join()
    deadline = time.monotonic() + 2
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """False for a process that has ended, whether or not somebody took note of it."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_a_dataset_that_does_not_fit_the_model_is_refused(manifest):
    check_dataset(manifest, VOCAB_SIZE, MAX_LENGTH, "shards")
    with pytest.raises(ConfigError, match=f"set model.vocab_size={VOCAB_SIZE}"):
        check_dataset(manifest, 30000, MAX_LENGTH, "shards")
    with pytest.raises(ConfigError, match="build shards with --max-seq-length 16"):
        check_dataset(manifest, VOCAB_SIZE, 16, "shards")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda d: (d / "train-00001.tar").unlink(), MissingInputError,
         "train-00001.tar: shard is missing, 1 of the manifest's 3 are; copy the dataset again"),
        (lambda d: [path.unlink() for path in d.glob("train-*.tar")], MissingInputError,
         "train-00000.tar: shard is missing, 2 of the manifest's 3 are; copy the dataset again"),
        (lambda d: _truncate(d / "eval-00000.tar"), DataError,
         " bytes, the manifest says {eval}; 1 of 3 shards have another size, copy the dataset again"),
        (lambda d: (d / "tokenizer" / "vocab.txt").open("a").write("\n"), DataError,
         "vocab.txt: is not the tokenizer that the manifest names; copy the dataset again"),
        (lambda d: (d / "tokenizer" / "vocab.txt").unlink(), MissingInputError,
         "vocab.txt: the dataset's tokenizer is missing; copy the dataset again"),
    ],
)  # fmt: skip
def test_files_that_differ_from_the_manifest_are_noticed_at_the_start(tmp_path, damage, kind, message):
    manifest = make_dataset(tmp_path / "shards")
    check_files(tmp_path / "shards", manifest)
    damage(tmp_path / "shards")
    with pytest.raises(kind) as caught:
        check_files(tmp_path / "shards", manifest)
    assert type(caught.value) is kind
    assert message.format(eval=manifest.split("eval")[0].bytes) in str(caught.value)


def test_a_batch_crosses_to_another_process_as_bytes(dataset, manifest):
    source = ExampleSource(str(dataset), manifest, "eval", cached_blocks=1)
    batch = source.batch(source.first_rows(3))
    message = ForkingPickler.dumps(batch)  # as torch's loader sends it; a shared tensor would be a few names
    ids = batch.sequences.input_ids
    assert ids.numpy().tobytes() in bytes(message)
    assert not ids.is_shared()
    received = ForkingPickler.loads(message)
    assert type(received) is type(batch)
    assert examples_of(received) == examples_of(batch)
    assert received.sequences.lengths == batch.sequences.lengths
    assert received.sequences.cu_seqlens.equal(batch.sequences.cu_seqlens)


def test_batches_move_as_a_whole(dataset, manifest):
    source = ExampleSource(str(dataset), manifest, "eval", cached_blocks=1)
    moved = source.batch(source.first_rows(3)).to(torch.device("meta"))
    assert moved.sequences.input_ids.is_meta
    assert moved.masked_lm_labels.is_meta
    assert isinstance(moved.sequences.lengths, tuple)


def remasked_steps(dataset: Path, manifest: Manifest, world_size: int, steps: int, first_step: int = 0):
    """Sorted examples of each step over all ranks."""
    found: list[list[tuple]] = [[] for _ in range(steps - first_step)]
    for rank in range(world_size):
        plan = BatchPlan(12, 12 // world_size, rank, world_size, num_steps=steps)
        config = DataConfig(directory=str(dataset), num_workers=0, num_lanes=1, remask=True)
        loader = TrainLoader(config, manifest, plan, seed=5)
        for index, micro_batches in enumerate(loader.steps(first_step, first_step * 12)):
            found[index] += [example for batch in micro_batches for example in examples_of(batch)]
    return [sorted(step) for step in found]


def original(example: tuple) -> tuple:
    """An example with its masks undone."""
    ids = list(example[0])
    for position, label in zip(example[2], example[3], strict=True):
        ids[position] = label
    return (tuple(ids), example[1], example[4])


def test_remasking_keeps_the_text_and_changes_the_masks_in_every_epoch(tmp_path):
    dataset = tmp_path / "shards"
    make_dataset(dataset, num_blocks=2, examples_per_block=9)  # 9 + 3 examples: one step is one epoch
    manifest = read_manifest(dataset)
    stored = expected_examples(dataset, manifest, "train")
    first, second = remasked_steps(dataset, manifest, 1, 2)
    for epoch in (first, second):
        assert sorted(map(original, epoch)) == sorted(map(original, stored))
        assert all(example[2] for example in epoch)
        assert not {2, 3} & {label for example in epoch for label in example[3]}
    assert first != second
    assert first != sorted(stored)


def test_remasking_is_a_function_of_seed_and_position(dataset, manifest):
    reference = remasked_steps(dataset, manifest, 1, 30)
    assert remasked_steps(dataset, manifest, 3, 30) == reference
    assert remasked_steps(dataset, manifest, 2, 30, first_step=26) == reference[26:]
