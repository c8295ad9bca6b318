"""Watches the ranks of a job on this machine: passes signals on, waits, and leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from albert.errors import PreemptedError
from launcher.outcome import Outcome, RankEnd, job_outcome, signal_name
from launcher.process import kill_session, send, signals_held

PEER_GRACE_S = 30.0
"""How long the other ranks may go on once one has failed; they notice a lost peer by themselves."""
KILLING_INTERRUPTS = 3
"""So many times Ctrl-C kills the ranks instead of waiting for their checkpoint."""

_POLL_S = 0.1


class RankWatch:
    """The ranks of one job, known through the files that `launcher.rank` writes."""

    def __init__(self, directory: Path, num_ranks: int, held: set[signal.Signals]) -> None:
        self._directory = directory
        self._num_ranks = num_ranks
        self._held = held
        self._asked: list[int] = []
        self._told: dict[int, int] = {}
        self._killed: set[int] = set()
        self._failed_at: float | None = None

    def wait(self, starter: subprocess.Popen[bytes]) -> Outcome:
        """Wait until every rank has ended, and nothing of the job is left.

        Args:
            starter: the process that starts the ranks, leader of its own session.
        """
        while starter.poll() is None and len(self._records("ended")) < self._num_ranks:
            received = signal.sigtimedwait(self._held, _POLL_S)
            if received is not None and received.si_signo != signal.SIGCHLD:
                self._asked.append(received.si_signo)
                self._announce(received.si_signo)
            self._pass_signals_on()
            if self._is_over():
                self._kill_ranks()
        with contextlib.suppress(subprocess.TimeoutExpired):
            starter.wait(timeout=5)
        kill_session(starter.pid)
        starter.wait()
        ends = self._ends()
        if not ends and not self._asked:
            return Outcome(1, f"DeepSpeed's launcher ended with {starter.returncode} before any rank did")
        if not ends:
            return job_outcome([RankEnd(0, "this machine", -self._asked[0], 0.0, tuple(self._asked))], 1)
        return job_outcome(ends, self._num_ranks)

    def _announce(self, number: int) -> None:
        interrupts = self._asked.count(signal.SIGINT)
        if interrupts >= KILLING_INTERRUPTS:
            text = "killing the ranks"
        elif number == signal.SIGINT:
            more = KILLING_INTERRUPTS - interrupts
            text = f"waiting for the ranks to stop; Ctrl-C {more} more times kills them"
        else:
            text = "waiting for the ranks to stop"
        sys.stderr.write(f"launcher: {signal_name(number)} received, {text}\n")

    def _pass_signals_on(self) -> None:
        """Send each rank the signals that it has not had; a rank may start after a signal came."""
        if sum(self._told.values()) == self._num_ranks * len(self._asked):
            return
        for rank, record in self._records("started").items():
            told = self._told.get(rank, 0)
            for number in self._asked[told:]:
                # A terminal that went away asks for the same as SIGTERM.
                wanted = signal.SIGTERM if number == signal.SIGHUP else number
                send(record["pid"], record["started"], wanted)
            self._told[rank] = len(self._asked)

    def _is_over(self) -> bool:
        """Whether there is no more reason to wait: a rank has failed some time ago, or the user insists."""
        if self._asked.count(signal.SIGINT) >= KILLING_INTERRUPTS:
            return True
        well = (0, PreemptedError.exit_code)
        if self._failed_at is None and any(end.code not in well for end in self._ends()):
            self._failed_at = time.monotonic()
        return self._failed_at is not None and time.monotonic() - self._failed_at > PEER_GRACE_S

    def _kill_ranks(self) -> None:
        for rank, record in self._records("started").items():
            if send(record["child"], record["child_started"], signal.SIGKILL):
                self._killed.add(rank)

    def _ends(self) -> list[RankEnd]:
        ends = []
        for rank, end in self._records("ended").items():
            killed = (int(signal.SIGKILL),) if rank in self._killed else ()
            ends.append(RankEnd(rank, end["host"], end["code"], end["at"], (*end["sent"], *killed)))
        return ends

    def _records(self, kind: str) -> dict[int, dict[str, Any]]:
        records = [json.loads(path.read_text()) for path in self._directory.glob(f"rank-*.{kind}.json")]
        return {record["rank"]: record for record in records}


@contextlib.contextmanager
def watch_ranks(directory: Path, num_ranks: int) -> Iterator[RankWatch]:
    """Hold signals back for the time of the job, and watch its ranks in `directory`."""
    with signals_held() as held:
        yield RankWatch(directory, num_ranks, held)
