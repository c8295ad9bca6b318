"""The exit code of a job from those of its ranks."""

import signal

import pytest

from launcher.outcome import Outcome, RankEnd, job_outcome


def end(rank: int, code: int, at: float = 0.0, sent: tuple[int, ...] = ()) -> RankEnd:
    return RankEnd(rank, f"node{rank}", code, at, sent)


KILL, TERM, SEGV = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGSEGV)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([end(0, 0), end(1, 0)], 0),
        ([end(0, 75), end(1, 75)], 75),
        ([end(0, 75), end(1, 0)], 75),
        ([end(0, 78, 1.0), end(1, 78, 2.0)], 78),
        ([end(0, 76, 2.0), end(1, 65, 1.0)], 65),
        ([end(0, 76, 1.0), end(1, 65, 2.0)], 65),
        ([end(0, 1, 2.0), end(1, 70, 1.0)], 70),
        ([end(0, 76), end(1, 76)], 76),
        ([end(0, 76, 2.0), end(1, -KILL, 1.0)], 76),
        ([end(0, 1, 2.0), end(1, -SEGV, 1.0)], 76),
        ([end(0, -KILL, 9.0, (KILL,)), end(1, 65, 1.0)], 65),
        ([end(0, -KILL, 9.0, (TERM, KILL)), end(1, -TERM, 1.0, (TERM,))], 75),
        ([end(0, -KILL, 9.0, (KILL,)), end(1, -KILL, 1.0)], 76),
        ([end(0, -KILL, 9.0, (2, 2, 2, KILL)), end(1, 75, 1.0)], 76),
        ([end(0, 0)], 76),
    ],
)
def test_the_first_rank_that_ended_by_itself_decides(ends, code):
    assert job_outcome(ends, 2).exit_code == code


@pytest.mark.parametrize(
    ("ends", "line"),
    [
        (
            [end(0, 76, 2.0), end(1, -KILL, 1.0)],
            "rank 1 on node1 was killed by SIGKILL; start the job again to go on from its last checkpoint",
        ),
        ([end(0, 0), end(1, 65)], "rank 1 on node1 ended with exit code 65"),
        (
            [end(0, -TERM, 1.0, (TERM,)), end(1, -TERM, 2.0, (TERM,))],
            "SIGTERM ended rank 0 on node0 before it could commit a checkpoint; "
            "start the job again to go on from its last checkpoint",
        ),
        ([end(0, 0)], "rank 1 left no record of its end, as if its host was lost"),
        (
            [end(0, -KILL, 9.0, (2, KILL))],
            "rank 0 did not end by itself and had to be killed; "
            "rank 1 left no record of its end, as if its host was lost",
        ),
        (
            [end(0, -99)],
            "rank 0 on node0 was killed by signal 99; start the job again to go on from its last checkpoint",
        ),
        ([end(0, 0), end(1, 0)], None),
        ([end(0, 75), end(1, 75)], None),
    ],
)
def test_the_line_names_rank_host_and_cause(ends, line):
    assert job_outcome(ends, 2).line == line


def test_no_rank_at_all_is_a_lost_job():
    assert job_outcome([], 2) == Outcome(76, "rank 0, 1 left no record of its end, as if its host was lost")
