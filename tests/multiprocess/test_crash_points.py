"""Crashes and disk errors at every system call of saves, commits, the pointer and retention, injected by strace.

The calls are listed in a run without faults; then one run each is killed before, or gets ENOSPC or EIO from, the
n-th call of a kind on a path by a thread. `-P` makes strace count only the calls on that path.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from albert import checkpoint
from albert.distributed import close_world, init_world
from albert.errors import DataError, DiskError
from tests.checkpoints import assert_holds
from tests.ranks import run_ranks
from tests.traced import AGAIN, FRESH, LINE, PATH, Saves, Traced, needs_strace

FAULTS = {"kill": "signal=KILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}
NEEDING_SPACE = {"openat", "mkdir", "write", "fsync", "close", "rename"}
NOT_FAILING = {"fcntl", "ioctl", "lseek"}
"""Calls that do not reach the disk."""
pytestmark = [pytest.mark.multiprocess, needs_strace]


@dataclass(frozen=True)
class Point:
    """The n-th call of a kind on a path by a thread of one of the ranks."""

    saves: Saves
    world_size: int
    rank: int
    is_writer: bool
    """By the thread that writes the rank's file, else by the main thread."""
    call: str
    path: str
    """With {directory} and {pid} of the traced rank left open."""
    nth: int


def list_points(directory: Path, saves: Saves, world_size: int, rank: int) -> list[Point]:
    """Every call of a rank on a path below the directory, in a run without faults."""
    traced = Traced(
        directory,
        saves,
        world_size,
        rank,
        ["-f", "-e", "trace=%file,%desc"],
        directory.with_suffix(".strace"),
    )
    assert set(traced.ranks.results()) == {(0, "")}
    traced.end()
    seen: Counter[tuple[int, str, str]] = Counter()
    points = {}
    for thread, call, arguments in LINE.findall(traced.log.read_text()):
        # strace looks at the first path of a call only.
        path = next(
            (one or other for one, other in PATH.findall(arguments) if str(directory) in one + other), None
        )
        if path:
            seen[thread, call, path] += 1
            name = path.replace(str(directory), "{directory}").replace(f"-{traced.victim.pid}", "-{pid}")
            is_writer = int(thread) != traced.victim.pid
            points[Point(saves, world_size, rank, is_writer, call, name, seen[thread, call, path])] = None
    return list(points)


def strike(directory: Path, point: Point, fault: str) -> int:
    """Save under one fault; returns the last step whose commit the main rank had reported."""
    inject = f"inject={point.call}:{FAULTS[fault]}:when={point.nth}"
    path = point.path.format(directory=directory, pid="{pid}")
    options = ["-P", path, "-e", f"trace={point.call}", "-e", inject, *(["-f"] if point.is_writer else [])]
    traced = Traced(
        directory, point.saves, point.world_size, point.rank, options, directory.with_suffix(".strace")
    )
    if fault == "kill":
        traced.victim.join(20)
        traced.end()
        assert traced.victim.exitcode == -9, "not killed"
    else:
        outcomes = traced.ranks.results()
        traced.end()
        assert "(INJECTED)" in traced.log.read_text()
        assert_explained(outcomes, directory)
    return traced.committed.value


def assert_explained(outcomes: list[tuple[int, str]], directory: Path) -> None:
    """All ranks end with 74 and name the place, or the call did not matter and all went on to the end."""
    assert len({code for code, _ in outcomes}) == 1, outcomes
    for code, message in outcomes:
        assert code in (0, DiskError.exit_code)
        assert (str(directory) in message) == (code != 0), message


class Found(NamedTuple):
    """What the next start finds in a directory."""

    step: int
    warnings: list[str]
    names: list[str]


def restart(directories: list[Path]) -> list[Found]:
    """Start in each directory."""
    world = init_world("cpu", timeout_s=20)
    found = []
    for directory in directories:
        warnings: list[str] = []
        loaded = None
        try:
            checkpoint.remove_leftovers(directory, world)
            loaded = checkpoint.load_newest(directory, warnings.append)
        except DataError as error:
            warnings.append(str(error))
        names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        found.append(Found(loaded[0].step if loaded else 0, warnings, names))
    close_world()
    return found


def check(directory: Path, committed: int, found: Found) -> None:
    """Nothing committed is lost, what is there holds bit for bit, and nothing else is left."""
    assert found.step >= committed, f"step {committed} was committed, the next start found {found.step}"
    assert found.warnings == []
    steps = checkpoint.list_steps(directory)
    for each in steps:
        assert_holds(directory, each)
    known = {checkpoint.step_directory(directory, each).name for each in steps}
    assert set(found.names) <= known | {"latest"}, found.names
    if "latest" in found.names:
        assert (directory / "latest").read_text().strip() in known


def strike_all(tmp_path: Path, strikes: list[tuple[Point, str]]) -> None:
    directories = [tmp_path / f"{index:04d}" for index in range(len(strikes))]
    problems, committed = [], []
    for directory, (point, fault) in zip(directories, strikes, strict=True):
        try:
            committed.append(strike(directory, point, fault))
        except AssertionError as error:
            committed.append(0)
            problems.append(f"{fault} at {point}: {error}")
    (found,) = run_ranks(1, restart, directories)
    for index, (point, fault) in enumerate(strikes):
        try:
            check(directories[index], committed[index], found[index])
        except AssertionError as error:
            problems.append(f"{fault} at {point}: {error}")
    assert not problems, f"{len(problems)} problems at {len(strikes)} crash points:\n" + "\n".join(problems)


def all_strikes(tmp_path: Path, saves: Saves, world_size: int, rank: int) -> list[tuple[Point, str]]:
    points = list_points(tmp_path / "listed", saves, world_size, rank)
    return [
        *((point, "kill") for point in points),
        *((point, "EIO") for point in points if point.call not in NOT_FAILING),
        *((point, "ENOSPC") for point in points if point.call in NEEDING_SPACE),
    ]


CASES = [(FRESH, 1, 0), (AGAIN, 1, 0), (FRESH, 2, 0), (FRESH, 2, 1)]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("saves", "world_size", "rank"), CASES, ids=["fresh", "again", "rank0of2", "rank1of2"]
)
def test_no_commit_is_lost(tmp_path, saves, world_size, rank, request):
    strikes = all_strikes(tmp_path, saves, world_size, rank)
    # Of the hundreds of points of each case; --slow strikes at all of them.
    spread = 1 if request.config.getoption("--slow") else len(strikes) // 15
    print(f"{len(strikes[::spread])} of {len(strikes)} crash points")
    strike_all(tmp_path, strikes[::spread])
