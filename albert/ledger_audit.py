"""Proves from a ledger that a run used every example in its order, once, whatever happened to it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert.errors import DataError, MissingInputError
from albert.sample_order import Ranges, SampleOrder, step_positions

Example = tuple[int, int, int, int]
"""Position, block, index by length, epoch."""


@dataclass(frozen=True)
class LedgerReport:
    """What an audit found to be true."""

    num_starts: int
    num_steps: int
    num_examples: int
    num_redone: int
    """Steps that were done again after a start or a rewind."""
    epochs: float
    num_skipped: int
    """Positions left out by loss-spike rewinds."""

    def __str__(self) -> str:
        return (
            f"{self.num_steps} steps in {self.num_starts} starts, {self.num_redone} of them done again; "
            f"{self.num_examples} examples in their order, 0 lost, 0 repeated ({self.epochs:.2f} epochs)"
            + (f"; {self.num_skipped} skipped after loss spikes" if self.num_skipped else "")
        )


def audit_ledger(
    directory: Path, order: SampleOrder, skipped: Ranges, committed_step: int | None
) -> LedgerReport:
    """Check that the steps of a run used exactly the examples that the order gives them.

    Args:
        directory: of the ledger.
        order: in which the run is to use the examples.
        skipped: ranges of positions that no step uses.
        committed_step: of the newest checkpoint; None for none.

    Raises:
        MissingInputError: there is no ledger.
        DataError: names the first step that lost, repeated or exchanged an example.
    """
    starts = sorted(directory.glob("start-*"))
    if not starts:
        raise MissingInputError(f"{directory}: no ledger; it is written with log.ledger=true")
    history: list[list[Example]] = []
    num_recorded = 0
    for start in starts:
        for event in _read_start(start):
            if isinstance(event, int):
                if event > len(history):
                    raise DataError(
                        f"{start}: begins after step {event}, the ledger before it ends at step {len(history)}"
                    )
                del history[event:]
            else:
                history.append(event)
                num_recorded += 1
    if committed_step is not None and len(history) < committed_step:
        raise DataError(
            f"{directory}: ends at step {len(history)}, a checkpoint of step {committed_step} is committed"
        )
    _check_examples(directory, history, order, skipped)
    num_examples = sum(map(len, history))
    end = history[-1][-1][0] + 1 if history else 0
    num_skipped = sum(min(stop, end) - begin for begin, stop in skipped if begin < end)
    return LedgerReport(
        len(starts), len(history), num_examples, num_recorded - len(history), order.epoch(end), num_skipped
    )


def _check_examples(
    directory: Path, history: list[list[Example]], order: SampleOrder, skipped: Ranges
) -> None:
    seen: set[tuple[int, int, int]] = set()
    position = 0
    for step, examples in enumerate(history, 1):
        expected = step_positions(position, len(examples), skipped).tolist()
        position = expected[-1] + 1
        for wanted, (found, *place) in zip(expected, examples, strict=True):
            where = f"{directory}: step {step}"
            if found != wanted:
                what = "is missing" if found > wanted else f"is followed by position {found} again"
                raise DataError(f"{where}: position {wanted} {what}")
            if tuple(place) != tuple(order.locate(wanted)):
                raise DataError(
                    f"{where}: position {wanted} used block, index, epoch {place}, its order says "
                    f"{list(order.locate(wanted))}"
                )
            if tuple(place) in seen:
                raise DataError(f"{where}: block, index, epoch {place} was used before")
            seen.add((place[0], place[1], place[2]))


def _read_start(directory: Path) -> Iterator[int | list[Example]]:
    """Steps to go back to, and the examples of every step that all ranks recorded, in the order of the steps."""
    files = sorted(directory.glob("rank-*.jsonl"))
    ranks = [list(_read_lines(path)) for path in files]
    heads = [lines[0] for lines in ranks if lines]
    if not heads:
        return
    world_size = heads[0]["world_size"]
    if len(heads) < world_size:
        return  # killed before all ranks were there
    yield heads[0]["step"]
    for lines in zip(*(lines[1:] for lines in ranks), strict=False):
        if "rewound_to" in lines[0]:
            yield lines[0]["rewound_to"]
            continue
        if len({line.get("step") for line in lines}) > 1:
            raise DataError(
                f"{directory}: the ranks' lines are of different steps: {lines[0]['step']} and others"
            )
        yield sorted(tuple(row) for row in itertools.chain(*(line["examples"] for line in lines)))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines; the last may be torn by a kill."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
