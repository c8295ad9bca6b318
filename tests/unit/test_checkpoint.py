"""Commit, verification, fallback and retention of checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from albert import checkpoint
from albert.distributed import close_world, init_world
from albert.errors import DataError, DiskError, MissingInputError
from tests.checkpoints import SHAPES, assert_holds, make_state, make_tensors
from tests.ranks import run_ranks


@contextlib.contextmanager
def joined_world():
    yield init_world("cpu", timeout_s=30)
    close_world()


def save_steps(directory: Path, steps: list[int], keep_last: int = 10, keep_every: int = 0) -> None:
    with joined_world() as world:
        for step in steps:
            save = checkpoint.Save(directory, make_state(step), make_tensors(step), SHAPES, world)
            save.commit({"config.json": b"{}"}, keep_last, keep_every)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_round_trip_and_retention(tmp_path, world_size):
    run_ranks(world_size, save_steps, tmp_path, [1, 2, 3, 4], 2)
    assert checkpoint.list_steps(tmp_path) == [3, 4]
    for step in (3, 4):
        assert_holds(tmp_path, step)
    assert (tmp_path / "latest").read_text() == "step-00000004\n"
    directory = checkpoint.find_latest(tmp_path)
    assert len(list(directory.glob("*.safetensors"))) == world_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_steps_to_keep_for_ever_stay(tmp_path):
    run_ranks(1, save_steps, tmp_path, [2, 3, 4, 5, 6, 7], 1, 3)
    assert checkpoint.list_steps(tmp_path) == [3, 6, 7]


def _save_on_a_full_disk(directory: Path) -> str:
    with joined_world() as world, pytest.MonkeyPatch.context() as patch:
        usage = shutil.disk_usage(directory)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        try:
            checkpoint.Save(directory, make_state(6), make_tensors(6), SHAPES, world)
        except DiskError as error:
            return str(error)
        return "saved"


def test_too_little_space_is_noticed_before_writing(tmp_path):
    first, _ = run_ranks(2, _save_on_a_full_disk, tmp_path)
    assert "cannot write the checkpoint (0 MiB are free, a checkpoint needs 0)" in first


def test_tensors_are_dealt_evenly():
    sizes = {f"t{i}": size for i, size in enumerate([100, 90, 80, 30, 20, 10, 10])}
    owners = checkpoint.deal_over_ranks(sizes, 3)
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 10
    assert owners == checkpoint.deal_over_ranks(dict(reversed(sizes.items())), 3)


def test_foreign_names_are_left_alone(tmp_path):
    for name in ("step-10-keep", "step-7", "notes", "step-00000009.tmp"):
        (tmp_path / name).mkdir()
    run_ranks(1, save_steps, tmp_path, [1, 2], 1)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["latest", "notes", "step-00000002", "step-10-keep", "step-7"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(2, save_steps, directory, [5])
    return checkpoint.find_latest(directory)


def test_every_flip_and_truncation_is_detected_and_named(saved):
    """2,000 damages, spread over all files of a checkpoint."""
    generator = np.random.default_rng(0)
    files = sorted(path for path in saved.iterdir() if path.is_file())
    sizes = np.array([path.stat().st_size for path in files], float)
    # Half of the damages go to small files, which bytes alone would rarely choose.
    chances = 0.5 * sizes / sizes.sum() + 0.5 / len(files)
    contents = [path.read_bytes() for path in files]
    for _ in range(2000):
        index = int(generator.choice(len(files), p=chances))
        data = bytearray(contents[index])
        place = int(generator.integers(len(data)))
        if generator.random() < 0.5:
            data[place] ^= 1 << int(generator.integers(8))
        else:
            del data[place:]
        files[index].write_bytes(data)
        try:
            with pytest.raises((DataError, MissingInputError), match=files[index].name):
                checkpoint.verify(saved)
        finally:
            files[index].write_bytes(contents[index])
    checkpoint.verify(saved)


def test_missing_files_and_manifests(saved, tmp_path):
    with pytest.raises(MissingInputError, match="not a committed checkpoint"):
        checkpoint.verify(tmp_path)
    with pytest.raises(MissingInputError, match="no committed checkpoint"):
        checkpoint.find_latest(tmp_path)
    manifest = json.loads((saved / "manifest.json").read_text())
    copy = tmp_path / "step-00000005"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    victim = next(copy.glob("*.safetensors"))
    victim.unlink()
    with pytest.raises(DataError, match=f"{victim.name}: the manifest names this file and it is missing"):
        checkpoint.verify(copy)
    manifest["format_version"] = 9
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="checkpoint format 9"):
        checkpoint.verify(copy)


def _save_without_space(directory: Path) -> str:
    with joined_world() as world:
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            checkpoint.Save(directory, make_state(6), make_tensors(6), SHAPES, world).commit({}, 10, 0)
        except DiskError as error:
            return str(error)
        return "saved"


def test_a_rank_that_cannot_write_fails_all_and_harms_nothing(tmp_path):
    run_ranks(2, save_steps, tmp_path, [5])
    first, second = run_ranks(2, _save_without_space, tmp_path)
    assert "another rank could not write the checkpoint; older ones are untouched" in first
    assert "cannot write the checkpoint (File too large); older ones are untouched" in second
    assert checkpoint.list_steps(tmp_path) == [5]
    assert_holds(tmp_path, 5)


def _load(directory: Path) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    with joined_world():
        loaded = checkpoint.load_newest(directory, warnings.append)
    return (loaded[0].step if loaded else None), warnings


def test_loading_falls_back_to_the_newest_that_verifies(tmp_path):
    assert run_ranks(1, _load, tmp_path) == [(None, [])]
    run_ranks(1, save_steps, tmp_path, [1, 2, 3])
    for step in (2, 3):
        victim = next(checkpoint.step_directory(tmp_path, step).glob("*.safetensors"))
        os.truncate(victim, victim.stat().st_size - 1)
    for step, warnings in run_ranks(2, _load, tmp_path):
        assert step == 1
        assert [("step-0000000" + str(n)) in text for n, text in zip((3, 2), warnings, strict=True)] == [
            True,
            True,
        ]
        assert "the file is torn" in warnings[0]
    (checkpoint.step_directory(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(AssertionError, match="none of 3 checkpoints verifies"):
        run_ranks(1, _load, tmp_path)
