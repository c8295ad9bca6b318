"""How the ranks of a job ended, and what that means for the job: one exit code and one line."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from albert.errors import PeerLostError, PreemptedError

_LOST = PeerLostError.exit_code
_STOPPED = PreemptedError.exit_code


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    host: str
    code: int
    """Exit code, or minus the number of the signal that killed it."""
    at: float
    """Seconds since the epoch."""
    sent: tuple[int, ...] = ()
    """Signals that the launcher had passed on to it."""

    @property
    def is_consequence(self) -> bool:
        """Whether it followed from something else: a lost peer, an agreed stop, a clean-up."""
        # Programs that do not print their stacks when they are asked to are ended by the question.
        cleaned_up = self.code in (-signal.SIGKILL, -signal.SIGQUIT) and signal.SIGKILL in self.sent
        return cleaned_up or self.code in (0, _LOST, _STOPPED)


@dataclass(frozen=True)
class Outcome:
    """What the launcher exits with and says."""

    exit_code: int
    line: str | None = None
    """Why, where the ranks may not have said it themselves."""


def job_outcome(ends: Sequence[RankEnd], num_ranks: int) -> Outcome:
    """The job's exit code from those of its ranks: the first rank that ended by itself decides."""
    causes = [end for end in ends if not end.is_consequence]
    if causes:
        return _from_cause(min(causes, key=lambda end: end.at))
    codes = {end.code for end in ends}
    if len(ends) < num_ranks or min(codes) < 0:
        return Outcome(_LOST, _not_ended(ends, num_ranks))
    return Outcome(max(codes, default=_LOST))


def _not_ended(ends: Sequence[RankEnd], num_ranks: int) -> str:
    known = {end.rank: end.code for end in ends}
    killed = [str(rank) for rank, code in known.items() if code < 0]
    lost = [str(rank) for rank in range(num_ranks) if rank not in known]
    parts = [f"rank {', '.join(killed)} did not end by itself and had to be killed"] if killed else []
    parts += [f"rank {', '.join(lost)} left no record of its end, as if its host was lost"] if lost else []
    return "; ".join(parts)


def _from_cause(end: RankEnd) -> Outcome:
    who = f"rank {end.rank} on {end.host}"
    if end.code > 0:
        return Outcome(end.code, f"{who} ended with exit code {end.code}")
    name = signal_name(-end.code)
    again = "start the job again to go on from its last checkpoint"
    if -end.code in end.sent:
        return Outcome(_STOPPED, f"{name} ended {who} before it could commit a checkpoint; {again}")
    return Outcome(_LOST, f"{who} was killed by {name}; {again}")


def signal_name(number: int) -> str:
    """`SIGTERM` for 15."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
