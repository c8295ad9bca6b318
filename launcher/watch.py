"""Watches the ranks of a job: passes signals on, waits as long as a commit takes, leaves no process behind."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from albert.errors import PeerLostError, PreemptedError
from launcher.outcome import Outcome, RankEnd, job_outcome, signal_name
from launcher.process import kill_session, send
from launcher.records import read_ends, read_records

PEER_GRACE_S = 10.0
"""How long the other ranks may go on once one has failed; they notice a lost peer by themselves."""
STACKS_S = 1.0
"""How long ranks that are to be killed may take to print their stacks."""
KILL_S = 15.0
"""How long killed ranks may take to be recorded; one on a host that has vanished never is."""
KILLING_INTERRUPTS = 3
"""So many times Ctrl-C kills the ranks instead of waiting for their checkpoint."""

_POLL_S = 0.1


class Reach(Protocol):
    """A way to the ranks."""

    def pass_on(self, asked: Sequence[int]) -> None:
        """Send each rank the signals it has not had; called again and again, as ranks may start late."""

    def kill(self) -> set[int]:
        """SIGKILL the ranks; returns those that were killed."""


class LocalReach:
    """Ranks on this machine, signalled by pid."""

    def __init__(self, directory: Path, num_ranks: int) -> None:
        self._directory = directory
        self._num_ranks = num_ranks
        self._told: dict[int, int] = {}
        self._asked_for_stacks_at: float | None = None

    def pass_on(self, asked: Sequence[int]) -> None:
        """Signal the parent of each rank, which passes it on."""
        if sum(self._told.values()) == self._num_ranks * len(asked):
            return
        for rank, record in read_records(self._directory, "started").items():
            for number in asked[self._told.get(rank, 0) :]:
                # A terminal that went away asks for the same as SIGTERM.
                send(record["pid"], record["started"], signal.SIGTERM if number == signal.SIGHUP else number)
            self._told[rank] = len(asked)

    def kill(self) -> set[int]:
        """Kill the ranks themselves, a moment after they were asked to print where they are (`albert.watchdog`)."""
        if self._asked_for_stacks_at is None:
            self._asked_for_stacks_at = time.monotonic()
            asked = self._send(signal.SIGQUIT)
            self._send(signal.SIGCONT)  # a stopped one could not
            return asked  # which ends programs that do not know it
        if time.monotonic() - self._asked_for_stacks_at < STACKS_S:
            return set()
        return self._send(signal.SIGKILL)

    def _send(self, number: int) -> set[int]:
        started = read_records(self._directory, "started")
        return {
            rank for rank, record in started.items() if send(record["child"], record["child_started"], number)
        }


class RankWatch:
    """The ranks of one job, known through the records in a directory."""

    def __init__(self, directory: Path, num_ranks: int, held: set[signal.Signals], reach: Reach) -> None:
        """Watch.

        Args:
            directory: where the ranks leave their records.
            num_ranks: of the job.
            held: signals that are blocked, and taken here.
            reach: the way to the ranks.
        """
        self._directory = directory
        self._num_ranks = num_ranks
        self._held = held
        self._reach = reach
        self._killed: set[int] = set()
        self._failed_at: float | None = None
        self._killed_at: float | None = None
        self.asked: list[int] = []
        """Signals that came so far."""

    def wait(self, starter: subprocess.Popen[bytes], settle_s: float = 0.0) -> Outcome:
        """Wait until every rank has ended and nothing of the job is left on this machine.

        Args:
            starter: the process that starts the ranks, leader of its own session.
            settle_s: how long records may take to be seen once the starter has ended.
        """
        while starter.poll() is None and len(read_ends(self._directory)) < self._num_ranks:
            self._take_signal()
            if self.asked:
                self._reach.pass_on(self.asked)
            if self._is_over():
                self._killed |= self._reach.kill()
                self._killed_at = self._killed_at or time.monotonic()
                if time.monotonic() - self._killed_at > KILL_S:
                    break  # a host that has vanished records nothing
        with contextlib.suppress(subprocess.TimeoutExpired):
            starter.wait(timeout=5)
        kill_session(starter.pid)
        starter.wait()
        deadline = time.monotonic() + settle_s
        while len(ends := self.ends()) < self._num_ranks and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not ends and not self.asked:
            # Killed, as by a kernel that is short of memory, it takes its ranks along; otherwise it could not start.
            code = PeerLostError.exit_code if starter.returncode < 0 else 1
            return Outcome(
                code, f"what starts the ranks ended with {starter.returncode} before any rank had ended"
            )
        if not ends:
            ends = [RankEnd(0, "this machine", -self.asked[0], 0.0, tuple(self.asked))]
            return job_outcome(ends, 1)
        return job_outcome(ends, self._num_ranks)

    def ends(self) -> list[RankEnd]:
        """How ranks ended, as far as they have; those killed from here are marked so."""
        killed = (int(signal.SIGKILL),)
        return [
            replace(end, sent=end.sent + killed) if end.rank in self._killed else end
            for end in read_ends(self._directory)
        ]

    def _take_signal(self) -> None:
        received = signal.sigtimedwait(self._held, _POLL_S)
        if received is None or received.si_signo == signal.SIGCHLD:
            return
        number = received.si_signo
        self.asked.append(number)
        interrupts = self.asked.count(signal.SIGINT)
        text = "waiting for the ranks to stop"
        if interrupts >= KILLING_INTERRUPTS:
            text = "killing the ranks"
        elif number == signal.SIGINT:
            text += f"; Ctrl-C {KILLING_INTERRUPTS - interrupts} more times kills them"
        sys.stderr.write(f"launcher: {signal_name(number)} received, {text}\n")

    def _is_over(self) -> bool:
        """Whether waiting has no more point: a rank has failed some time ago, or the user insists."""
        if self.asked.count(signal.SIGINT) >= KILLING_INTERRUPTS:
            return True
        well = (0, PreemptedError.exit_code)
        if self._failed_at is None and any(end.code not in well for end in read_ends(self._directory)):
            self._failed_at = time.monotonic()
        return self._failed_at is not None and time.monotonic() - self._failed_at > PEER_GRACE_S
