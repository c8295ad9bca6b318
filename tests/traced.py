"""Ranks that save checkpoints, one of them under strace."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from albert import checkpoint
from albert.distributed import close_world, init_world
from albert.errors import DiskError
from tests.checkpoints import SHAPES, make_state, make_tensors
from tests.ranks import Ranks

KEEP_LAST = 1
"""The hardest case: the checkpoint before the newest one is gone as soon as the newest is committed."""
LINE = re.compile(r"(\d+) +(\w+)\((.*)")
PATH = re.compile(r'<(/[^>]*)>|"(/[^"]*)"')


def can_trace() -> bool:
    command = ["strace", "-qq", "-o", "/dev/null", "true"]
    return shutil.which("strace") is not None and subprocess.run(command, check=False).returncode == 0


needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is missing or may not trace here (ptrace)")


class Saves(NamedTuple):
    """What the ranks save."""

    before: tuple[int, ...]
    """Steps saved without faults."""
    steps: tuple[int, ...]


FRESH = Saves((), (1, 2, 3))
AGAIN = Saves((3,), (3,))
"""A finished run that is started again replaces its last checkpoint."""


def save_all(directory: Path, saves: Saves, ready: Any, go: Any, committed: Any) -> tuple[int, str]:
    """What a traced rank does; `committed` tells the test how far it came."""
    world = init_world("cpu", timeout_s=20)
    try:
        for index, step in enumerate((*saves.before, *saves.steps)):
            if index == len(saves.before):
                ready.release()
                go.wait()
            save = checkpoint.Save(directory, make_state(step), make_tensors(step), SHAPES, world)
            save.commit({"config.json": b"{}"}, KEEP_LAST, 0)
            if world.is_main:
                committed.value = step
    except DiskError as error:
        close_world()
        return error.exit_code, str(error)
    return 0, ""


class Traced:
    """Ranks that save, one of them under strace."""

    def __init__(
        self, directory: Path, saves: Saves, world_size: int, rank: int, options: Sequence[str], log: Path
    ) -> None:
        context = multiprocessing.get_context("fork")
        ready, go, self.committed = context.Semaphore(0), context.Event(), context.RawValue("i", 0)
        self.ranks = Ranks(world_size, save_all, directory, saves, ready, go, self.committed)
        assert all(ready.acquire(timeout=60) for _ in range(world_size))
        self.victim = self.ranks.processes[rank]
        self.log = log
        options = [option.replace("{pid}", str(self.victim.pid)) for option in options]
        command = ["strace", "-y", "-s", "0", "-o", self.log, *options, "-p", str(self.victim.pid)]
        self.strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = self.strace.stderr.readline()
        assert "attached" in line, line
        go.set()

    def end(self) -> None:
        self.ranks.kill()
        self.strace.communicate(timeout=20)
