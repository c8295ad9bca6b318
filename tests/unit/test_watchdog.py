"""What the watchdog allows, and how it tells who holds the others up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from albert.distributed import World
from albert.watchdog import STEP_PHASES, Place, Watchdog, describe_hang

ALONE = World(0, 1, 0, torch.device("cpu"))


def known(watchdog: Watchdog, num_steps: int = 10) -> Watchdog:
    for step in range(num_steps):
        for phase in STEP_PHASES:
            watchdog.enter(phase, step)
    return watchdog


def test_a_phase_is_known_after_some_steps():
    watchdog = Watchdog(ALONE, 10.0, 600.0)
    assert watchdog.allowed_s("update") == 600
    known(watchdog, 3)
    assert watchdog.allowed_s("update") == 600
    known(watchdog)
    assert watchdog.allowed_s("update") == 10
    assert watchdog.allowed_s("evaluate") == 600
    assert watchdog.allowed_s("commit") == 600


def test_slow_steps_are_allowed_five_times_their_usual_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watchdog = Watchdog(ALONE, 10.0, 60.0)
    for step in range(200):
        for phase in STEP_PHASES:
            watchdog.enter(phase, step)
            now[0] += 30.0 if phase == "forward_backward" else 1.0
    assert watchdog.allowed_s("data") == 5 * 33  # a rank may wait for another's whole step
    assert watchdog.allowed_s("forward_backward") == 5 * 33


def test_phases_named_slow_may_take_long():
    watchdog = known(Watchdog(ALONE, 10.0, 600.0, slow_phases=("data",)))
    assert watchdog.allowed_s("data") == 600
    assert watchdog.allowed_s("count") == 10


class CountingStore(torch.distributed.HashStore):
    """A store that all ranks share, with the number of questions for all heartbeats."""

    num_questions = 0

    def clone(self):
        return self

    def multi_get(self, keys):
        CountingStore.num_questions += 1
        return [b'[1, "save", "a", 1, 0.0]'] * len(keys)


@pytest.mark.parametrize(("size", "expected"), [(2, 30), (64, 30), (640, 3)])
def test_more_ranks_ask_less_often_or_the_store_drowns(size, expected, monkeypatch):
    monkeypatch.setattr(CountingStore, "num_questions", 0)
    watchdog = Watchdog(World(0, size, 0, torch.device("cpu"), CountingStore()), 0.01, 60.0)
    beats = iter([False] * 30 + [True])
    monkeypatch.setattr(watchdog._is_over, "wait", lambda _: next(beats))
    watchdog._is_listening = True
    watchdog._exchange()
    assert CountingStore.num_questions == expected


_WATCHED = """
import hashlib, time, torch
from albert.distributed import World
from albert.watchdog import STEP_PHASES, Watchdog
block = bytes(30_000_000)
with Watchdog(World(0, 1, 0, torch.device("cpu")), 1.0, 1.0) as watchdog:
    for step in range(10):
        for phase in STEP_PHASES:
            watchdog.enter(phase, step)
    watchdog.enter("forward_backward", 10)
    print("ready", flush=True)
    input()
    {work}
    print("done", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's scheduling statistics")
@pytest.mark.parametrize(
    ("work", "said", "code"), [("hashlib.blake2b(block)", b"done\n", 0), ("time.sleep(30)", b"", 76)]
)
def test_a_rank_that_others_keep_from_running_does_not_hang(work, said, code):
    """It shares one core with a process that gets 68 times as much of it: work of 0.03 s takes seconds."""
    core = {min(os.sched_getaffinity(0))}
    spin = f"import os, time; os.sched_setaffinity(0, {core}); print(flush=True)\nwhile True: pass"
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _WATCHED.format(work=work)]
    with (
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as watched,
        subprocess.Popen([sys.executable, "-c", spin], stdout=pipe) as other,
    ):
        try:
            assert watched.stdout.readline() == b"ready\n"
            assert other.stdout.readline() == b"\n"
            os.sched_setaffinity(watched.pid, core)
            os.setpriority(os.PRIO_PROCESS, watched.pid, 19)
            began = time.monotonic()
            watched.stdin.write(b"\n")
            watched.stdin.flush()
            assert watched.stdout.readline() == said
            elapsed_s = time.monotonic() - began
            other.kill()
            _, errors = watched.communicate(timeout=60)
        finally:
            other.kill()
            watched.kill()
    assert watched.returncode == code, errors.decode()
    assert elapsed_s > 1


def place(step: int, phase: str, host: str = "a") -> tuple[Place, str]:
    return Place(step, phase), host


@pytest.mark.parametrize(
    ("places", "silent", "missing", "expected"),
    [
        (
            {0: place(7, "count"), 1: place(7, "forward_backward", "b"), 2: place(7, "count")},
            {1},
            [],
            "rank 1 on b is silent since forward_backward of step 7: stopped, or its host is lost; "
            "rank 0, 2 are in count of step 7",
        ),
        (
            {0: place(7, "count"), 1: place(7, "data"), 2: place(7, "count"), 3: place(7, "count")},
            set(),
            [],
            "rank 1 is in data of step 7; rank 0, 2-3 are in count of step 7",
        ),
        (
            {0: place(8, "count"), 1: place(7, "update")},
            set(),
            [],
            "rank 1 is in update of step 7; rank 0 is in count of step 8",
        ),
        (
            {0: place(7, "update"), 1: place(7, "update")},
            set(),
            [],
            "all ranks are in update of step 7: what they wait for together does not come",
        ),
        ({1: place(7, "count")}, set(), [0, 2], "rank 0, 2 cannot be asked; rank 1 is in count of step 7"),
    ],
)
def test_who_holds_the_others_up(places, silent, missing, expected):
    assert describe_hang(places, silent, missing) == expected
