"""Preflight as the first step of a Slurm job: bad nodes are named, and left out when the job is requeued."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert.errors import PeerLostError
from launcher.allocation import Allocation
from launcher.job import PROGRAMS
from launcher.outcome import RankEnd
from launcher.slurm_ranks import Attempt, SlurmSettings, last_error, run_ranks

_JOIN_TIMEOUT_S = 45
"""Longer than by hand: python starts at different speeds where many nodes load it from one file system."""


@dataclass(frozen=True)
class PreflightResult:
    """What preflight says about an allocation."""

    attempt: Attempt
    cause: str | None
    bad_nodes: tuple[str, ...]
    """Should not be used again."""

    @property
    def passed(self) -> bool:
        """Whether the ranks may start."""
        return self.attempt.outcome.exit_code == 0


def preflight_arguments(program: str, arguments: Sequence[str]) -> tuple[str, ...] | None:
    """Arguments of preflight for those of a program; None where there is nothing that it could check."""
    options = [word for word in arguments if word.startswith("-") and not word.startswith("--config")]
    if program != "pretrain" or options or not any(word.startswith("--config") for word in arguments):
        return None
    return tuple(arguments)


def run_preflight(
    arguments: tuple[str, ...], allocation: Allocation, settings: SlurmSettings, directory: Path
) -> PreflightResult:
    """Check the nodes of this allocation, as step 0 of the job."""
    report = directory / "report.json"
    report.unlink(missing_ok=True)
    options = (f"--join-timeout={_JOIN_TIMEOUT_S}", f"--report={report.resolve()}")
    attempt = run_ranks(
        PROGRAMS["preflight"], (*arguments, *options), allocation, settings, directory, step=0
    )
    found = json.loads(report.read_text()) if report.is_file() else None
    nodes = bad_nodes(found, attempt.ends, allocation) if not attempt.asked else []
    problems = found["problems"] if found else []
    cause = next(iter(problems), last_error(directory, attempt.ends) or attempt.outcome.line)
    named = cause and f"preflight: {cause.removeprefix('preflight: ')}"
    return PreflightResult(attempt, named, tuple(nodes))


def bad_nodes(report: Mapping[str, Any] | None, ends: Sequence[RankEnd], allocation: Allocation) -> list[str]:
    """Nodes that should not be used again.

    Args:
        report: of preflight; None if not all ranks could meet.
        ends: of the ranks, as far as they have ended.
        allocation: its nodes.

    Returns:
        Without a report: nodes of the ranks that found a problem by themselves, or else of those that never
        arrived while others waited for them. None if that is all ranks: then no node is at fault.
    """
    if report is not None:
        return list(report["bad_hosts"])
    bad = {end.rank for end in ends if not end.is_consequence}
    if not bad:
        bad = set(range(allocation.num_tasks)) - {
            end.rank for end in ends if end.code == PeerLostError.exit_code
        }
    if len(bad) == allocation.num_tasks:
        return []
    return list(dict.fromkeys(allocation.node_of(rank) for rank in sorted(bad)))
