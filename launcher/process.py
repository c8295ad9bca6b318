"""Parents and children: signals taken one at a time, and children that never outlive their parent. Linux."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from albert.processes import die_with_parent

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""Signals that ask a job to commit a checkpoint and stop."""


def child_setup() -> Callable[[], None]:
    """What a child does between fork and exec: it takes signals again, and it dies with this process."""
    parent = os.getpid()

    def set_up() -> None:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS, signal.SIGCHLD})

    return set_up


@contextlib.contextmanager
def signals_held() -> Iterator[set[signal.Signals]]:
    """Hold back the stop signals and SIGCHLD, so that none interrupts anything; yields what sigwait may take.

    A signal that was ignored when this process started (nohup, a shell's background job) stays ignored.
    """
    held = {number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    held.add(signal.SIGCHLD)
    children = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield held
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, children)


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; with the pid this names one process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state == "Z" else rest[18]


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; False where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def send(pid: int, started: str | None, number: int) -> bool:
    """Signal a process if it is still the one that started at `started`; says whether it was."""
    if started is None or start_time(pid) != started:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_session(leader: int) -> None:
    """SIGKILL whatever is left of the session that the process `leader` led."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _session_of(int(entry.name)) == leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
