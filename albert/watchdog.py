"""Ends a rank that no longer gets anywhere, and says which rank holds the others up, and where.

Every rank says what it does (`Watchdog.enter`). A thread repeats that to the other ranks as a heartbeat, through
the store by which they found each other. When the rank has been in one phase for too long, its thread compares
the heartbeats, prints where every rank is and the stacks of all threads, and ends the process with exit code 76.
`kill -QUIT PID` prints the stacks of a running rank at any time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

from albert.distributed import Heartbeats, World
from albert.errors import PeerLostError

STEP_PHASES = ("data", "count", "forward_backward", "update")
"""Of every step, in this order; evaluation and saving lie between steps."""

_FACTOR = 5
_KNOWN_AFTER = 5
_HISTORY = 512
_FAREWELL_S = 1.0


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    step: int
    phase: str

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}"


class Watchdog:
    """Watches the main thread of one rank."""

    def __init__(self, world: World, hang_timeout_s: float, slow_timeout_s: float) -> None:
        """Watch nothing yet; use it as a context.

        Args:
            world: the ranks.
            hang_timeout_s: shortest time after which a phase counts as hanging; 0 never ends the rank. A phase may
                take five times as long as the slowest of a hundred steps did.
            slow_timeout_s: the same for a phase whose usual time is not known yet.
        """
        self._world, self._hang_timeout_s, self._slow_timeout_s = world, hang_timeout_s, slow_timeout_s
        self._beats = Heartbeats(world) if hang_timeout_s else None
        self._place = Place(0, "start")
        self._entered_at = time.perf_counter()
        self._step_began_at = self._entered_at
        self._durations_s: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_HISTORY))
        self._steps_s: deque[float] = deque(maxlen=_HISTORY)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._interval_s = min(1.0, hang_timeout_s / 10)

    def __enter__(self) -> Self:
        if self._hang_timeout_s:
            with contextlib.suppress(ValueError, OSError):  # a stderr without a file, as some notebooks have
                faulthandler.register(signal.SIGQUIT, all_threads=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()

    def enter(self, phase: str, step: int) -> None:
        """Say what the main thread does from now on; a microsecond."""
        now = time.perf_counter()
        self._durations_s[self._place.phase].append(now - self._entered_at)
        if phase == STEP_PHASES[0]:
            if self._place.phase == STEP_PHASES[-1]:
                self._steps_s.append(now - self._step_began_at)
            self._step_began_at = now
        self._entered_at = now
        self._place = Place(step, phase)

    def allowed_s(self, phase: str) -> float:
        """How long a phase may take."""
        own = self._durations_s[phase]
        if len(own) < _KNOWN_AFTER or len(self._steps_s) < _KNOWN_AFTER:
            return max(self._slow_timeout_s, self._hang_timeout_s)
        return max(self._hang_timeout_s, _FACTOR * _p99(self._steps_s), _FACTOR * _p99(own))

    def _watch(self) -> None:
        """Measure on a clock that stands still while this process does: a suspended job is no hanging one."""
        clock_s = entered_s = 0.0
        seen, last = self._place, time.monotonic()
        heard: dict[int, tuple[str, float]] = {}
        while not self._is_over.wait(self._interval_s):
            now = time.monotonic()
            clock_s += min(now - last, 2 * self._interval_s)
            last = now
            place = self._place
            if place is not seen:
                seen, entered_s = place, clock_s
            self._beat(place, clock_s)
            allowed_s = self.allowed_s(place.phase)
            if clock_s - entered_s > allowed_s / 2:
                self._listen(heard, clock_s)
            if clock_s - entered_s > allowed_s:
                self._end(place, clock_s - entered_s, heard, clock_s)

    def _beat(self, place: Place, clock_s: float) -> None:
        if self._beats:
            content = [place.step, place.phase, socket.gethostname(), clock_s]
            self._beats.send(json.dumps(content))

    def _listen(self, heard: dict[int, tuple[str, float]], clock_s: float) -> None:
        """Note for every rank its last heartbeat, and when it changed."""
        for rank, beat in (self._beats.receive() if self._beats else {}).items():
            if rank not in heard or heard[rank][0] != beat:
                heard[rank] = (beat, clock_s)

    def _end(
        self, place: Place, elapsed_s: float, heard: Mapping[int, tuple[str, float]], clock_s: float
    ) -> NoReturn:
        """Print where every rank is and every stack of this one, and end the process."""
        silent = {
            rank
            for rank, (_, at) in heard.items()
            if rank != self._world.rank and clock_s - at > 3 * self._interval_s
        }
        beats = {rank: json.loads(beat) for rank, (beat, _) in heard.items()}
        places = {rank: (Place(step, phase), host) for rank, (step, phase, host, _) in beats.items()}
        places[self._world.rank] = (place, socket.gethostname())
        missing = sorted(set(range(self._world.size)) - places.keys())
        reason = describe_hang(places, silent, missing)
        prefix = f"[rank {self._world.rank}] " if self._world.rank else ""
        text = (
            f"{prefix}error: {place} has taken {elapsed_s:.1f} s, {self.allowed_s(place.phase):.1f} s are allowed "
            f"(train.hang_timeout_s); {reason}; give the same command again to go on from the last checkpoint\n"
        )
        # In one piece: the other ranks write theirs at the same time.
        sys.stderr.write(text + _all_stacks())
        sys.stderr.flush()
        if self._world.is_main:
            time.sleep(_FAREWELL_S)  # the other ranks read the heartbeats from here
        os._exit(PeerLostError.exit_code)


def _all_stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def describe_hang(
    places: Mapping[int, tuple[Place, str]], silent: Sequence[int] | set[int], missing: Sequence[int]
) -> str:
    """Who holds the others up, as far as their heartbeats tell.

    Args:
        places: rank -> where it was when last heard of, and its host.
        silent: ranks whose heartbeat stopped.
        missing: ranks that could not be asked.
    """
    parts = [
        f"rank {rank} on {places[rank][1]} is silent since {places[rank][0]}: stopped, or its host is lost"
        for rank in sorted(silent)
    ]
    if missing:
        parts.append(f"rank {_ranges(missing)} cannot be asked")
    groups: dict[Place, list[int]] = defaultdict(list)
    for rank, (place, _) in sorted(places.items()):
        if rank not in silent:
            groups[place].append(rank)
    if len(groups) == 1 and not parts:
        return f"all ranks are in {next(iter(groups))}: what they wait for together does not come"
    for place in sorted(groups, key=_order):
        ranks = groups[place]
        parts.append(f"rank {_ranges(ranks)} {'is' if len(ranks) == 1 else 'are'} in {place}")
    return "; ".join(parts)


def _order(place: Place) -> tuple[int, int]:
    within = STEP_PHASES.index(place.phase) if place.phase in STEP_PHASES else -1
    return place.step, within


def _ranges(ranks: Sequence[int]) -> str:
    """`0-3, 7`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _p99(durations_s: Sequence[float]) -> float:
    ordered = sorted(durations_s)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
