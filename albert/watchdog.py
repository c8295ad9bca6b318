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
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from albert.distributed import Heartbeats, World
from albert.errors import PeerLostError

STEP_PHASES = ("data", "count", "forward_backward", "update")
"""Of every step, in this order; evaluation and saving lie between steps."""

SLOW_PHASES = ("start", "save", "commit", "rewind")
"""These wait for a disk."""

_FACTOR = 5
_KNOWN_AFTER = 5
_HISTORY = 512
_SILENT_AFTER = 4
_RANKS_HEARD_PER_BEAT = 64
"""Every rank that waits asks for all the others, so the store answers the square of their number in each round."""
_FAREWELL_S = 1.0
_STATE, _SCHEDULING = Path("/proc/self/stat"), Path("/proc/self/schedstat")
"""Of the main thread: after its name in parentheses, R where it runs or could; nanoseconds on a processor."""


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    step: int
    phase: str

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}"


class Watchdog:
    """Watches the main thread of one rank."""

    def __init__(
        self,
        world: World,
        hang_timeout_s: float,
        slow_timeout_s: float,
        slow_phases: Collection[str] = SLOW_PHASES,
        setting: str = "train.hang_timeout_s",
    ) -> None:
        """Watch nothing yet; use it as a context.

        Args:
            world: the ranks.
            hang_timeout_s: shortest time after which a phase counts as hanging; 0 never ends the rank. A phase may
                take five times as long as the slowest of a hundred steps did.
            slow_timeout_s: the same for a phase whose usual time is not known yet, and for slow ones.
            slow_phases: those that may take long now and then, as disks and networks do.
            setting: what people call `hang_timeout_s`.
        """
        self._world, self._hang_timeout_s, self._slow_timeout_s = world, hang_timeout_s, slow_timeout_s
        self._slow_phases, self._setting = frozenset(slow_phases), setting
        self._place = Place(0, "start")
        self._entered_at = time.perf_counter()
        self._step_began_at = self._entered_at
        self._durations_s: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_HISTORY))
        self._steps_s: deque[float] = deque(maxlen=_HISTORY)
        self._is_over = threading.Event()
        self._clock_s = 0.0
        self._starved_s = 0.0
        """How long the main thread has waited for a processor in its present place."""
        self._is_listening = False
        self._heard: dict[int, tuple[str, int]] = {}
        """Rank -> its newest heartbeat, and for how many of this rank's beats it has been the same."""
        self._num_exchanges = 0
        """Since this rank listens."""
        self._interval_s = min(1.0, hang_timeout_s / 10)
        self._beats_per_round = math.ceil(world.size / _RANKS_HEARD_PER_BEAT)
        self._beats = Heartbeats(world, self._interval_s) if hang_timeout_s else None

    def __enter__(self) -> Self:
        if self._hang_timeout_s:
            with contextlib.suppress(ValueError, OSError):  # a stderr without a file, as some notebooks have
                faulthandler.register(signal.SIGQUIT, all_threads=True)
            # Two, because the exchange may wait for ever for a host that is lost.
            for action in (self._watch, self._exchange):
                threading.Thread(target=action, name=f"watchdog{action.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()

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

    def hang_limit_s(self) -> float:
        """How long a step's phase may take, and any phase while another rank is silent."""
        if len(self._steps_s) < _KNOWN_AFTER:
            return max(self._slow_timeout_s, self._hang_timeout_s)
        return max(self._hang_timeout_s, _FACTOR * _p99(self._steps_s))

    def allowed_s(self, phase: str) -> float:
        """How long a phase may take while all ranks are heard of."""
        own = self._durations_s[phase]
        if phase in self._slow_phases or len(own) < _KNOWN_AFTER:
            return max(self._slow_timeout_s, self.hang_limit_s())
        return max(self.hang_limit_s(), _FACTOR * _p99(own))

    def _watch(self) -> None:
        """Measure on a clock that stands still while this process may not run: stopped or starved is not hanging."""
        entered_s, seen, last, last_run_s = 0.0, self._place, time.monotonic(), _run_s()
        while not self._is_over.wait(self._interval_s):
            now, run_s = time.monotonic(), _run_s()
            passed_s = min(now - last, 2 * self._interval_s)
            counted_s = min(passed_s, run_s - last_run_s) if _could_run() else passed_s
            last, last_run_s = now, run_s
            self._clock_s += counted_s
            self._starved_s += passed_s - counted_s
            if self._place is not seen:
                seen, entered_s, self._starved_s = self._place, self._clock_s, 0.0
            elapsed_s, limit_s = self._clock_s - entered_s, self.hang_limit_s()
            self._is_listening = elapsed_s > limit_s / 2
            if elapsed_s > limit_s:
                self._judge(seen, elapsed_s, limit_s)

    def _judge(self, place: Place, elapsed_s: float, limit_s: float) -> None:
        """End the rank unless somebody who is alive may need the time."""
        heard = dict(self._heard)
        silent = {rank for rank, (_, times) in heard.items() if times >= _SILENT_AFTER} - {self._world.rank}
        if not silent:
            others = [json.loads(beat) for rank, (beat, _) in heard.items() if rank != self._world.rank]
            limit_s = max(map(self.allowed_s, (place.phase, *(phase for _, phase, *_ in others))))
            limit_s += max((starved_s for *_, starved_s in others), default=0.0)
            if self._num_exchanges <= math.ceil(_SILENT_AFTER / self._beats_per_round):
                # Wait until it is clear who is silent, if the others can be asked at all.
                limit_s += 2 * max(_SILENT_AFTER, self._beats_per_round) * self._interval_s
        if elapsed_s > limit_s:
            self._end(place, elapsed_s, limit_s, {rank: beat for rank, (beat, _) in heard.items()}, silent)

    def _exchange(self) -> None:
        """Tell the other ranks where this one is and, when something takes long, hear where they are."""
        num_beats = 0
        while self._beats and not self._is_over.wait(self._interval_s):
            num_beats += 1
            place = self._place
            starved_s = round(self._starved_s, 1)
            self._beats.send(
                json.dumps([place.step, place.phase, socket.gethostname(), num_beats, starved_s])
            )
            if not self._is_listening:
                self._heard, self._num_exchanges = {}, 0
                continue
            if num_beats % self._beats_per_round:
                continue
            for rank, beat in self._beats.receive().items():
                last, times = self._heard.get(rank, ("", 0))
                self._heard[rank] = (beat, times + self._beats_per_round if beat == last else 0)
            self._num_exchanges += 1

    def _end(
        self,
        place: Place,
        elapsed_s: float,
        allowed_s: float,
        beats: Mapping[int, str],
        silent: set[int],
    ) -> NoReturn:
        """Print where every rank is and every stack of this one, and end the process."""
        told = {rank: json.loads(beat) for rank, beat in beats.items()}
        places = {rank: (Place(step, phase), host) for rank, (step, phase, host, *_) in told.items()}
        places[self._world.rank] = (place, socket.gethostname())
        missing = sorted(set(range(self._world.size)) - places.keys())
        reason = describe_hang(places, silent, missing)
        prefix = f"[rank {self._world.rank}] " if self._world.rank else ""
        text = (
            f"{prefix}error: {place} has taken {elapsed_s:.1f} s, {allowed_s:.1f} s are allowed "
            f"({self._setting}); {reason}; give the same command again to go on from the last checkpoint\n"
        )
        # In one piece: the other ranks write theirs at the same time.
        sys.stderr.write(text + _all_stacks())
        sys.stderr.flush()
        if self._world.is_main:
            time.sleep(_FAREWELL_S)  # the other ranks read the heartbeats from here
        os._exit(PeerLostError.exit_code)


def _could_run() -> bool:
    """Whether the main thread waits for nothing but a processor, if for that; False where the system does not say."""
    try:
        return _SCHEDULING.exists() and _STATE.read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False


def _run_s() -> float:
    """Time of the main thread on a processor; 0 where the system does not say."""
    try:
        return int(_SCHEDULING.read_text().split()[0]) / 1e9
    except OSError:
        return 0.0


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
