"""The audit finds every way in which a ledger can differ from the order of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from albert.errors import DataError, MissingInputError
from albert.ledger_audit import audit_ledger
from albert.sample_order import Ranges, SampleOrder, rank_share, step_positions

BATCH = 12
ORDER = SampleOrder([32] * 8, seed=3, num_lanes=4, window_blocks=2, global_batch_size=12)


class Writer:
    """Writes ledgers as runs do, without a run."""

    def __init__(self, directory: Path, skipped: Ranges = ()) -> None:
        self.directory, self.skipped, self.num_starts = directory, skipped, 0

    def start(self, step: int, last_step: int, world_size: int, extra: tuple[dict, ...] = ()) -> None:
        folder = self.directory / f"start-{self.num_starts:04d}"
        folder.mkdir(parents=True)
        self.num_starts += 1
        for rank in range(world_size):
            lines: list[dict] = [{"step": step, "position": 0, "rank": rank, "world_size": world_size}]
            for number in range(step + 1, last_step + 1):
                share = rank_share(self.positions(number), rank, world_size).tolist()
                lines.append({"step": number, "examples": [[k, *ORDER.locate(k)] for k in share]})
            lines += extra
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"rank-{rank:05d}.jsonl").write_text(text)

    def positions(self, step: int):
        start = 0
        for _ in range(step):
            positions = step_positions(start, BATCH, self.skipped)
            start = int(positions[-1]) + 1
        return positions


def test_a_run_of_many_starts_and_worlds_is_exact(tmp_path):
    writer = Writer(tmp_path)
    for step, last_step, world_size in [(0, 9, 2), (5, 16, 3), (15, 15, 4), (10, 30, 1), (30, 60, 6)]:
        writer.start(step, last_step, world_size)
    torn = tmp_path / "start-0004" / "rank-00005.jsonl"
    torn.write_text(torn.read_text()[:-20])  # killed in the middle of the last line
    report = audit_ledger(tmp_path, ORDER, (), committed_step=59)
    assert (report.num_starts, report.num_steps, report.num_examples) == (5, 59, 59 * BATCH)
    assert report.num_redone == 4 + 6
    assert str(report) == (
        "59 steps in 5 starts, 10 of them done again; 708 examples in their order, 0 lost, 0 repeated (2.77 epochs)"
    )


def test_rewinds_with_skipped_positions_are_exact(tmp_path):
    skipped = [(84, 96)]
    Writer(tmp_path).start(0, 9, 2, extra=({"rewound_to": 5},))
    first = tmp_path / "start-0000"
    Writer(tmp_path / "later", skipped).start(0, 20, 2)
    for rank in range(2):
        name = f"rank-{rank:05d}.jsonl"
        after = (tmp_path / "later" / "start-0000" / name).read_text().splitlines(keepends=True)[6:]
        (first / name).write_text((first / name).read_text() + "".join(after))
    report = audit_ledger(tmp_path, ORDER, skipped, committed_step=20)
    assert (report.num_steps, report.num_redone, report.num_skipped) == (20, 4, 12)
    with pytest.raises(DataError, match="step 8: position 84 is missing"):
        audit_ledger(tmp_path, ORDER, (), committed_step=20)


def _edit(path: Path, line: int, change) -> None:
    lines = path.read_text().splitlines()
    content = json.loads(lines[line])
    change(content)
    lines[line] = json.dumps(content)
    path.write_text("".join(f"{text}\n" for text in lines))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda line: line["examples"].pop(0), "step 4: position 36 is missing"),
        (lambda line: line["examples"].insert(0, line["examples"][0]), "followed by position 36 again"),
        (lambda line: line["examples"][0].__setitem__(2, 99), "step 4: position 36 used block, index, epoch"),
        (lambda line: line.update(step=5), "the ranks' lines are of different steps"),
    ],
)
def test_a_lost_repeated_or_exchanged_example_is_found(tmp_path, change, problem):
    Writer(tmp_path).start(0, 10, 2)
    _edit(tmp_path / "start-0000" / "rank-00000.jsonl", 4, change)
    with pytest.raises(DataError, match=problem):
        audit_ledger(tmp_path, ORDER, (), committed_step=10)


def test_lost_steps_are_found(tmp_path):
    with pytest.raises(MissingInputError, match="no ledger; it is written with log"):
        audit_ledger(tmp_path, ORDER, (), None)
    Writer(tmp_path / "short").start(0, 10, 2)
    with pytest.raises(DataError, match="ends at step 10, a checkpoint of step 15 is committed"):
        audit_ledger(tmp_path / "short", ORDER, (), committed_step=15)
    gap = Writer(tmp_path / "gap")
    gap.start(0, 10, 2)
    gap.start(12, 20, 2)
    with pytest.raises(DataError, match="begins after step 12, the ledger before it ends at step 10"):
        audit_ledger(tmp_path / "gap", ORDER, (), committed_step=20)
