"""What the scaling benchmark runs and says; the runs themselves are the launcher's and the trainer's."""

from __future__ import annotations

import sys

import pytest

from benchmarks import scaling

SPEEDS = {1: [100.0, 110.0, 90.0], 2: [190.0, 220.0, 135.0]}


def test_weak_scaling_keeps_the_batch_of_a_rank_and_strong_scaling_that_of_a_step():
    cases = scaling.cases([1, 2, 4])
    assert cases["weak"] == {1: (1, 1), 2: (2, 1), 4: (4, 1)}
    assert cases["strong"] == {1: (1, 4), 2: (2, 2), 4: (4, 1)}


def test_efficiencies_compare_within_a_round():
    assert scaling.efficiencies(SPEEDS, 2) == [0.95, 1.0, 0.75]
    assert scaling._row(SPEEDS, 2, 2) == {"tokens_per_s": 190, "efficiency": 0.95, "spread": [0.75, 1.0]}


def test_ranks_that_share_cores_have_no_efficiency():
    row = scaling._row(SPEEDS, 2, 1)
    assert row == {"tokens_per_s": 190, "efficiency": None, "no_result": "2 ranks on 1 cores or GPUs"}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (["1"], "an efficiency needs more than one rank with a core or GPU each"),
        (["64"], "an efficiency needs more than one rank with a core or GPU each, here are 3; choose other"),
        (["2", "3"], "--ranks [1, 2, 3]: each must be at least 1 and divide the largest"),
        (["0", "2"], "--ranks [0, 1, 2]: each must be at least 1"),
    ],
)
def test_ranks_without_a_result_are_refused(monkeypatch, capsys, ranks, message):
    monkeypatch.setattr(scaling, "num_places", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["scaling", "--ranks", *ranks])
    with pytest.raises(SystemExit) as caught:
        scaling.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
