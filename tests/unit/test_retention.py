"""Which checkpoints stay: random histories, names of other people, links; and a pointer that says anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from albert import checkpoint
from albert.distributed import close_world, init_world
from albert.errors import DiskError
from tests.checkpoints import SHAPES, assert_holds, make_state, make_tensors
from tests.ranks import run_ranks


def commit_unwritten(directory: Path, step: int, keep_last: int, keep_every: int) -> None:
    """What retention sees of a commit, without tensors."""
    checkpoint.step_directory(directory, step).mkdir(exist_ok=True)
    checkpoint._remove_old(directory, step, keep_last, keep_every)


def test_a_thousand_random_histories_keep_exactly_what_they_should(tmp_path):
    """Runs that commit, and sometimes go on from an older checkpoint because those after it do not verify."""
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        directory = tmp_path / str(seed)
        directory.mkdir()
        foreign = {"step-10-keep", "step-7", "step-00000001.bak", "notes"}
        for name in foreign:
            (directory / name).mkdir()
        keep_last, keep_every = int(generator.integers(1, 4)), int(generator.choice([0, 3, 4]))
        expected: set[int] = set()
        step = 0
        for _ in range(6):
            step += int(generator.integers(1, 4))
            commit_unwritten(directory, step, keep_last, keep_every)
            going_on = sorted({at for at in expected if at < step} | {step})
            expected = {at for at in going_on if keep_every and at % keep_every == 0} | {
                *going_on[-keep_last:]
            }
            assert checkpoint.list_steps(directory) == sorted(expected), f"seed {seed}, step {step}"
            if generator.random() < 0.3:
                step = int(generator.choice(sorted(expected)))
        left = {path.name for path in directory.iterdir()}
        assert left == foreign | {checkpoint.step_directory(directory, at).name for at in expected}


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "manifest.json").write_text("{}")
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / "step-00000001").symlink_to(elsewhere)
    (directory / "step-00000002.tmp").symlink_to(elsewhere)
    (directory / "step-00000003").write_text("a file")
    commit_unwritten(directory, 4, keep_last=1, keep_every=0)
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000003", "step-00000004"]
    assert (elsewhere / "manifest.json").read_text() == "{}"


def save_and_load(directory: Path, steps: list[int]) -> int:
    """Save and start anew; returns the step that the start finds."""
    world = init_world("cpu", timeout_s=30)
    try:
        for step in steps:
            save = checkpoint.Save(directory, make_state(step), make_tensors(step), SHAPES, world)
            save.commit({}, keep_last=2, keep_every=0)
        checkpoint.remove_leftovers(directory, world)
        return checkpoint.load_newest(directory, pytest.fail)[0].step
    finally:
        close_world()


POINTERS = {
    "empty": b"",
    "garbage": b"\x00\xff\n\n",
    "outside": b"../../etc\n",
    "absolute": b"/etc/passwd\n",
    "older": b"step-00000001\n",
    "newer": b"step-00000009\n",
    "temporary": b"step-00000009.tmp\n",
    "long": b"x" * 100_000,
    "absent": None,
}


@pytest.mark.parametrize("content", POINTERS.values(), ids=POINTERS)
def test_a_wrong_pointer_changes_nothing_and_is_mended(tmp_path, content):
    assert run_ranks(1, save_and_load, tmp_path, [1, 2]) == [2]
    pointer = tmp_path / "latest"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert checkpoint.find_latest(tmp_path).name == "step-00000002"
    assert run_ranks(1, save_and_load, tmp_path, []) == [2]
    assert run_ranks(1, save_and_load, tmp_path, [3]) == [3]
    assert pointer.read_text() == "step-00000003\n"
    assert_holds(tmp_path, 2)
    assert_holds(tmp_path, 3)


def test_a_pointer_that_is_a_link_is_replaced_and_its_target_stays(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / "latest").symlink_to(target)
    assert run_ranks(1, save_and_load, directory, [1]) == [1]
    assert (directory / "latest").read_text() == "step-00000001\n"
    assert target.read_text() == "mine"


def _explain(directory: Path, steps: list[int]) -> str:
    with pytest.raises(DiskError) as problem:
        save_and_load(directory, steps)
    return str(problem.value)


def test_a_pointer_that_is_a_directory_is_named_and_loses_nothing(tmp_path):
    (tmp_path / "latest").mkdir()
    (message,) = run_ranks(1, _explain, tmp_path, [2])
    assert "cannot write the checkpoint (Is a directory)" in message
    assert "latest" in message
    assert run_ranks(1, save_and_load, tmp_path, []) == [2]


def test_an_old_checkpoint_that_cannot_be_removed_ends_all_ranks_after_the_commit(tmp_path):
    assert run_ranks(2, save_and_load, tmp_path, [1, 2]) == [2, 2]
    (tmp_path / "step-00000001.tmp" / "in-the-way").mkdir(parents=True)
    first, second = run_ranks(2, _explain, tmp_path, [3])
    assert (
        "step-00000001: cannot remove old checkpoints (Directory not empty); newer ones are untouched"
        in first
    )
    assert "another rank could not remove old checkpoints; newer ones are untouched" in second
    assert run_ranks(1, save_and_load, tmp_path, []) == [3]


def test_damaged_checkpoints_do_not_displace_good_ones(tmp_path):
    """The run goes on from an older checkpoint; what it commits then is what it finds again."""
    assert run_ranks(1, save_and_load, tmp_path, [1, 8, 9]) == [9]
    for step in (8, 9):
        (checkpoint.step_directory(tmp_path, step) / "manifest.json").write_text("torn")
    assert run_ranks(1, save_and_load, tmp_path, [2]) == [2]
    assert checkpoint.list_steps(tmp_path) == [2]
