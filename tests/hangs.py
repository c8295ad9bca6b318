"""What the tests of hanging ranks share, in pretraining and in fine-tuning."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests import runs
from tests.ranks import Ranks

HANG_TIMEOUT_S = 2.0
FAULTY_STEP = 12


def wait_for_ever() -> None:
    """The fault; its name is looked for in the stacks."""
    time.sleep(1000)


def exit_code(ranks: Ranks, rank: int) -> int | None:
    """Of a rank that ends, or None where it does not."""
    ranks.processes[rank].join(60)
    return ranks.processes[rank].exitcode


def assert_a_stopped_rank_is_named(
    ranks: Ranks, run: Path, stopped: int, setting: str, read_errors: Callable[[], str]
) -> None:
    """Stop one of two ranks; the other says so and ends."""
    runs.wait_until(lambda: runs.last_step(run) > FAULTY_STEP, "some steps")
    os.kill(ranks.processes[stopped].pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    assert exit_code(ranks, 1 - stopped) == 76
    elapsed_s = time.monotonic() - stopped_at
    ranks.kill()
    message = read_errors()
    # Rank 0 keeps the store by which ranks are asked.
    reasons = [
        "rank 0 cannot be asked",
        r"rank 1 on \S+ is silent since \w+ of step \d+: stopped, or its host is lost",
    ]
    assert re.search(reasons[stopped], message)
    assert "most recent call first" in message  # the stacks of the other rank
    _assert_in_time(message, elapsed_s, setting)


def assert_rank_1_is_named_with_its_phase(
    ranks: Ranks, run: Path, phase: str, setting: str, read_errors: Callable[[], str]
) -> None:
    """Both end; rank 1, which waits for ever in the faulty step, says where."""
    runs.wait_until(lambda: runs.last_step(run) == FAULTY_STEP, "the faulty step")
    began_at = time.monotonic()
    assert [exit_code(ranks, rank) for rank in (0, 1)] == [76, 76]
    elapsed_s = time.monotonic() - began_at
    message = read_errors()
    assert f"[rank 1] error: {phase} of step {FAULTY_STEP} has taken" in message
    assert f"in {wait_for_ever.__name__}" in message  # its stack says why
    _assert_in_time(message, elapsed_s, setting)


def _assert_in_time(message: str, elapsed_s: float, setting: str) -> None:
    """Within what was allowed and the time that it takes to look twice, print and leave."""
    allowed = [
        float(found) for found in re.findall(rf"([\d.]+) s are allowed \({re.escape(setting)}\)", message)
    ]
    assert min(allowed) >= HANG_TIMEOUT_S
    assert elapsed_s < max(allowed) + 4
